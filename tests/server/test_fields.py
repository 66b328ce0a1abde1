"""Every field is honoured or refused by name."""

from __future__ import annotations

import json
import math

import pytest
from fake_loop import FakeLoop
from starlette.testclient import TestClient

from taper import load
from taper.server.app import make_app
from taper.server.body import decode
from taper.server.errors import ApiError
from taper.server.fields import NEUTRAL, ChatRequest, CompletionRequest, ResponseRequest
from taper.server.guard import LOOPBACK_HOSTS
from taper.server.serving import Served
from taper.testing.tiny import tiny_taper

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 0}
TEXT = {"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0}
RESPONSE = {"model": "tiny", "input": "hello", "max_output_tokens": 6, "temperature": 0}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT, "/v1/responses": RESPONSE}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(client, fake loop)."""
    llm = load(
        tiny_taper(tmp_path_factory.mktemp("tiny") / "tiny.taper", chat=True, max_position_embeddings=1024)
    )
    llm.card = {"widths": [{"bits": b, "increase_frac": 0.5 / b**2} for b in range(2, 9)]}
    loop = FakeLoop(llm.engine)
    app = make_app({"tiny": Served("tiny", llm, loop)}, hosts=LOOPBACK_HOSTS)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=True) as client:
        yield client, loop


def post(server, path, **changes):
    body = {**ROUTES[path], **changes}
    return server[0].post(path, json={k: v for k, v in body.items() if v is not ...})


def chat(server, **changes):
    return post(server, "/v1/chat/completions", **changes)


def text(server, **changes):
    return post(server, "/v1/completions", **changes)


def good(response):
    assert response.status_code == 200, response.text
    return response.json()


def refused(response, param, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    if param:
        assert param.split(".")[0].split("[")[0] in error["message"]
    return error


def events(response):
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# --- what is honoured -------------------------------------------------------------------------------------


def test_a_chat_is_the_models_own_answer(server):
    reply = good(chat(server, seed=1))
    llm = server[1].engine
    [choice] = reply["choices"]
    request = server[1].requests[-1]
    assert llm.tokenizer.decode(request.prompt) == "<|user|>hello\n<|assistant|>"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == llm.generate(request).text
    assert reply["usage"] == {
        "prompt_tokens": len(request.prompt),
        "completion_tokens": 6,
        "total_tokens": len(request.prompt) + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert reply["taper"]["bits"] == pytest.approx(sum(llm.generate(request).bits) / 6)
    assert reply["taper"]["deadline_met"] is None
    assert reply["taper"]["queue_ms"] >= 0
    assert choice["taper"]["token_bits"] == list(llm.generate(request).bits)
    assert choice["finish_reason"] == "length"


def test_sampling_fields_reach_the_engine(server):
    given = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"17": -100, "18": 3},
        "seed": 11,
    }
    for send in (chat, text):
        good(send(server, **given, stop=["zzz", "yyy"], ignore_eos=True))
        request = server[1].requests[-1]
        for name, value in given.items():
            expected = {17: -100, 18: 3} if name == "logit_bias" else value
            assert getattr(request.sampling, name) == expected
        assert request.stop == ("zzz", "yyy")
        assert request.ignore_eos
        assert request.max_tokens == 6


def test_openais_default_temperature_is_one(server):
    good(chat(server, temperature=...))
    assert server[1].requests[-1].sampling.temperature == 1


def test_choices_differ_and_a_seed_repeats_them(server):
    first = good(chat(server, n=3, temperature=1, seed=5))
    again = good(chat(server, n=3, temperature=1, seed=5))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert first["usage"]["completion_tokens"] == 18
    # The prompt is read once as far as the client is concerned.
    assert first["usage"]["prompt_tokens"] == good(chat(server))["usage"]["prompt_tokens"]


def test_stop_ends_the_text(server):
    whole = good(text(server, max_tokens=20))["choices"][0]["text"]
    stop = whole[3:5]
    cut = good(text(server, max_tokens=20, stop=stop))["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_log_probabilities_of_a_chat(server):
    reply = good(chat(server, logprobs=True, top_logprobs=3))
    content = reply["choices"][0]["logprobs"]["content"]
    assert len(content) == 6
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0  # greedy
        assert entry["token"] == entry["top_logprobs"][0]["token"]
    spelled = bytes(byte for entry in content for byte in entry["bytes"]).decode(errors="replace")
    assert spelled == reply["choices"][0]["message"]["content"]


def test_echo_scores_the_prompt_as_lm_eval_reads_it(server):
    """Each token's log-probability is that of the model after the tokens before it."""
    ids = server[1].engine.tokenizer.encode("the cat in the hat")
    reply = good(text(server, prompt=[ids], echo=True, logprobs=1, max_tokens=1))
    lists = reply["choices"][0]["logprobs"]
    assert all(len(part) == len(ids) + 1 for part in lists.values())
    assert lists["token_logprobs"][0] is None
    for cut in (1, 4, len(ids)):
        next_token = good(text(server, prompt=[ids[:cut]], max_tokens=1, logprobs=20, bits=8))["choices"][0][
            "logprobs"
        ]
        top = next_token["top_logprobs"][0]
        assert max(top.values()) == max(lists["top_logprobs"][cut].values())
        if lists["tokens"][cut] in top:
            assert lists["token_logprobs"][cut] == top[lists["tokens"][cut]]
    whole = reply["choices"][0]["text"]
    assert whole.startswith("the cat in the hat")
    assert [whole[at] for at in lists["text_offset"][:-1]] == [token[0] for token in lists["tokens"][:-1]]


