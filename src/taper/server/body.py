"""From a body's bytes to a checked struct, or an error that names the field."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from taper.server import limits
from taper.server.errors import ApiError, invalid, unsupported
from taper.server.fields import NEUTRAL, Common

R = TypeVar("R", bound=Common)

# Strings whole, so that a bracket in one does not count; an unclosed one reaches the end. Possessive: linear
# in the body's length whatever it holds.
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?+|[\[{]|[\]}]', re.DOTALL)
_PATH = re.compile(r" - at `(?:key` in `)?\$\.?(.*)`$")
_FIELD = re.compile(r"field `([^`]*)`")


def decode(body: bytes, kind: type[R]) -> R:
    """Read and check a body.

    Raises:
        ApiError: 400, with the field's path where one is to blame.
    """
    content = read_object(body)
    for name, values in NEUTRAL[kind].items():
        # As JSON text: to Python 0 is False.
        texts = [msgspec.json.encode(value) for value in (None, *values)]
        if name in content and msgspec.json.encode(content.pop(name)) not in texts:
            accepted = b" or ".join(texts).decode()
            raise unsupported(name, f"this server does not support it; it must be left out, or {accepted}")
    try:
        return msgspec.convert(content, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise _named(str(error)) from error


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is. Raises ApiError 400."""
    check_depth(body, limits.MAX_JSON_DEPTH)
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError, ValueError) as error:
        raise invalid(None, f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise invalid(None, "the body must be a JSON object")
    return content


def check_depth(body: bytes, most: int) -> None:
    """Refuse brackets nested deeper than `most`, before any parser sees them. Raises ApiError 400."""
    depth = 0
    for found in _BRACKETS.finditer(body):
        byte = found[0][:1]
        if byte in b"[{":
            depth += 1
            if depth > most:
                raise invalid(None, f"the body nests deeper than {most} levels")
        elif byte in b"]}":
            depth -= 1


def _named(message: str) -> ApiError:
    """msgspec's message and the path in it, as a field name."""
    path, field = _PATH.search(message), _FIELD.search(message)
    text = message if path is None else message[: path.start()]
    parts = [path[1] if path else "", field[1] if field else ""]
    param = ".".join(part for part in parts if part) or None
    if text.startswith("Object contains unknown field"):
        return unsupported(param or "", "this server does not know it; leave it out")
    if text.startswith("Object missing required field"):
        return ApiError(400, f"{param}: it is required", param=param, code="missing_required_parameter")
    return invalid(param, f"{text[:1].lower()}{text[1:]}")
