"""`taper run`: continue a prompt or chat, token by token, and say what each token cost."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from taper.cli.answer import closing_line, show
from taper.cli.damage import report_audit
from taper.cli.options import MEMORY_BUDGET, json_option, kv_option, model_path, set_threads, threads_option
from taper.cli.terminal import note, waiting_line
from taper.errors import DoesNotFitError, ModelNotFoundError, UsageError

if TYPE_CHECKING:
    from taper.engine import LLM, Completion, TokenStream

# Tokens of an answer when nobody says otherwise, where the context has room for them.
DEFAULT_MAX_TOKENS = 256
_MODEL_SUFFIXES = (".taper", ".gguf", ".safetensors", ".bin")
# llama.cpp's defaults: greedy decoding lets small models repeat themselves.
_SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the command line asks of every answer."""

    policy: str | None
    max_tokens: int | None
    ctx_size: int | None
    stop: tuple[str, ...]
    show_bits: bool
    sampling: dict[str, Any]
    refresh: bool = False
    allow_lower_bits: bool = False
    audit: bool = False


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each field of SamplingParams that a command line can say; ranges are checked there."""
    for name, kind, default, text in reversed(
        (
            ("temperature", float, _SAMPLING["temperature"], "0 takes the likeliest token."),
            ("top-k", int, _SAMPLING["top_k"], "Keep the N likeliest tokens; 0: all."),
            ("top-p", float, _SAMPLING["top_p"], "Keep the likeliest tokens until their share reaches N."),
            ("min-p", float, _SAMPLING["min_p"], "Keep tokens at least N times as likely as the likeliest."),
            ("repetition-penalty", float, 1.0, "Divides the logits of tokens seen before."),
            ("presence-penalty", float, 0.0, "Subtracted from tokens of the answer."),
            ("frequency-penalty", float, 0.0, "Subtracted for each time a token is in the answer."),
            ("seed", int, None, "Of the draws; default: a fresh one."),
        )
    ):
        option = click.option(
            f"--{name}", type=kind, default=default, show_default=default is not None, metavar="N", help=text
        )
        function = option(function)
    return function


@click.command("run")
@click.argument("arguments", nargs=-1, metavar="[MODEL] [PROMPT]")
@click.option(
    "--policy",
    metavar="POLICY",
    help="fixed:B, exact[:B[/D]], phase:P/D, progressive[:B@0,B@N,...], learned, or a name in the file.",
)
@click.option(
    "--bits", type=float, metavar="B", help="Short for --policy fixed:B; 3.3 is a mean over the weights."
)
@click.option(
    "--max-tokens", type=int, metavar="N", help=f"Longest answer; default: {DEFAULT_MAX_TOKENS} or what fits."
)
@click.option(
    "--ctx-size",
    type=click.IntRange(2),
    metavar="N",
    help="Prompt and answer together; default: the model's.",
)
@sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; repeatable.")
@click.option("--show-bits", is_flag=True, help="Colour every token by the bits it was decoded with.")
@click.option(
    "--progressive-load/--no-progressive-load",
    "progressive_load",
    default=None,
    help="Answer when the first planes are read; default: without policy, bits, seed, json, audit.",
)
@click.option(
    "--refresh", is_flag=True, help="Read the prompt again once the planes that were missing have arrived."
)
@click.option(
    "--memory-budget",
    type=MEMORY_BUDGET,
    help="For weights and KV cache: fewer bits where they do not fit; auto: by the system's pressure.",
)
@click.option(
    "--audit",
    is_flag=True,
    help="Read the answer again at all bits: what did fewer cost? With --show-bits, by token.",
)
@kv_option
@threads_option
@json_option
def command(
    arguments: tuple[str, ...],
    policy: str | None,
    bits: float | None,
    max_tokens: int | None,
    ctx_size: int | None,
    stop: tuple[str, ...],
    show_bits: bool,
    progressive_load: bool | None,
    refresh: bool,
    memory_budget: int | Literal["auto"] | None,
    audit: bool,
    kv: str | None,
    threads: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT with MODEL, a .taper file or a Hugging Face folder.

    Without MODEL the model in the package answers. A single argument is MODEL when such a file or folder
    exists or when it looks like a path (no spaces, and a slash or an ending such as .taper), else it is
    PROMPT. Without PROMPT, standard input is the prompt; at a terminal a chat begins.
    """
    if len(arguments) > 2:
        raise UsageError(
            f"{len(arguments)} arguments; at most MODEL and PROMPT", hint="put the prompt in quotes"
        )
    model, prompt = split_arguments(arguments)
    prompt = _piped_prompt() if prompt is None else prompt
    if prompt is None and as_json:
        raise UsageError("--json needs a prompt", hint='give one: taper run MODEL "PROMPT" --json')
    asked = _asked_policy(policy, bits)
    set_threads(threads)
    if progressive_load is None:
        # What is given a policy or a seed, or read by a program, must not depend on the speed of a disk; an
        # audit compares with all the bits that are there.
        progressive_load = asked is None and sampling["seed"] is None and not (as_json or audit)
    llm = _load(model, progressive_load, memory_budget, kv)
    options = RunOptions(
        asked,
        max_tokens,
        ctx_size,
        stop,
        show_bits,
        sampling,
        refresh=refresh,
        allow_lower_bits=memory_budget is not None,
        audit=audit,
    )
    try:
        _answer(llm, options, prompt, as_json)
        note(None if llm.arrival is None else llm.arrival.problem)
    finally:
        llm.close()


