"""The official client against a live server, clients that go away, and raw bodies."""

from __future__ import annotations

import json
import random
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest
from fake_loop import FakeLoop
from live import running

from taper import load
from taper.server.serving import Served
from taper.testing.tiny import tiny_taper

KEY = "a-key-that-is-long-enough"
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}},
    "required": ["size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """(URL, fake loop)."""
    path = tiny_taper(tmp_path_factory.mktemp("tiny") / "tiny.taper", chat=True, max_position_embeddings=1024)
    llm = load(path)
    loop = FakeLoop(llm.engine)
    with running({"tiny": Served("tiny", llm, loop)}, KEY) as url:
        yield url, loop


@pytest.fixture(scope="module")
def client(live):
    openai = pytest.importorskip("openai", reason="the conformance test needs the openai client")
    with openai.OpenAI(base_url=f"{live[0]}/v1", api_key=KEY, max_retries=0) as client:
        yield client


# --- the official client ----------------------------------------------------------------------------------


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "taper"


def test_chat_whole_and_streamed(client):
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    assert whole.usage.completion_tokens == 16
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    assert whole.taper["deadline_met"] is None
    texts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        usage = chunk.usage
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert usage == whole.usage


def test_extra_fields(client):
    reply = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=4,
        extra_body={"bits": 3, "deadline_ms": 60_000, "priority": 1},
    )
    assert reply.taper["bits"] == 3
    assert reply.taper["deadline_met"] is True


def test_tools_round_trip_as_the_client_repeats_them(client):
    tools = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
    options = {"model": "tiny", "tools": tools, "max_tokens": 60}
    first = client.chat.completions.create(messages=HELLO, tool_choice="required", **options)
    message = first.choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments)["size"] in ("small", "large")
    told = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}
    for sent in (message, message.model_dump()):  # with nulls, as users write it
        again = client.chat.completions.create(messages=[*HELLO, sent, told], **options)
        assert again.choices[0].finish_reason


def test_parse(client):
    pydantic = pytest.importorskip("pydantic")

    class Thing(pydantic.BaseModel):
        count: bool

    reply = client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Thing, max_tokens=60, temperature=0
    )
    assert isinstance(reply.choices[0].message.parsed.count, bool)


def test_completions(client):
    reply = client.completions.create(model="tiny", prompt="the cat", echo=True, logprobs=1, max_tokens=1)
    assert reply.choices[0].text.startswith("the cat")
    streamed = client.completions.create(
        model="tiny", prompt="the cat", max_tokens=3, stream=True, temperature=0
    )
    whole = client.completions.create(model="tiny", prompt="the cat", max_tokens=3, temperature=0)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_responses(client):
    options = {"model": "tiny", "input": "hello", "max_output_tokens": 8, "temperature": 0}
    whole = client.responses.create(**options)
    assert whole.status == "incomplete"
    events = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].response.output_text == whole.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    conversation = [{"role": "user", "content": "hello"}, *whole.output, {"role": "user", "content": "go on"}]
    assert (
        client.responses.create(model="tiny", input=conversation, max_output_tokens=4).output_text is not None
    )


def test_errors_are_the_clients_own(client, live):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, user="me")
    assert caught.value.param == "user"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{live[0]}/v1", api_key="wrong").models.list()
    live[1].max_waiting = 0
    try:
        with pytest.raises(openai.RateLimitError) as limited:
            client.chat.completions.create(model="tiny", messages=HELLO)
    finally:
        live[1].max_waiting = 64
    assert limited.value.code == "queue_full"


# --- clients that go --------------------------------------------------------------------------------------


def connection(live, path, body):
    """A raw connection that has sent a request."""
    address = urlsplit(live[0])
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    made = socket.create_connection((address.hostname, address.port))
    made.sendall(head.encode() + raw)
    return made


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_client_that_goes_ends_its_request_running_or_waiting(live, path, stream):
    fields = {"/v1/chat/completions": ("messages", HELLO), "/v1/completions": ("prompt", "hello")}
    name, value = fields.get(path, ("input", "hello"))
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {"model": "tiny", name: value, limit: 900, "stream": stream}
    if path != "/v1/responses":
        body["ignore_eos"] = True
    loop = live[1]
    loop.step_s = 0.02  # 18 s, if nobody stopped it
    try:
        first = connection(live, path, body)
        until(lambda: loop.snapshot()["num_running"] == 1)
        waiting = connection(live, path, body)
        until(lambda: loop.snapshot()["num_waiting"] == 1)
        waiting.close()
        until(lambda: loop.snapshot()["num_waiting"] == 0)
        assert loop.snapshot()["num_running"] == 1  # the other client is not affected
        first.close()
        until(lambda: loop.snapshot()["num_running"] == 0)
    finally:
        loop.step_s = 0


def test_a_late_failure_ends_a_stream_with_an_error_event(live):
    loop = live[1]
    plain = loop._stream

    def broken(job, request):
        plain(job, request)
        raise RuntimeError("wire cut")

    loop._stream = broken
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3}
    headers = {"Authorization": f"Bearer {KEY}"}
    try:
        streamed = httpx.post(
            f"{live[0]}/v1/chat/completions", json={**body, "stream": True}, headers=headers
        )
        whole = httpx.post(f"{live[0]}/v1/chat/completions", json=body, headers=headers)
    finally:
        loop._stream = plain
    assert streamed.status_code == 200
    assert (
        json.loads(streamed.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["type"]
        == "server_error"
    )
    assert whole.status_code == 500
    assert "wire cut" not in whole.text
    assert httpx.post(f"{live[0]}/v1/chat/completions", json=body, headers=headers).status_code == 200


def test_the_monitor_stream(live):
    with httpx.stream(
        "GET", f"{live[0]}/monitor?stream=1", headers={"Authorization": f"Bearer {KEY}"}
    ) as reply:
        line = next(reply.iter_lines())
    assert json.loads(line.removeprefix("data: "))["models"]["tiny"]["num_waiting"] == 0


def test_small_requests_do_not_wait_for_acknowledgements(live):
    """Without TCP_NODELAY each takes 40 ms."""
    with httpx.Client(base_url=live[0], headers={"Authorization": f"Bearer {KEY}"}) as client:
        times = []
        for _ in range(15):
            began = time.monotonic()
            assert client.post("/v1/completions", json={}).status_code == 400
            times.append(time.monotonic() - began)
    assert sorted(times)[7] < 0.03


# --- raw bodies -------------------------------------------------------------------------------------------


def test_damaged_bodies_are_only_ever_refused(live):
    """The small version of benchmarks/serving/fuzz.py."""
    generator = random.Random(7)
    good = json.dumps(
        {
            "model": "tiny",
            "messages": HELLO,
            "max_tokens": 1,
            "stop": ["x"],
            "logit_bias": {"3": 1},
            "bits": {"min": 2},
        }
    ).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with httpx.Client(base_url=live[0], headers=headers) as client:
        statuses = set()
        for _ in range(300):
            body = bytearray(good)
            for _ in range(generator.randint(1, 4)):
                at = generator.randrange(len(body))
                body[at : at + generator.randint(0, 3)] = generator.randbytes(generator.randint(0, 3))
            for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
                statuses.add(client.post(path, content=bytes(body)).status_code)
    assert 400 in statuses
    assert not {status for status in statuses if status >= 500}
