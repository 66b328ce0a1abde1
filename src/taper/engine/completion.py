"""What the engine gives back."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from taper.engine.audit import Audit
from taper.engine.memory import peak_memory_bytes
from taper.engine.sequence import FinishReason, Sequence


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One generated token; `str()` gives its text.

    Attributes:
        text: that may be shown now. Empty while a character is incomplete or the text could begin a stop
            string; the token that settles it brings all of it.
        token_id: the token; a stop token has no text of its own.
        bits: of the pass that the token was drawn from.
        logprob, top_logprobs: of the raw distribution, where asked for; top ones are (token id,
            log-probability).
        finish_reason: set on the last token.
    """

    text: str
    token_id: int
    bits: float
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Usage:
    """Figures of a run. Times are those inside the engine; the time a caller takes between tokens is left
    out.

    Attributes:
        num_prompt_tokens, num_completion_tokens: counts; a stop token is part of the completion.
        prefill_s: until the first token.
        decode_s: of all later tokens.
        prefill_tokens_per_s, decode_tokens_per_s: 0 where there was no such pass. Decode counts the tokens
            after the
            first.
        average_bits: mean over the decoded tokens of the bits of the pass that each was drawn from, in exact
            mode too; over the first token's pass where there was no other.
        prefill_bytes, decode_bytes: weights and KV entries read, by drafts too.
        bytes_per_token: mean over the decoded tokens; 0 without one.
        num_decode_passes: that tokens were drawn from; in exact mode one may give several.
        num_draft_passes: at fewer bits, whose tokens were only proposed; prompt lookup drafts without any.
        num_drafted_tokens, num_accepted_tokens: proposed, and of those the ones that were drawn.
        peak_memory_bytes: of this process so far; None where the system does not say.
    """

    num_prompt_tokens: int
    num_completion_tokens: int
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    average_bits: float
    prefill_bytes: int
    decode_bytes: int
    bytes_per_token: float
    num_decode_passes: int
    num_draft_passes: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    peak_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Completion:
    """The output of a request.

    Attributes:
        text: without the stop string or stop token.
        token_ids: every drawn token, a final stop token and those of a stop string included.
        bits: of each token in `token_ids`.
        logprobs, top_logprobs: of each token, empty unless asked for.
        finish_reason: stop (a stop token or string), length (`max_tokens`), abort (cancelled or closed).
        stop_reason: the stop string or the stop token's id.
        prompt_ids: the prompt's tokens.
        policy: the policy's name.
        seed: of the draws; the same request with it gives the same tokens.
        usage: counts, times, bytes; those of the audit are its own.
        ceilings: where passes were limited by what had arrived or fitted: (tokens drawn, most bits) at the
            first pass and at each change.
        refreshes: (tokens drawn, bits) where the KV cache was written again.
        audit: what the bits have cost; None unless asked for, and where the request was cancelled before it.
    """

    text: str
    token_ids: tuple[int, ...]
    bits: tuple[float, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    prompt_ids: tuple[int, ...]
    policy: str
    seed: int
    usage: Usage
    ceilings: tuple[tuple[int, int], ...] = ()
    refreshes: tuple[tuple[int, float], ...] = ()
    audit: Audit | None = None


def completion_of(sequence: Sequence) -> Completion:
    """The record of a sequence as it is now; its finish_reason is None while it runs."""
    tokens = sequence.tokens
    has_logprobs = sequence.request.sampling.logprobs
    return Completion(
        text=sequence.text,
        token_ids=tuple(token.token_id for token in tokens),
        bits=tuple(sequence.bits),
        logprobs=tuple(token.logprob for token in tokens if token.logprob is not None),
        top_logprobs=tuple(token.top_logprobs for token in tokens) if has_logprobs else (),
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        prompt_ids=tuple(sequence.prompt_ids),
        policy=sequence.request.policy.name,
        seed=sequence.seed,
        usage=usage_of(sequence),
        ceilings=tuple(sequence.ceilings),
        refreshes=tuple(sequence.refreshes),
        audit=sequence.audit,
    )


def usage_of(sequence: Sequence) -> Usage:
    """The figures of a sequence as it is now."""
    num_decoded = max(0, len(sequence.tokens) - 1)
    prefill_s, decode_s = sequence.prefill_ns * 1e-9, sequence.decode_ns * 1e-9
    counted_bits = sequence.bits[1:] or sequence.bits
    return Usage(
        num_prompt_tokens=len(sequence.prompt_ids),
        num_completion_tokens=len(sequence.tokens),
        prefill_s=prefill_s,
        decode_s=decode_s,
        prefill_tokens_per_s=_ratio(sequence.num_prefilled, prefill_s),
        decode_tokens_per_s=_ratio(num_decoded, decode_s),
        # Exact: floats added one by one would make 3.3 of three tokens 3.2999999999999994.
        average_bits=float(statistics.mean(counted_bits)) if counted_bits else 0.0,
        prefill_bytes=sequence.prefill_bytes,
        decode_bytes=sequence.decode_bytes,
        bytes_per_token=_ratio(sequence.decode_bytes, num_decoded),
        num_decode_passes=sequence.num_decode_passes,
        num_draft_passes=sequence.num_draft_passes,
        num_drafted_tokens=sequence.num_drafted,
        num_accepted_tokens=sequence.num_accepted,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
