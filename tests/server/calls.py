"""Requests to a server in this process, and what is expected of the replies."""

from __future__ import annotations

import json

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 0}
TEXT = {"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0}
RESPONSE = {"model": "tiny", "input": "hello", "max_output_tokens": 6, "temperature": 0}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT, "/v1/responses": RESPONSE}
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


def metrics(server):
    return server[0].get("/metrics").text