def test_echo_without_new_tokens(server):
    reply = good(text(server, prompt="the cat", echo=True, logprobs=0, max_tokens=0))
    assert reply["choices"][0]["text"] == "the cat"
    count = len(server[1].engine.tokenizer.encode("the cat"))
    assert reply["usage"] == {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}


def test_a_list_of_prompts(server):
    reply = good(text(server, prompt=["the cat", "in", [5, 6]], n=2, seed=1, temperature=1))
    assert [choice["index"] for choice in reply["choices"]] == list(range(6))
    alone = good(text(server, prompt=[5, 6], n=2, seed=1, temperature=1))
    assert [c["text"] for c in alone["choices"]] == [c["text"] for c in reply["choices"][4:]]


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_what_the_whole_reply_says(server, n):
    whole = good(chat(server, n=n, seed=2, temperature=1, logprobs=True))
    chunks = events(
        chat(
            server,
            n=n,
            seed=2,
            temperature=1,
            logprobs=True,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine][-1] == choice["finish_reason"]
        assert mine[0]["delta"]["role"] == "assistant"
        logprobs = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
    firsts = [c["taper"]["bits"] for c in chunks[:-1] if c["choices"][0]["index"] == 0]
    assert firsts[:-1] == whole["choices"][0]["taper"]["token_bits"]


def test_a_text_stream(server):
    whole = good(text(server, echo=True, logprobs=...))
    chunks = events(text(server, echo=True, stream=True))
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["taper"]["token_bits"] == whole["choices"][0]["taper"]["token_bits"]
    assert chunks[-1]["taper"]["bits"] == whole["taper"]["bits"]


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        (4, 4, 4),
        ({"min": 3, "max": 5}, 3, 5),
        ({"min": 3}, 3, math.inf),
        ("auto", 0, math.inf),
        (None, 0, math.inf),
    ],
)
def test_bits(server, given, low, high):
    for path in ROUTES:
        reply = good(post(server, path, bits=given))
        terms = server[1].terms[-1]
        assert (terms.min_bits, terms.max_bits) == (low, high)
        assert reply["taper"]["bits"] is not None


def test_max_loss_goes_through_the_card(server):
    """Loss of b bits in the fixture's card: 0.5 / b^2."""
    good(chat(server, max_loss=0.03125))
    assert server[1].terms[-1].min_bits == 4
    good(chat(server, max_loss=0.03))
    assert server[1].terms[-1].min_bits == 5
    refused(chat(server, max_loss=0.001), "max_loss")
    refused(chat(server, max_loss=0.03, bits={"max": 4}), "max_loss")


def test_deadline_priority_and_on_miss(server):
    reply = good(chat(server, deadline_ms=60_000, priority=3, on_miss="truncate"))
    terms = server[1].terms[-1]
    assert 59 < terms.deadline_s <= 60
    assert (terms.priority, terms.on_miss) == (3, "truncate")
    assert reply["taper"]["deadline_met"] is True


def test_audit(server):
    reply = good(chat(server, audit=True, bits=3))
    audit = reply["choices"][0]["taper"]["audit"]
    assert audit["bits"] == 8
    assert len(audit["kl"]) == 6
    assert audit["mean_kl"] > 0


