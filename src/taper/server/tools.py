"""Function calls: what the prompt says of them, and how they are found in an answer.

Three spellings are read, those of the common open models: `<tool_call>{...}</tool_call>` (Hermes, Qwen),
`[TOOL_CALLS][{...}]` (Mistral), and an answer that is one JSON object with `name` and `arguments` or
`parameters` (Llama 3, and what this server asks of a model whose template knows no tools).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MISTRAL = "[TOOL_CALLS]"


@dataclass(frozen=True, slots=True)
class Call:
    """A call in an answer; `arguments` is JSON as text."""

    name: str
    arguments: str


def system_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a model is told whose chat template does not write tools into the prompt."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        "You may call these functions:\n"
        f"{functions}\n"
        'To call one, answer with nothing but JSON: {"name": "...", "arguments": {...}}'
    )


def call_schema(functions: Sequence[tuple[str, Mapping[str, Any] | None]]) -> dict[str, Any]:
    """The JSON schema of one call of any of the functions, given as (name, schema of the parameters)."""
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    "arguments": _moved(
                        parameters or {"type": "object"}, f"#/anyOf/{i}/properties/arguments"
                    ),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for i, (name, parameters) in enumerate(functions)
        ]
    }


def _moved(schema: Any, root: str) -> Any:
    """A schema with its references to itself (`#/$defs/...`) moved to where it lies now."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved


class CallFilter:
    """Passes text on, except what is or could become a call; the calls come at the end.

    Args:
        names: functions that may be called; JSON with any other name is text.
        single: keep the first call alone (`parallel_tool_calls: false`).
    """

    def __init__(self, names: frozenset[str], single: bool = False) -> None:
        self._names = names
        self._single = single
        self._held = ""
        self._began = False  # text that is no call was shown, so a bare { is text

    def feed(self, piece: str) -> str:
        """Take text and return what may be shown."""
        text = self._held + piece
        start = self._call_start(text)
        shown, self._held = text[:start], text[start:]
        self._began = self._began or bool(shown.strip())
        return shown

    def finish(self) -> tuple[str, list[Call]]:
        """What was held and is no call, and the calls."""
        held, self._held = self._held, ""
        calls = self._calls(held.strip())
        if not calls:
            return held, []
        return "", calls[:1] if self._single else calls

    def _call_start(self, text: str) -> int:
        """Where a call begins, or an end of the text that could begin one."""
        bare = text.lstrip()
        if not self._began and (not bare or bare[0] == "{"):
            return 0
        found = [text.index(mark) for mark in (OPEN, MISTRAL) if mark in text]
        if found:
            return min(found)
        for length in range(min(len(text), len(MISTRAL) - 1), 0, -1):
            if any(mark.startswith(text[-length:]) for mark in (OPEN, MISTRAL)):
                return len(text) - length
        return len(text)

    def _calls(self, text: str) -> list[Call]:
        if text.startswith(MISTRAL):
            found = _json(text.removeprefix(MISTRAL))
            items = found if isinstance(found, list) else [found]
        elif text.startswith(OPEN):
            items = [_json(part.split(CLOSE)[0]) for part in text.split(OPEN)[1:]]
        else:
            items = [_json(text)]
        calls = [self._call(item) for item in items]
        # One piece that is no call makes all of it text: nothing that the model said is lost.
        return [call for call in calls if call] if all(calls) else []

    def _call(self, item: Any) -> Call | None:
        if not isinstance(item, dict) or item.get("name") not in self._names:
            return None
        arguments = item.get("arguments", item.get("parameters", {}))
        if isinstance(arguments, str):
            return Call(item["name"], arguments)
        return Call(item["name"], json.dumps(arguments, ensure_ascii=False))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
