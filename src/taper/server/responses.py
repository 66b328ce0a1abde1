"""POST /v1/responses: OpenAI's newer shape of a chat, without stored state; runs as a chat."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from taper.server import fields as f
from taper.server.chat import ChatTask, split_calls
from taper.server.errors import invalid
from taper.server.replies import choice_object, new_id, taper_object, text_of, usage
from taper.server.serving import Ended, Served
from taper.server.streaming import event
from taper.server.tools import Call

_SAME = (
    "model", "temperature", "top_p", "stream", "deadline_ms", "priority", "bits", "max_loss", "on_miss",
    "audit", "parallel_tool_calls",
)  # fmt: skip


def as_chat(ask: f.ResponseRequest) -> f.ChatRequest:
    """The chat that a response is. Raises ApiError 400 for items that are none of a conversation's."""
    messages: list[f.Message] = []
    if ask.instructions:
        messages.append(f.SystemMessage(content=ask.instructions))
    if isinstance(ask.input, str):
        messages.append(f.UserMessage(content=ask.input))
    else:
        messages += [_message(item, f"input[{i}]") for i, item in enumerate(ask.input)]
    tools = [
        f.Tool(function=f.Function(name=t.name, description=t.description, parameters=t.parameters))
        for t in ask.tools or []
    ]
    choice = ask.tool_choice
    form = ask.text.format if ask.text else None
    return f.ChatRequest(
        messages=messages,
        max_completion_tokens=ask.max_output_tokens,
        tools=tools or None,
        tool_choice=f.ToolChoice(function=f.FunctionName(name=choice.name))
        if isinstance(choice, f.FlatToolChoice)
        else choice,
        response_format=f.SchemaFormat(json_schema=f.JsonSchema(name=form.name, schema=form.schema))
        if isinstance(form, f.FlatSchemaFormat)
        else form,
        **{name: getattr(ask, name) for name in _SAME},
    )


def _message(item: f.InputItem, path: str) -> f.Message:
    """A message of the chat. Raises ApiError 400 for an item with a field too few or too many."""
    kind = item.type or "message"
    needed = {
        "message": {"role", "content"},
        "function_call": {"call_id", "name", "arguments"},
        "function_call_output": {"call_id", "output"},
    }[kind]
    given = {name for name in item.__struct_fields__ if getattr(item, name) is not None}
    for name in sorted(needed - given):
        raise invalid(f"{path}.{name}", f"an item of type {kind} needs it")
    for name in sorted(given - needed - {"type", "id", "status"}):
        raise invalid(f"{path}.{name}", f"an item of type {kind} has no such field")
    if kind == "function_call":
        function = f.CalledFunction(name=item.name or "", arguments=item.arguments or "")
        return f.AssistantMessage(tool_calls=[f.ToolCall(id=item.call_id or "", function=function)])
    if kind == "function_call_output":
        return f.ToolMessage(content=item.output or "", tool_call_id=item.call_id or "")
    content = item.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or [])
    makers: dict[str, Callable[..., f.Message]] = {
        "system": f.SystemMessage,
        "developer": f.DeveloperMessage,
        "user": f.UserMessage,
        "assistant": f.AssistantMessage,
    }
    return makers[item.role or "user"](content=text)


class ResponseTask:
    """One request, checked and not yet submitted; `prepare` makes one."""

    def __init__(self, ask: f.ResponseRequest, chat: ChatTask) -> None:
        self._ask = ask
        self._chat = chat
        self._id = new_id("resp")
        self._item_id = new_id("msg")
        self._created = int(time.time())

    @classmethod
    async def prepare(cls, served: Served, ask: f.ResponseRequest, arrived_s: float) -> ResponseTask:
        """As `ChatTask.prepare`. Raises ApiError."""
        return cls(ask, await ChatTask.prepare(served, as_chat(ask), arrived_s))

    async def reply(self) -> dict[str, Any]:
        """The whole reply. Raises ApiError."""
        [choice] = await self._chat.choices()
        text, calls = split_calls(self._chat.filters(), text_of(choice))
        return self._response(self._output(text, calls), choice.ended)

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events under their names; each has its number."""
        number = 0
        calls_of = self._chat.filters()
        text = ""
        began = False

        def named(kind: str, **content: Any) -> bytes:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number - 1, **content}, kind)

        where = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        async for _, item in self._chat.events():
            if not began:
                began = True
                yield named("response.created", response=self._response([], None))
                yield named("response.in_progress", response=self._response([], None))
                yield named(
                    "response.output_item.added", output_index=0, item=self._text_item("", "in_progress")
                )
                yield named("response.content_part.added", **where, part=_part(""))
            if isinstance(item, Ended):
                rest, calls = ("", []) if calls_of is None else calls_of.finish()
                text += rest
                if rest:
                    yield named("response.output_text.delta", **where, delta=rest, logprobs=[])
                yield named("response.output_text.done", **where, text=text, logprobs=[])
                yield named("response.content_part.done", **where, part=_part(text))
                message = self._text_item(text, "completed")
                yield named("response.output_item.done", output_index=0, item=message)
                made = [_call_item(call) for call in calls]
                for index, call in enumerate(made, start=1):
                    pending = {**call, "arguments": "", "status": "in_progress"}
                    at = {"item_id": call["id"], "output_index": index}
                    yield named("response.output_item.added", output_index=index, item=pending)
                    yield named("response.function_call_arguments.delta", **at, delta=call["arguments"])
                    yield named(
                        "response.function_call_arguments.done",
                        **at,
                        arguments=call["arguments"],
                        name=call["name"],
                    )
                    yield named("response.output_item.done", output_index=index, item=call)
                done = self._response([message, *made], item)
                yield named(f"response.{done['status']}", response=done)
                continue
            shown = item.text if calls_of is None else calls_of.feed(item.text)
            text += shown
            if shown:
                yield named(
                    "response.output_text.delta", **where, delta=shown, logprobs=[], taper={"bits": item.bits}
                )

    def _output(self, text: str, calls: list[Call]) -> list[dict[str, Any]]:
        messages = [self._text_item(text, "completed")] if text or not calls else []
        return [*messages, *(_call_item(call) for call in calls)]

    def _text_item(self, text: str, status: str) -> dict[str, Any]:
        content = [_part(text)] if status == "completed" else []
        return {
            "type": "message",
            "id": self._item_id,
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _response(self, output: list[dict[str, Any]], end: Ended | None) -> dict[str, Any]:
        ask = self._ask
        is_cut = end is not None and end.finish_reason == "length"
        status = "in_progress" if end is None else "incomplete" if is_cut else "completed"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": ask.instructions,
            "max_output_tokens": ask.max_output_tokens,
            "model": self._chat.served.name,
            "output": output,
            "parallel_tool_calls": ask.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if ask.temperature is None else ask.temperature,
            "top_p": 1.0 if ask.top_p is None else ask.top_p,
            "text": {"format": {"type": "text"}} if ask.text is None else ask.text,
            "tool_choice": ask.tool_choice or "auto",
            "tools": ask.tools or [],
            "truncation": "disabled",
            "usage": None if end is None else _usage(end),
            "metadata": {},
            "taper": None if end is None else {**taper_object([end]), **choice_object(end)},
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: Call) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": new_id("fc"),
        "call_id": new_id("call"),
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _usage(end: Ended) -> dict[str, Any]:
    counts = usage([end])
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": counts["prompt_tokens_details"],
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts["total_tokens"],
    }
