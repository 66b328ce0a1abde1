"""POST /v1/chat/completions: messages through the model's template, tools, and output by a schema."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec
from anyio import to_thread

from taper.engine import Request, StepOutput
from taper.errors import TaperError
from taper.server.asking import check_count, request_of, sampling_of, terms_of
from taper.server.errors import from_taper, invalid
from taper.server.fields import (
    ChatRequest,
    Content,
    DeveloperMessage,
    ObjectFormat,
    SchemaFormat,
    ToolChoice,
    ToolMessage,
)
from taper.server.generation import Choice, Generation
from taper.server.replies import chat_logprobs, choice_object, new_id, taper_object, text_of, usage
from taper.server.serving import Ended, Served
from taper.server.streaming import DONE, event
from taper.server.tools import Call, CallFilter, call_schema, system_text


class ChatTask:
    """One request, checked and not yet submitted; `prepare` makes one.

    Args:
        served: the model.
        ask: the body.
        requests: for the engine, one a choice.
        arrived_s: on the monotonic clock.
    """

    def __init__(self, served: Served, ask: ChatRequest, requests: list[Request], arrived_s: float) -> None:
        self.served = served
        self._ask = ask
        self.id = new_id("chatcmpl")
        self.created = int(time.time())
        self._generation = Generation(served.loop, requests, terms_of(served, ask, arrived_s))

    @classmethod
    async def prepare(cls, served: Served, ask: ChatRequest, arrived_s: float) -> ChatTask:
        """Render the prompt and compile the schema, away from the event loop. Raises ApiError 400, 429."""
        _check(ask)
        count = ask.n or 1
        check_count(count)
        tools = [msgspec.to_builtins(tool) for tool in _tools(ask)]
        messages = plain_messages(ask, tools, served.llm.knows_tools)
        try:
            # Abandoned with the client; the template's own limit ends it.
            prompt = await to_thread.run_sync(
                served.llm.render_chat,
                messages,
                tools or None if served.llm.knows_tools else None,
                abandon_on_cancel=True,
            )
        except TaperError as error:
            raise from_taper(error) from error
        ids = served.encode(prompt, special_tokens=False)
        options: dict[str, Any] = {"max_tokens": ask.max_completion_tokens or ask.max_tokens}
        schema, param = _schema(ask)
        if schema is not None:
            options["constraint"] = await served.grammars.constraint(schema, param)
        top = (ask.top_logprobs or 0) if ask.logprobs else None
        requests = [
            request_of(served, ask, ids, sampling=sampling_of(ask, index, top), **options)
            for index in range(count)
        ]
        return cls(served, ask, requests, arrived_s)

    def filters(self) -> CallFilter | None:
        """A new filter that finds calls in an answer; None where there is nothing to call."""
        names = frozenset(tool.function.name for tool in _tools(self._ask))
        return CallFilter(names, self._ask.parallel_tool_calls is False) if names else None

    async def choices(self) -> list[Choice]:
        """Run to the end. Raises ApiError."""
        try:
            self._generation.start()
            return await self._generation.choices()
        finally:
            self._generation.cancel()

    async def events(self) -> AsyncIterator[tuple[int, StepOutput | Ended]]:
        """Run step by step. Raises ApiError."""
        try:
            self._generation.start()
            async for item in self._generation.events():
                yield item
        finally:
            self._generation.cancel()

    async def reply(self) -> dict[str, Any]:
        """The whole reply."""
        choices = await self.choices()
        ends = [choice.ended for choice in choices]
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage(ends),
            "taper": taper_object(ends),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "service_tier": "default",
        }

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text, calls = split_calls(self.filters(), text_of(choice))
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [call_object(call) for call in calls]}
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self.served, choice.steps) if self._ask.logprobs else None,
            "finish_reason": "tool_calls" if calls else choice.ended.finish_reason,
            "taper": choice_object(choice.ended),
        }

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; what is refused at the start raises ApiError at the first step."""
        filters = [self.filters() for _ in range(self._ask.n or 1)]
        ends: dict[int, Ended] = {}
        begun: set[int] = set()
        async for index, item in self.events():
            role = {} if index in begun else {"role": "assistant", "content": ""}
            begun.add(index)
            calls_of = filters[index]
            if not isinstance(item, Ended):
                text = item.text if calls_of is None else calls_of.feed(item.text)
                delta: dict[str, Any] = {**role, "content": text} if text or role else {}
                logprobs = chat_logprobs(self.served, [item]) if self._ask.logprobs else None
                yield event(self._chunk(index, delta, None, logprobs, {"bits": item.bits}))
                continue
            ends[index] = item
            rest, calls = ("", []) if calls_of is None else calls_of.finish()
            if rest:
                yield event(self._chunk(index, {**role, "content": rest}, None, None, None))
            if calls:
                delta = {**role, "tool_calls": [call_object(c, i) for i, c in enumerate(calls)]}
                yield event(self._chunk(index, delta, None, None, None))
            reason = "tool_calls" if calls else item.finish_reason
            own = {**taper_object([item]), **choice_object(item)}
            yield event(self._chunk(index, {}, reason, None, own))
        options = self._ask.stream_options
        if options is not None and options.include_usage:
            ordered = [ends[index] for index in sorted(ends)]
            yield event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(ordered)})
        yield DONE

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None,
        logprobs: dict[str, Any] | None,
        own: dict[str, Any] | None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice], "taper": own}


