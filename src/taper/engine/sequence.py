"""A request's tokens and figures while the engine works on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from taper.engine.audit import Audit, AuditLog, ForcedTokens
from taper.engine.request import Request
from taper.engine.sampler import SampledToken, Sampler
from taper.engine.stop_strings import StopStrings
from taper.precision import Bits
from taper.tokenizer import IncrementalDetokenizer

State = Literal["waiting", "running", "finished"]
FinishReason = Literal["stop", "length", "abort"]


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request in the engine.

    Attributes:
        request: what was asked for.
        prompt_ids: the prompt's tokens, at least one.
        max_tokens: the limit in force.
        stop_token_ids: every token that ends the output.
        seed: of the sampler, for a replay.
        sampler, stop_strings, detokenizer: of this sequence; no detokenizer for a model without tokenizer.
        tokens: drawn so far; a stop token is the last of them.
        bits: of the pass that each token was drawn from.
        text: handed out so far.
        stop_reason: the stop string or stop token that ended the output.
        num_prefilled: prompt tokens in the KV cache.
        prefill_ns, decode_ns: time in the engine; the first token's draw counts as prefill.
        prefill_bytes, decode_bytes: weights and KV entries that the passes read.
        num_decode_passes: after the prompt, those of drafts left out.
        num_draft_passes, num_drafted, num_accepted: passes that drafted, drafts, and drafts that were drawn.
        ceilings: where passes are limited: (tokens drawn, most bits) at the first pass and at each change.
        missed_bits: what the policy wanted for the prompt where that was more than it got.
        refreshes: (tokens drawn, bits) where the KV cache was written again.
        prompt_bits: that the prompt's KV entries were written with, by pass.
        audit_log: what an audited request keeps until its audit.
        audit: of the finished answer.
    """

    request: Request
    prompt_ids: list[int]
    max_tokens: int
    stop_token_ids: frozenset[int]
    seed: int
    sampler: Sampler | ForcedTokens
    stop_strings: StopStrings
    detokenizer: IncrementalDetokenizer | None
    state: State = "waiting"
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    tokens: list[SampledToken] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    text: str = ""
    num_prefilled: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    prefill_bytes: int = 0
    decode_bytes: int = 0
    num_decode_passes: int = 0
    num_draft_passes: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    ceilings: list[tuple[int, int]] = field(default_factory=list)
    missed_bits: float = 0
    refreshes: list[tuple[int, float]] = field(default_factory=list)
    prompt_bits: list[Bits] = field(default_factory=list)
    audit_log: AuditLog | None = None
    audit: Audit | None = None

    def append(self, token: SampledToken, bits: float) -> str:
        """Take a drawn token, decide whether it ends the output, and return the text that may be shown."""
        self.tokens.append(token)
        self.bits.append(bits)
        piece = ""
        if token.token_id in self.stop_token_ids:
            self.finish("stop", token.token_id)
        elif self.detokenizer is not None:
            piece = self._passed(self.detokenizer.append(token.token_id))
        if len(self.tokens) == self.max_tokens:
            self.finish("length")
        if self.state == "finished" and self.stop_strings.matched is None:
            piece += self._rest()
        self.text += piece
        return piece

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End the sequence; the first reason stays."""
        if self.state != "finished":
            self.state, self.finish_reason, self.stop_reason = "finished", reason, stop_reason

    def _passed(self, piece: str) -> str:
        """Text that is no part of a stop string; finishes at one."""
        shown = self.stop_strings.feed(piece)
        if self.stop_strings.matched is not None:
            self.finish("stop", self.stop_strings.matched)
        return shown

    def _rest(self) -> str:
        """What was held back, at the end of the output; a stop string in it still counts."""
        rest = self._passed(self.detokenizer.flush()) if self.detokenizer is not None else ""
        if self.stop_strings.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self.stop_strings.matched
            return rest
        return rest + self.stop_strings.flush()
