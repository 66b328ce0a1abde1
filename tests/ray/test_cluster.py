"""`taper serve --ray` on a local cluster, with a replica killed under load."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

# ray.serve, not ray: without Ray that name may be this folder.
for name in ("ray.serve", "starlette", "msgspec", "prometheus_client", "httpx", "uvicorn", "llguidance"):
    pytest.importorskip(name, reason="it needs pip install 'taper[server,ray]' httpx: make ray")

import httpx  # noqa: E402

from taper.errors import TaperError, UsageError  # noqa: E402
from taper.ray.forwarding import ASSUMED_TOKENS, Call  # noqa: E402
from taper.ray.merging import merged_metrics, merged_state  # noqa: E402
from taper.ray.start import Scale  # noqa: E402
from taper.server.errors import ApiError  # noqa: E402

BOUND_S = 40.0
ASK = {
    "model": "stories",
    "prompt": "Once upon a time",
    "max_tokens": 24,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def client(served):
    with httpx.Client(base_url=served, timeout=BOUND_S) as client:
        yield client


def events(reply):
    return [line[6:] for line in reply.text.split("\n\n") if line]


def pids(client, model="stories"):
    return {one["pid"] for one in client.get("/monitor").json()["models"][model]["replicas"]}


def test_completions_whole_and_as_a_stream_are_the_same(client):
    whole = client.post("/v1/completions", json=ASK)
    assert whole.status_code == 200, whole.text
    assert whole.json()["usage"]["completion_tokens"] == 24
    stream = client.post("/v1/completions", json={**ASK, "stream": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    *parts, done = events(stream)
    assert done == "[DONE]"
    joined = "".join(json.loads(part)["choices"][0]["text"] for part in parts)
    assert joined == whole.json()["choices"][0]["text"]


def test_a_second_model_chats(client):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "seed": 1}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["model"] == "tiny"
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["stories", "tiny"]
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"temperature": 9}, 400, "temperature"),
        ({"nonsense": 1}, 400, "nonsense"),
        ({"deadline_ms": 0.01}, 429, "deadline_ms"),
        ({"model": 3}, 400, "model"),
    ],
)
def test_refusals_are_those_of_the_server(client, change, status, param):
    reply = client.post("/v1/completions", json={**ASK, **change})
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text


def test_hosts_and_origins_are_checked_before_anything_is_forwarded(client):
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert client.post("/v1/completions", json=ASK, headers={"origin": "http://evil"}).status_code == 403


def test_state_and_metrics_are_of_all_replicas(client):
    assert client.get("/ready").status_code == 200
    assert len(pids(client)) == 2
    text = client.get("/metrics").text
    assert {f'replica="{pid}"' in text for pid in pids(client)} == {True}
    assert "taper:replicas_lost" in text


def test_work_is_spread(client):
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: client.post("/v1/completions", json=ASK), range(8)))
    assert {reply.status_code for reply in replies} == {200}
    text = client.get("/metrics").text
    counts = [
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("vllm:request_success_total{") and 'model_name="stories"' in line
    ]
    assert len(counts) == 2
    assert min(counts) >= 2


def test_a_client_that_goes_ends_its_request(client):
    with client.stream("POST", "/v1/completions", json={**ASK, "max_tokens": 2000, "stream": True}) as reply:
        pieces = reply.iter_bytes()  # httpx closes the connection when nobody holds it
        next(pieces)
        assert client.get("/monitor").json()["models"]["stories"]["num_running"] == 1
    end_s = time.monotonic() + 5
    while client.get("/monitor").json()["models"]["stories"]["num_running"]:
        assert time.monotonic() < end_s
        time.sleep(0.05)


def outcome(served, number, right, until):
    """Ask until told to stop; what came of each request."""
    outcomes = []
    with httpx.Client(base_url=served, timeout=BOUND_S) as client:
        while not until.is_set():
            is_stream = number % 2 == 1
            reply = client.post("/v1/completions", json={**ASK, "stream": is_stream})
            if reply.status_code == 503:
                assert int(reply.headers["retry-after"]) >= 1
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
                outcomes.append("retryable")
                continue
            assert reply.status_code == 200, reply.text
            if is_stream and events(reply)[-1] != "[DONE]":
                assert json.loads(events(reply)[-1])["error"]["code"] == "replica_lost"
                outcomes.append("retryable")
                continue
            parts = [json.loads(part) for part in events(reply)[:-1]] if is_stream else [reply.json()]
            assert "".join(part["choices"][0]["text"] for part in parts) == right
            outcomes.append("answered")
    return outcomes


def test_kill_9_of_a_replica_under_load(client, served):
    right = client.post("/v1/completions", json=ASK).json()["choices"][0]["text"]
    before = pids(client)
    until = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(outcome, served, number, right, until) for number in range(8)]
        time.sleep(1)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        end_s = time.monotonic() + BOUND_S
        while victim in (now := pids(client)) or len(now) < 2:
            assert time.monotonic() < end_s, "no new replica"
            time.sleep(0.2)
        time.sleep(1)
        until.set()
        outcomes = [one for asked in asking for one in asked.result(timeout=2 * BOUND_S)]
    assert outcomes.count("answered") > 8
    assert outcomes.count("retryable") <= 8  # at most what the dead one was streaming
    assert client.get("/ready").status_code == 200


def test_a_stopped_replica_is_left_after_ten_seconds(client):
    """It is not dead, it says nothing: only the bound on silence helps."""
    victim = min(pids(client, "tiny"))
    os.kill(victim, signal.SIGSTOP)
    began_s = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        ask = {**ASK, "model": "tiny", "max_tokens": 2}
        replies = list(pool.map(lambda _: client.post("/v1/completions", json=ask), range(4)))
    assert time.monotonic() - began_s < 15
    assert {reply.status_code for reply in replies} == {200}
    os.kill(victim, signal.SIGKILL)


# --- without the cluster ------------------------------------------------------------------------------------


def test_what_is_read_of_a_body():
    call = Call.read(
        "/p", b'{"model": "m", "n": 2, "max_tokens": 5, "prompt": ["a", "b"], "priority": 3}', 0.0
    )
    assert (call.tokens, call.priority, call.deadline_s) == (20, 3, float("inf"))
    assert Call.read("/p", b'{"model": "m", "max_tokens": null}', 0.0).tokens == ASSUMED_TOKENS
    for wrong in (b"[]", b"{", b"{}", b'{"model": 1}', b'{"model": "m", "prompt": ' + b"[" * 100):
        with pytest.raises(ApiError):
            Call.read("/p", wrong, 0.0)


def test_a_forwarded_deadline_is_what_is_left_of_it():
    sent = b'{"model": "m", "seed": 123456789012345678901234567890, "deadline_ms": 2000}'
    call = Call.read("/p", sent, time.monotonic() - 1.5)
    fields = json.loads(call.for_replica())
    assert 300 < fields["deadline_ms"] <= 500
    assert fields["seed"] == 123456789012345678901234567890
    huge = b'{"model": "m", "deadline_ms": 1' + 400 * b"0" + b"}"
    assert Call.read("/p", huge, 0.0).for_replica()


def test_states_are_added_up():
    one = {"pid": 1, "snapshot": {"num_running": 1, "kv_share": 1.0, "bits": None, "other": [1]}}
    two = {"pid": 2, "snapshot": {"num_running": 2, "kv_share": 0.0, "bits": 4.0, "other": [2]}}
    state = merged_state([one, two])
    assert (state["num_running"], state["kv_share"], state["bits"]) == (3, 0.5, 4.0)
    assert [replica["pid"] for replica in state["replicas"]] == [1, 2]
    assert merged_state([])["num_waiting"] == 0


def test_metrics_get_a_label_for_the_replica():
    text = '# HELP a_total x\n# TYPE a_total counter\na_total{b="c"} 1.0\n'
    merged = merged_metrics("# TYPE f gauge\nf 1.0\n", {"7": text, "8": text}).decode()
    assert merged.count("# TYPE a_total counter") == 1
    assert 'a_total{b="c",replica="7"} 1.0' in merged
    assert "\nf 1.0" in merged


def test_replicas_of_the_command_line():
    assert Scale.read("2", 3) == Scale(2, 2, 3)
    assert Scale.read("1..4") == Scale(1, 4)
    for wrong in ("0", "4..1", "x", "1..", "-1"):
        with pytest.raises(UsageError):
            Scale.read(wrong)


def test_more_cpus_than_there_are_and_a_file_that_is_none(served, tmp_path):
    from taper.ray.start import deployed
    from taper.server.start import ServeOptions

    with (
        pytest.raises(UsageError, match="the cluster has 4"),
        deployed({"x": tmp_path}, ServeOptions(), Scale(9, 9, 1)),
    ):
        pass
    bad = tmp_path / "bad.taper"
    bad.write_bytes(b"nothing")
    with pytest.raises(TaperError, match="bad"), deployed({"bad": bad}, ServeOptions(), Scale()):
        pass