def test_json_schema_holds_a_random_model(server):
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer"}},
        "required": ["size", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(3):
        reply = good(chat(server, response_format=form, max_tokens=200, temperature=0.5, seed=seed))
        if reply["choices"][0]["finish_reason"] == "stop":
            made = json.loads(reply["choices"][0]["message"]["content"])
            assert made["size"] in ("small", "large")
            assert isinstance(made["count"], int)
        else:
            assert reply["choices"][0]["message"]["content"].startswith('{"size": "')
    assert (
        good(chat(server, response_format={"type": "json_object"}))["choices"][0]["message"]["content"][0]
        == "{"
    )


LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"where": {"$ref": "#/$defs/place"}},
            "required": ["where"],
            "additionalProperties": False,
            "$defs": {"place": {"enum": ["here", "there"]}},
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_required_call_comes_from_a_random_model(server, choice):
    reply = good(chat(server, tools=[LOOK], tool_choice=choice, max_tokens=100))
    [made] = reply["choices"]
    assert made["finish_reason"] == "tool_calls"
    [call] = made["message"]["tool_calls"]
    assert call["function"]["name"] == "look"
    assert json.loads(call["function"]["arguments"])["where"] in ("here", "there")
    assert made["message"]["content"] is None
    chunks = events(chat(server, tools=[LOOK], tool_choice=choice, max_tokens=100, stream=True))
    streamed = [c["choices"][0]["delta"].get("tool_calls") for c in chunks]
    [[streamed_call]] = [calls for calls in streamed if calls]
    assert streamed_call["function"] == call["function"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_are_in_the_prompt_of_a_template_that_knows_none(server):
    conversation = [
        {"role": "system", "content": "Be short."},
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "look", "arguments": '{"where":"here"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a hat"},
    ]
    good(chat(server, messages=conversation, tools=[LOOK]))
    prompt = server[1].engine.tokenizer.decode(server[1].requests[-1].prompt)
    assert prompt.startswith("<|system|>Be short.\n\nYou may call these functions:")
    assert '"name": "look"' in prompt
    assert '{"name":"look","arguments":{"where":"here"}}' in prompt
    assert "Result of c1: a hat" in prompt
    good(chat(server, tools=[LOOK], tool_choice="none"))
    assert "look" not in server[1].engine.tokenizer.decode(server[1].requests[-1].prompt)


def test_a_response(server):
    reply = good(post(server, "/v1/responses", instructions="Be short."))
    plain = good(chat(server, messages=[{"role": "developer", "content": "Be short."}, *HELLO]))
    [item] = reply["output"]
    assert item["content"][0]["text"] == plain["choices"][0]["message"]["content"]
    assert reply["status"] == "incomplete"
    assert reply["usage"]["output_tokens"] == 6
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "a hat"},
    ]
    good(post(server, "/v1/responses", input=items))
    prompt = server[1].engine.tokenizer.decode(server[1].requests[-1].prompt)
    assert prompt.endswith("Result of a: a hat\n<|assistant|>")
    tool = {"type": "function", **LOOK["function"]}
    forced = good(post(server, "/v1/responses", tools=[tool], tool_choice="required", max_output_tokens=100))
    assert forced["output"][0]["type"] == "function_call"


# --- what is refused --------------------------------------------------------------------------------------


def test_no_field_outside_the_structs_is_accepted(server):
    for path in ROUTES:
        refused(post(server, path, surprise=1), "surprise")


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, fields in NEUTRAL.items() for name in fields], ids=str
)
def test_openais_other_fields_are_refused_by_name_unless_neutral(kind, name):
    bodies = {ChatRequest: CHAT, CompletionRequest: TEXT, ResponseRequest: RESPONSE}
    with pytest.raises(ApiError) as caught:
        decode(json.dumps({**bodies[kind], name: "surprise"}).encode(), kind)
    assert caught.value.param == name
    for value in (None, *NEUTRAL[kind][name]):
        decode(json.dumps({**bodies[kind], name: value}).encode(), kind)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"n": 10**30}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"3": 101}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"max_tokens": 10**6}, None),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"x": True}}, "stream_options.x"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"priority": 10**4}, "priority"),
        ({"bits": 9}, "bits"),
        ({"bits": 1}, "bits"),
        ({"bits": 3.5}, "bits"),
        ({"bits": {"min": 6, "max": 3}}, "bits"),
        ({"bits": {"mean": 6}}, "bits.mean"),
        ({"bits": "many"}, "bits"),
        ({"max_loss": -1}, "max_loss"),
        ({"on_miss": "explode"}, "on_miss"),
        ({"on_miss": "reject"}, "on_miss"),
        ({"model": ...}, "model"),
    ],
    ids=str,
)
def test_values_that_are_never_right(server, changes, param):
    for send in (chat, text):
        refused(send(server, **changes), param)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 3}, "max_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"tools": [LOOK, LOOK]}, "tools"),
        ({"tools": [LOOK], "response_format": {"type": "json_object"}}, "response_format"),
        (
            {"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "no"}}},
            "tool_choice",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "no"}},
                }
            },
            "response_format.json_schema.schema",
        ),
    ],
    ids=str,
)
def test_chats_that_are_never_right(server, changes, param):
    refused(chat(server, **changes), param)