def split_arguments(arguments: tuple[str, ...]) -> tuple[str | None, str | None]:
    """MODEL and PROMPT; a single argument is one of them.

    Raises:
        ModelNotFoundError: a single argument that looks like a path, and nothing is there.
    """
    if len(arguments) != 1:
        return (arguments[0], arguments[1]) if arguments else (None, None)
    only = arguments[0]
    if _exists(only) or _exists(only + ".part"):
        return only, None
    has_ending = only.lower().endswith(_MODEL_SUFFIXES)
    if not any(c.isspace() for c in only) and ("/" in only or "\\" in only or has_ending):
        raise ModelNotFoundError(
            f"no such file: {only}", hint="check the path; to use it as a prompt, give it on standard input"
        )
    return None, only


def complete(
    llm: LLM, options: RunOptions, prompt: str, use: Callable[[TokenStream], None], is_chat: bool = False
) -> Completion:
    """Answer a prompt; `use` receives the stream and takes its tokens.

    Args:
        llm: the model.
        options: of the command line.
        prompt: text; already rendered for a chat.
        use: shows the tokens as they come; what it leaves is generated in silence.
        is_chat: the template has written the special tokens.
    """
    ids = _encode(llm, prompt, is_chat)
    stream = llm.stream(
        ids,
        policy=options.policy,
        max_tokens=_max_tokens(llm, options, len(ids)),
        stop=options.stop,
        refresh=options.refresh,
        allow_lower_bits=options.allow_lower_bits,
        audit=options.audit,
        **options.sampling,
    )
    with stream:
        use(stream)
        for _ in stream:
            pass
        return stream.completion()


def as_record(completion: Completion) -> dict[str, Any]:
    """What `taper run --json` prints: the text, every token with its bits, the figures."""
    return {
        "policy": completion.policy,
        "seed": completion.seed,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "prompt_ids": list(completion.prompt_ids),
        "tokens": [
            {"id": token, "bits": bits}
            for token, bits in zip(completion.token_ids, completion.bits, strict=True)
        ],
        "ceilings": [{"token": token, "bits": bits} for token, bits in completion.ceilings],
        "refreshes": [{"token": token, "bits": bits} for token, bits in completion.refreshes],
        "usage": dataclasses.asdict(completion.usage),
        "audit": None if completion.audit is None else completion.audit.as_record(),
    }


def _asked_policy(policy: str | None, bits: float | None) -> str | None:
    """The text of --policy or --bits, which exclude each other."""
    if policy is not None and bits is not None:
        raise UsageError(
            "--policy and --bits exclude each other", hint=f"--bits {bits:g} is --policy fixed:{bits:g}"
        )
    return policy if bits is None else f"fixed:{bits:.9g}"


def _load(
    model: str | None, progressive: bool, memory_budget: int | Literal["auto"] | None, kv: str | None
) -> LLM:
    """Load the model, and say on a terminal what is being waited for."""
    from taper.engine import load

    with waiting_line("waiting for the first planes") as update:
        llm = load(
            model_path(model), progressive=progressive, memory_budget=memory_budget, waiting=update, kv=kv
        )
    note(llm.notice)
    return llm


def _answer(llm: LLM, options: RunOptions, prompt: str | None, as_json: bool) -> None:
    """Chat, or one answer as text or as JSON."""
    if prompt is None:
        from taper.cli.chat import chat

        chat(llm, options)
    elif as_json:
        click.echo(json.dumps(as_record(complete(llm, options, prompt, lambda stream: None))))
    else:
        completion = complete(llm, options, prompt, lambda stream: show(stream, options.show_bits, prompt))
        click.echo(closing_line(completion), err=True)
        report_audit(completion, llm.tokenizer, options.show_bits)


def _exists(text: str) -> bool:
    """Whether it names something; a prompt may be too long for a name, or hold what no name can."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def _piped_prompt() -> str | None:
    """Standard input unless it is a terminal; the line end that `echo` adds is no part of the prompt."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 at byte {error.start}", hint="convert the prompt to UTF-8"
        ) from error


def _encode(llm: LLM, prompt: str, is_chat: bool) -> list[int]:
    if llm.tokenizer is None:
        raise UsageError(
            "the model holds no tokenizer, so it cannot read text", hint="add one when quantising"
        )
    if not prompt:
        raise UsageError(
            "the prompt is empty; it needs at least one token", hint="write some text to continue"
        )
    return llm.tokenizer.encode(prompt, special_tokens=not is_chat)


def _max_tokens(llm: LLM, options: RunOptions, num_prompt: int) -> int:
    """The limit on new tokens; what was asked for is refused, never shortened, where it does not fit."""
    longest = llm.engine.model.context_length
    context = longest if options.ctx_size is None else options.ctx_size
    if context > longest:
        raise DoesNotFitError(
            f"--ctx-size {context} is beyond the model's context of {longest}",
            hint=f"ask for at most {longest}",
        )
    left = context - num_prompt
    if left < 1 or (options.max_tokens is not None and options.max_tokens > left):
        wanted = 1 if options.max_tokens is None else options.max_tokens
        raise DoesNotFitError(
            f"{num_prompt} prompt and {wanted} new tokens exceed the context of {context}",
            hint=f"ask for at most {left} new tokens"
            if left > 0
            else f"shorten the prompt below {context} tokens",
        )
    return min(DEFAULT_MAX_TOKENS, left) if options.max_tokens is None else options.max_tokens
