"""The requests' fields as structs: types, ranges, names. What is not here is refused by name.

A field that is here is honoured. OpenAI's own fields that would change nothing at some value, such as
`store: false`, are in `NEUTRAL`: that value is accepted, any other is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from taper.server import limits

Text = Annotated[str, Meta(max_length=limits.MAX_BODY_BYTES)]
Unit = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=1, le=1 << 31)]
Bits = Annotated[float, Meta(gt=0, le=64)]
StopText = Annotated[str, Meta(min_length=1, max_length=limits.MAX_STOP_CHARS)]
TopLogprobs = Annotated[int, Meta(ge=0, le=limits.MAX_TOP_LOGPROBS)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
TokenName = Annotated[str, Meta(pattern="^[0-9]{1,9}$")]
Bias = Annotated[dict[TokenName, float], Meta(max_length=limits.MAX_LOGIT_BIAS)]
JsonObject = dict[str, Any]


class Fields(Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of every object in a request."""


class BitsRange(Fields, kw_only=True):
    """Bounds on the bits of an answer's passes; the server chooses within them."""

    min: Bits | None = None
    max: Bits | None = None


class StreamOptions(Fields, kw_only=True):
    """`include_usage`: one more event with the counts before the end."""

    include_usage: bool | None = None


class Common(Fields, kw_only=True):
    """What every kind of request may say.

    `deadline_ms` counts from the arrival to the last token; `priority`: larger is served first; `bits`: a
    number, bounds, or "auto"; `max_loss`: perplexity over the float model's as a share, by the file's
    quality card; `on_miss`: what happens to a request that cannot make its deadline; `audit`: read the answer
    again at full width and report what its bits have cost.
    """

    model: str
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stream: bool | None = None
    deadline_ms: Annotated[float, Meta(gt=0, le=limits.MAX_DEADLINE_MS)] | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None
    bits: Bits | BitsRange | Literal["auto"] | None = None
    max_loss: Annotated[float, Meta(ge=0, le=1000)] | None = None
    on_miss: Literal["lower_bits", "truncate", "reject"] | None = None
    audit: bool | None = None


class Sampled(Common, kw_only=True):
    """Sampling as chat and completions share it; top_k, min_p and repetition_penalty are vLLM's."""

    n: Annotated[int, Meta(ge=1, le=limits.MAX_N)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=limits.MAX_STOPS)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    min_p: Unit | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None


class TextPart(Fields, tag="text", kw_only=True):
    """A piece of a message; pictures and sound are refused."""

    text: Text


Content = Text | list[TextPart]


class SystemMessage(Fields, tag_field="role", tag="system", kw_only=True):
    """What the model is told."""

    content: Content
    name: str | None = None


class DeveloperMessage(Fields, tag_field="role", tag="developer", kw_only=True):
    """OpenAI's newer name of `system`; given to the template as that."""

    content: Content
    name: str | None = None


class UserMessage(Fields, tag_field="role", tag="user", kw_only=True):
    """What the user says."""

    content: Content
    name: str | None = None


class CalledFunction(Fields, kw_only=True):
    """`arguments` is JSON as text."""

    name: Name
    arguments: Text


class ToolCall(Fields, tag="function", kw_only=True):
    """A call in an earlier answer."""

    id: str
    function: CalledFunction


class AssistantMessage(Fields, tag_field="role", tag="assistant", kw_only=True):
    """An earlier answer; the fields that the official client repeats from a reply may be null or empty."""

    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=limits.MAX_TOOLS)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[JsonObject], Meta(max_length=0)] | None = None


class ToolMessage(Fields, tag_field="role", tag="tool", kw_only=True):
    """What a called function gave back."""

    content: Content
    tool_call_id: str


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class Function(Fields, kw_only=True):
    """A function that may be called; `parameters` is a JSON schema of an object."""

    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Fields, tag="function", kw_only=True):
    """A tool; only functions are known."""

    function: Function


class FunctionName(Fields, kw_only=True):
    """The function that must be called."""

    name: Name


class ToolChoice(Fields, tag="function", kw_only=True):
    """The tool that must be called."""

    function: FunctionName


class PlainFormat(Fields, tag="text", kw_only=True):
    """Any text."""


class ObjectFormat(Fields, tag="json_object", kw_only=True):
    """Some JSON object."""


class JsonSchema(Fields, kw_only=True):
    """A schema; the output always keeps to it, strict or not."""

    name: Name
    schema: JsonObject | None = None
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(Fields, tag="json_schema", kw_only=True):
    """JSON by a schema."""

    json_schema: JsonSchema


class ChatRequest(Sampled, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=limits.MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: PlainFormat | ObjectFormat | SchemaFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=limits.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(Sampled, kw_only=True):
    """Body of POST /v1/completions; a prompt is text, token ids, or a list of either."""

    prompt: Text | list[Text | int | list[int]]
    max_tokens: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    logprobs: TopLogprobs | None = None
    echo: bool | None = None


class FlatTool(Fields, tag="function", kw_only=True):
    """A function as /v1/responses writes it."""

    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class FlatToolChoice(Fields, tag="function", kw_only=True):
    """The function that must be called."""

    name: Name


class FlatSchemaFormat(Fields, tag="json_schema", kw_only=True):
    """JSON by a schema, as /v1/responses writes it."""

    name: Name
    schema: JsonObject
    description: str | None = None
    strict: bool | None = None


class TextOptions(Fields, kw_only=True):
    """The output's form."""

    format: PlainFormat | ObjectFormat | FlatSchemaFormat | None = None


class InputText(Fields, tag="input_text", kw_only=True):
    """A piece of the input."""

    text: Text


class OutputText(Fields, tag="output_text", kw_only=True):
    """A piece of an earlier output, as the server wrote it."""

    text: Text
    annotations: Annotated[list[JsonObject], Meta(max_length=0)] | None = None
    logprobs: Annotated[list[JsonObject], Meta(max_length=0)] | None = None


class InputItem(Fields, kw_only=True):
    """A message of the input, an earlier output included, or a call (`function_call`) and its result."""

    type: Literal["message", "function_call", "function_call_output"] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | list[InputText | OutputText] | None = None
    id: str | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None
    call_id: str | None = None
    name: Name | None = None
    arguments: Text | None = None
    output: Text | None = None


class ResponseRequest(Common, kw_only=True):
    """Body of POST /v1/responses; nothing is stored, so the whole conversation comes with each request."""

    input: Text | Annotated[list[InputItem], Meta(min_length=1, max_length=limits.MAX_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Meta(max_length=limits.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatToolChoice | None = None
    parallel_tool_calls: bool | None = None


# OpenAI's fields that this server does not act on, and the values (null beside them) at which that makes no
# difference.
NEUTRAL: dict[type[Common], dict[str, tuple[Any, ...]]] = {
    ChatRequest: {
        "store": (False,),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "metadata": ({},),
        "functions": ([],),
        "function_call": ("none",),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "user": (),
        "safety_identifier": (),
        "prompt_cache_key": (),
        "prompt_cache_retention": (),
        "moderation": (),
    },
    CompletionRequest: {"best_of": (1,), "suffix": ("",), "user": ()},
    ResponseRequest: {
        "store": (False,),
        "background": (False,),
        "truncation": ("disabled",),
        "service_tier": ("auto", "default"),
        "metadata": ({},),
        "include": ([],),
        "top_logprobs": (0,),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "reasoning": (),
        "max_tool_calls": (),
        "stream_options": (),
        "user": (),
        "safety_identifier": (),
        "prompt_cache_key": (),
        "prompt_cache_retention": (),
        "context_management": (),
        "moderation": (),
    },
}
