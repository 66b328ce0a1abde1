"""What cannot be honoured is refused by name."""

from __future__ import annotations

import json

import pytest
from calls import CHAT, LOOK, RESPONSE, ROUTES, TEXT, chat, metrics, post, refused, text

from taper.server.body import decode
from taper.server.errors import ApiError
from taper.server.fields import NEUTRAL, ChatRequest, CompletionRequest, ResponseRequest


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
