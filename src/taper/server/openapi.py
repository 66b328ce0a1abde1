"""The OpenAPI description, made from the structs that check the bodies."""

from __future__ import annotations

from typing import Any

import msgspec

from taper import __version__
from taper.server.fields import NEUTRAL, ChatRequest, Common, CompletionRequest, ResponseRequest

_POSTS: dict[str, tuple[type[Common], str]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a chat"),
    "/v1/completions": (CompletionRequest, "Continue a prompt"),
    "/v1/responses": (ResponseRequest, "Answer a conversation, nothing stored"),
}
_GETS = {
    "/v1/models": "The models and the bits that they hold",
    "/health": "200 while the process lives",
    "/ready": "200 while requests are taken, else 503",
    "/metrics": "Prometheus metrics, as text",
    "/monitor": "Queue, batch, bits and memory now",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def description() -> dict[str, Any]:
    """OpenAPI 3.1 of this server."""
    kinds = [kind for kind, _ in _POSTS.values()]
    _, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for kind, fields in NEUTRAL.items():
        components[kind.__name__]["properties"].update(
            {name: {"enum": [None, *values]} for name, values in fields.items()}
        )
    paths: dict[str, Any] = {
        path: {"post": _post(kind.__name__, text)} for path, (kind, text) in _POSTS.items()
    }
    paths |= {path: {"get": _get(path, text)} for path, text in _GETS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Taper", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _post(name: str, text: str) -> dict[str, Any]:
    reply = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
    body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {
        "summary": text,
        "security": [{"key": []}, {}],
        "requestBody": {"required": True, "content": body},
        "responses": {"200": {"description": "The reply", "content": reply}, **_errors()},
    }


def _get(path: str, text: str) -> dict[str, Any]:
    kind = "text/plain" if path == "/metrics" else "application/json"
    return {
        "summary": text,
        "responses": {"200": {"description": text, "content": {kind: {}}}, **_errors()},
    }


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    texts = {
        "400": "A field is wrong or not supported; it is named",
        "401": "No key, or a wrong one",
        "403": "Host or origin that is not allowed",
        "404": "No such model or route",
        "408": "The body came too slowly",
        "413": "The body is too large",
        "415": "Not JSON",
        "429": "Refused for now; see Retry-After",
        "500": "The model failed",
        "503": "Not ready",
    }
    return {status: {"description": text, "content": content} for status, text in texts.items()}
