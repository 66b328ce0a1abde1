"""An answer on the terminal: streamed text, the bits of each token, the closing figures."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from taper.cli.terminal import dim, file_size, in_bits_colour, is_coloured, memory_size, printable

if TYPE_CHECKING:
    from taper.engine import Completion, StepOutput


def show(answer: Iterable[StepOutput], show_bits: bool, prompt: str = "") -> None:
    """Write tokens to stdout as they come.

    Args:
        answer: the tokens.
        show_bits: colour each by its bits; where colours do not belong, write [4] before each change instead.
        prompt: shown faintly before the answer on a terminal, so that the text reads as a whole.
    """
    is_terminal, has_colour = sys.stdout.isatty(), is_coloured(sys.stdout)
    if has_colour and prompt:
        _write(dim(printable(prompt)))
    counts: Counter[float] = Counter()
    last_bits = None
    try:
        for token in answer:
            counts[token.bits] += 1
            text = printable(token.text) if is_terminal else token.text
            if show_bits and has_colour:
                text = in_bits_colour(text, token.bits)
            elif show_bits and token.bits != last_bits:
                text = f"[{token.bits:g}]{text}"
            last_bits = token.bits
            _write(text)
    finally:
        _write("\n")
    if show_bits and counts:
        click.echo(_legend(counts), err=True)


def closing_line(completion: Completion) -> str:
    """Counts, speeds, bits and their limits, bytes and memory in one line."""
    usage = completion.usage
    parts = [
        f"prompt {_tokens(usage.num_prompt_tokens)} at {usage.prefill_tokens_per_s:.1f} tok/s",
        f"generated {_tokens(usage.num_completion_tokens)} at {usage.decode_tokens_per_s:.1f} tok/s",
        f"{usage.average_bits:.2f} bits on average",
        *_limits(completion),
        f"{file_size(usage.bytes_per_token)} read per token",
        f"peak memory {memory_size(usage.peak_memory_bytes)}",
    ]
    if usage.num_drafted_tokens:
        per_pass = (usage.num_completion_tokens - 1) / usage.num_decode_passes
        accepted = usage.num_accepted_tokens / usage.num_drafted_tokens
        parts.insert(2, f"{accepted:.0%} of drafts accepted, {per_pass:.2f} tokens a pass")
    return " · ".join(parts)


def _limits(completion: Completion) -> list[str]:
    """At which token more or fewer planes were there, and where the KV cache was written again."""
    texts = []
    if completion.ceilings:
        (_, first), *later = completion.ceilings
        changes = "".join(f", {bits} from token {token}" for token, bits in later)
        texts.append(f"at most {first} bits{changes}")
    texts += [f"prompt read again at {bits:g} bits before token {n}" for n, bits in completion.refreshes]
    return texts


def _legend(counts: Counter[float]) -> str:
    """Each width once, in its own colour, with its share of the tokens."""
    entries = [
        (bits, f"{bits:g} bits: {_tokens(count)}") for bits, count in sorted(counts.items(), reverse=True)
    ]
    if is_coloured(sys.stderr):
        return "  ".join(in_bits_colour(f"■ {text}", bits) for bits, text in entries)
    return "  ".join(f"[{bits:g}] {text}" for bits, text in entries)


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"


def _write(text: str) -> None:
    """At once: a token is news."""
    sys.stdout.write(text)
    sys.stdout.flush()