def test_schemas_have_limits(server):
    deep: dict = {}
    for _ in range(40):
        deep = {"items": deep}
    for schema in (deep, {"enum": ["x" * 100] * 1000}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        refused(chat(server, response_format=form), "response_format.json_schema.schema")


def test_a_schema_that_grows_too_complex_is_the_clients_fault(server):
    """It compiles; llguidance's limit on a row of the parser is reached by the first token."""
    kinds = [{"type": "integer"}, {"type": "string", "maxLength": 9}]
    schema = {"type": "object", "properties": {f"p{i}": {"anyOf": kinds} for i in range(700)}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert "too complex" in refused(chat(server, response_format=form), None)["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x", 3]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": ["x"] * 64, "n": 8}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream"),
        ({"logprobs": 21}, "logprobs"),
    ],
    ids=str,
)
def test_texts_that_are_never_right(server, changes, param):
    refused(text(server, **changes), param)


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"role": "user"}, "input[0].content"),
        ({"role": "user", "content": "x", "output": "y"}, "input[0].output"),
        ({"type": "function_call_output", "call_id": "a"}, "input[0].output"),
        ({"type": "reasoning"}, "input[0].type"),
    ],
)
def test_items_that_are_never_right(server, item, param):
    refused(post(server, "/v1/responses", input=[item]), param)


def test_an_unknown_model(server):
    refused(chat(server, model="other"), "model", 404)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"nul",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "tiny\\ud800"}',
        b'{"a":1e999}',
    ],
)
def test_bodies_that_are_no_json_object(server, body):
    for path in ROUTES:
        response = server[0].post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_other_content_and_large_bodies(server):
    response = server[0].post("/v1/completions", content=b"a=1", headers={"content-type": "text/plain"})
    assert response.status_code == 415
    big = b'{"model": "' + b"x" * (8 << 20) + b'"}'
    response = server[0].post("/v1/completions", content=big, headers={"content-type": "application/json"})
    assert response.status_code == 413


def test_what_the_queue_refuses_has_a_status_and_a_time(server):
    loop = server[1]
    loop.refuse_late = ApiError(429, "too late", code="deadline_infeasible", retry_after_s=1.2)
    try:
        for stream in (False, True):
            response = chat(server, stream=stream)
            assert response.status_code == 429
            assert response.headers["retry-after"] == "2"
            assert response.json()["error"]["code"] == "deadline_infeasible"
    finally:
        loop.refuse_late = None
    assert 'taper:rejected_total{model_name="tiny",reason="deadline_infeasible"} 2.0' in metrics(server)


def metrics(server):
    return server[0].get("/metrics").text


def test_a_full_queue(server):
    loop = server[1]
    loop.max_waiting = 0
    try:
        response = chat(server)
    finally:
        loop.max_waiting = 64
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "queue_full"
    assert response.headers["retry-after"] == "1"


# --- the other routes -------------------------------------------------------------------------------------


def test_models_health_ready_metrics_monitor(server):
    client = server[0]
    [model] = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert model["taper"]["max_bits"] == 8
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/no").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").status_code == 200
    good(chat(server))
    found = metrics(server)
    for name in ("vllm:num_requests_running", "vllm:generation_tokens_total", "taper:precision_bits_bucket"):
        assert f"{name}{{" in found
    assert client.get("/monitor").json()["models"]["tiny"]["kv_blocks"] == 1


def test_the_description_is_of_the_structs(server):
    described = server[0].get("/openapi.json").json()
    fields = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert set(ChatRequest.__struct_fields__) <= set(fields)
    assert fields["store"] == {"enum": [None, False]}
    assert described["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    for path in ROUTES:
        assert "post" in described["paths"][path]


def test_errors_of_unknown_routes_have_openais_shape(server):
    for response in (server[0].get("/nothing"), server[0].get("/v1/completions")):
        assert response.status_code in (404, 405)
        assert response.json()["error"]["type"] == "invalid_request_error"