def split_calls(calls_of: CallFilter | None, text: str) -> tuple[str, list[Call]]:
    """Text and calls of a whole answer."""
    if calls_of is None:
        return text, []
    shown = calls_of.feed(text)
    rest, calls = calls_of.finish()
    return shown + rest, calls


def call_object(call: Call, index: int | None = None) -> dict[str, Any]:
    """A call as OpenAI writes it; with its index in a stream."""
    function = {"name": call.name, "arguments": call.arguments}
    where = {} if index is None else {"index": index}
    return {**where, "id": new_id("call"), "type": "function", "function": function}


def plain_messages(
    ask: ChatRequest, tools: Sequence[Mapping[str, Any]], knows_tools: bool
) -> list[dict[str, Any]]:
    """The messages as templates take them: contents are text, `developer` is `system`.

    For a template that knows no tools, they are told in a system message, and calls and results as text.
    """
    messages: list[dict[str, Any]] = []
    if tools and not knows_tools:
        messages.append({"role": "system", "content": system_text(tools)})
    for message in ask.messages:
        plain = {
            k: v for k, v in msgspec.to_builtins(message).items() if v is not None and k != "annotations"
        }
        plain["content"] = _text(message.content)
        if isinstance(message, DeveloperMessage):
            plain["role"] = "system"
        if isinstance(message, ToolMessage) and not knows_tools:
            plain = {"role": "user", "content": f"Result of {message.tool_call_id}: {plain['content']}"}
        if "tool_calls" in plain:
            plain = _with_calls(plain, knows_tools)
        messages.append(plain)
    if len(messages) > 1 and tools and not knows_tools and messages[1]["role"] == "system":
        first, second = messages[:2]  # templates refuse two system messages
        messages[:2] = [{**second, "content": f"{second['content']}\n\n{first['content']}"}]
    return messages


def _with_calls(message: dict[str, Any], knows_tools: bool) -> dict[str, Any]:
    """An earlier answer's calls with their arguments as objects, which templates write as JSON."""
    calls = message["tool_calls"]
    for index, call in enumerate(calls):
        try:
            call["function"]["arguments"] = msgspec.json.decode(call["function"]["arguments"])
        except (msgspec.DecodeError, ValueError) as error:
            raise invalid("messages", f"the arguments of tool call {index} are not JSON: {error}") from error
    if knows_tools:
        return message
    texts = [msgspec.json.encode(call["function"]).decode() for call in calls]
    return {"role": "assistant", "content": "\n".join([message["content"], *texts]).strip()}


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _tools(ask: ChatRequest) -> list[Any]:
    """Tools that may be called in the answer."""
    return [] if ask.tool_choice == "none" else list(ask.tools or [])


def _schema(ask: ChatRequest) -> tuple[dict[str, Any] | None, str]:
    """The JSON schema that the output must keep to, and the field that asks for it."""
    choice = ask.tool_choice
    if choice == "required" or isinstance(choice, ToolChoice):
        wanted = choice.function.name if isinstance(choice, ToolChoice) else None
        functions = [
            (tool.function.name, tool.function.parameters)
            for tool in ask.tools or []
            if wanted in (None, tool.function.name)
        ]
        if not functions:
            raise invalid("tool_choice", "it names no function of tools")
        return call_schema(functions), "tools"
    form = ask.response_format
    if isinstance(form, SchemaFormat):
        return form.json_schema.schema or {"type": "object"}, "response_format.json_schema.schema"
    return ({"type": "object"}, "response_format") if isinstance(form, ObjectFormat) else (None, "")


def _check(ask: ChatRequest) -> None:
    """Refuse fields that contradict each other. Raises ApiError 400."""
    if ask.max_tokens is not None and ask.max_completion_tokens is not None:
        raise invalid("max_tokens", "give it or max_completion_tokens, not both")
    if ask.top_logprobs is not None and not ask.logprobs:
        raise invalid("top_logprobs", "it needs logprobs: true")
    if ask.stream_options is not None and not ask.stream:
        raise invalid("stream_options", "it needs stream: true")
    if ask.tool_choice not in (None, "none", "auto") and not ask.tools:
        raise invalid("tool_choice", "it needs tools")
    if ask.parallel_tool_calls is not None and not ask.tools:
        raise invalid("parallel_tool_calls", "it needs tools")
    names = [tool.function.name for tool in ask.tools or []]
    if len(set(names)) < len(names):
        raise invalid("tools", "two functions have one name")
    if ask.tools and isinstance(ask.response_format, (ObjectFormat, SchemaFormat)):
        raise invalid("response_format", "an answer that may be a call cannot keep to a schema, too")
