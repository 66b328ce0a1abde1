"""The audit: one pass at full width over a finished answer says what its bits have cost.

The engine keeps the logits that each token was drawn from. When the answer is complete, the reference width
reads prompt and answer as one prefill, and every token's two distributions are compared: what the used bits
said, keys and values that they wrote included, and what the reference says about the same text.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taper.engine.model_runner import ModelRunner
from taper.engine.sampler import SampledToken, log_softmax
from taper.errors import DoesNotFitError

Logits = NDArray[np.float32]

# What an audited request may keep. Float32 as the model gave them: anything shorter would report a loss where
# there is none. 512 MiB are 4,194 tokens of a vocabulary of 32,000, or 1,046 of 128,256.
MAX_KEPT_BYTES = 512 << 20

# Logits of one pass of the audit: 32 MiB of float32, which is 262 tokens of a vocabulary of 32,000.
PASS_LOGITS = 1 << 23

# A token of which the reference gives its first choice this much is a decision that the text leaves no doubt
# about: a bracket, the rest of a name, a digit that was copied. When the used bits put another token first
# there, they give the reference's at most 1/2, and the token's KL is at least
# 0.9 ln(0.9 / 0.5) + 0.1 ln(0.1 / 0.5) = 0.37 nats: never a tie that fell the other way.
SURE_PROBABILITY = 0.9

# Neighbouring tokens are correlated, means of long batches less (batch means: Schmeiser, "Batch Size Effects
# in the Analysis of Simulation Output", Operations Research 30, 1982, where 10 to 30 serve). A text wanders
# slowly, so few long ones serve better: of 2 x 40 answers of taper-small at 3 bits, the bound of the first
# 128 tokens held for the next 128 in 85 and 98 % with 4 batches, in 68 and 95 % with 10 (88 % is right for a
# target as noisy as the bound's own mean).
NUM_BATCHES = 4
MIN_BOUND_TOKENS = 5 * NUM_BATCHES
_STUDENT_95 = 2.3534  # one-sided 95 % of Student's t with NUM_BATCHES - 1 degrees of freedom


@dataclass(frozen=True, slots=True)
class Decisions:
    """Tokens that the reference is sure of.

    Attributes:
        num_sure: how many of the answer's tokens it gives a first choice of at least `SURE_PROBABILITY`.
        changed: indices in the answer at which the used bits put another token first.
    """

    num_sure: int
    changed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Audit:
    """What the bits of an answer have cost against one width, token by token in the answer's order.

    All of it is about the models' raw distributions, before penalties and temperature.

    Attributes:
        bits: the reference width.
        kl: KL(reference || used) of each token in nats; exactly 0 where both are the same bytes.
        agreement: whether both put the same token first (ties: the lowest id).
        logprobs: log-probability of the drawn token in the used distribution.
        reference_logprobs: the same in the reference's.
        certainty: the reference's largest probability.
        seconds: that the audit took, passes and comparison.
        num_bytes: weights and KV entries that its passes read.
        num_pass_tokens: tokens that its passes ran, the prompt's included unless they could be reused.
    """

    bits: float
    kl: tuple[float, ...]
    agreement: tuple[bool, ...]
    logprobs: tuple[float, ...]
    reference_logprobs: tuple[float, ...]
    certainty: tuple[float, ...]
    seconds: float
    num_bytes: int
    num_pass_tokens: int

    @property
    def mean_kl(self) -> float:
        """Mean over the tokens, in nats."""
        return math.fsum(self.kl) / len(self.kl)

    @property
    def mean_kl_bound(self) -> float | None:
        """Upper 95 % confidence bound of the mean, in nats; None below `MIN_BOUND_TOKENS` tokens.

        By batch means: the answer is cut into `NUM_BATCHES` batches of neighbours, whose means are taken for
        independent; the bound is the mean plus Student's t times their standard error. It speaks of more text
        of this kind after this prompt; other prompts differ more than that.
        """
        if len(self.kl) < MIN_BOUND_TOKENS:
            return None
        means = np.array([batch.mean() for batch in np.array_split(np.array(self.kl), NUM_BATCHES)])
        return self.mean_kl + _STUDENT_95 * float(means.std(ddof=1)) / math.sqrt(NUM_BATCHES)

    @property
    def worst_index(self) -> int:
        """Index in the answer of the largest KL, the first of equals."""
        return self.kl.index(max(self.kl))

    @property
    def worst_kl(self) -> float:
        """The largest KL of a token, in nats."""
        return max(self.kl)

    @property
    def top1_share(self) -> float:
        """Share of the tokens whose first choice is the same, 0..1."""
        return sum(self.agreement) / len(self.agreement)

    @property
    def decisions(self) -> Decisions:
        """What became of the tokens that the reference is sure of: tool calls and JSON break on these."""
        sure = [index for index, share in enumerate(self.certainty) if share >= SURE_PROBABILITY]
        return Decisions(len(sure), tuple(index for index in sure if not self.agreement[index]))

    def as_record(self) -> dict[str, Any]:
        """Summary and per-token figures for JSON."""
        decisions = self.decisions
        return {
            "bits": self.bits,
            "mean_kl": self.mean_kl,
            "mean_kl_bound": self.mean_kl_bound,
            "worst_kl": self.worst_kl,
            "worst_index": self.worst_index,
            "top1_share": self.top1_share,
            "num_sure": decisions.num_sure,
            "changed": list(decisions.changed),
            "seconds": self.seconds,
            "num_bytes": self.num_bytes,
            "num_pass_tokens": self.num_pass_tokens,
            "kl": list(self.kl),
            "agreement": list(self.agreement),
            "logprobs": list(self.logprobs),
            "reference_logprobs": list(self.reference_logprobs),
        }


@dataclass(slots=True)
class AuditLog:
    """The logits of an audited request's tokens, kept while it runs.

    Attributes:
        bits: the reference width; None takes the largest that can be read when the answer is complete.
        logits: float32, (vocab,) each, of the pass that each token was drawn from.
    """

    bits: float | None
    logits: list[Logits] = field(default_factory=list)

    @classmethod
    def sized(cls, bits: float | None, num_tokens: int, vocab_size: int) -> AuditLog:
        """For at most so many tokens. Raises DoesNotFitError beyond `MAX_KEPT_BYTES`."""
        token_bytes = vocab_size * np.dtype(np.float32).itemsize
        if num_tokens * token_bytes > MAX_KEPT_BYTES:
            raise DoesNotFitError(
                f"an audit of {num_tokens} tokens keeps {num_tokens * token_bytes >> 20} MiB of logits; "
                f"the limit is {MAX_KEPT_BYTES >> 20} MiB",
                f"ask for at most {MAX_KEPT_BYTES // token_bytes} new tokens, or leave the audit out",
            )
        return cls(bits)

    def keep(self, logits: Logits) -> None:
        """Take the logits of the next token; a copy, so that a row does not hold its whole pass."""
        self.logits.append(logits.copy())


class ForcedTokens:
    """A given answer in the place of a sampler: its tokens come in order, whatever the logits say."""

    def __init__(self, token_ids: SequenceOf[int]) -> None:
        self._token_ids = token_ids
        self._num_drawn = 0

    def fork(self) -> ForcedTokens:
        """One that gives what this one would give; this one does not notice."""
        return copy.copy(self)

    def sample(self, logits: Logits) -> SampledToken:
        """The next token of the answer; asked at most once for each."""
        return SampledToken(self.draw(logits))

    def draw(self, logits: Logits) -> int:
        """As `sample`, the id alone."""
        self._num_drawn += 1
        return self._token_ids[self._num_drawn - 1]


@dataclass(frozen=True, slots=True)
class _Comparison:
    """One token's figures, as in `Audit`."""

    kl: float
    agrees: bool
    logprob: float
    reference_logprob: float
    certainty: float


def compare(reference: Logits, used: Logits, token_id: int) -> _Comparison:
    """Figures of a token from its two rows of logits, float32 (vocab,); in float64.

    A float32 sum over the vocabulary would carry some 1e-6 nats, a tenth of what 8 bits cost.
    """
    log_p, log_q = log_softmax(reference), log_softmax(used)
    p = np.exp(log_p)
    kl = float((p * (log_p - log_q)).sum())  # not @: BLAS threads would order the sum
    agrees = int(reference.argmax()) == int(used.argmax())
    return _Comparison(
        max(0.0, kl), agrees, float(log_q[token_id]), float(log_p[token_id]), float(p.max())
    )  # a sum of terms that cancel may end an ulp below 0


def run_audit(
    used: SequenceOf[Logits],
    bits: float,
    runner: ModelRunner,
    prompt_ids: SequenceOf[int],
    answer_ids: SequenceOf[int],
    reuse_prompt: bool,
    chunk_tokens: int,
    is_cancelled: Callable[[], bool],
) -> Audit | None:
    """Read a finished answer at the reference width and compare; None when it was cancelled.

    Args:
        used: the logits that the answer's tokens were drawn from, float32 (vocab,) each.
        bits: the reference width.
        runner: of the sequence; its cache then holds entries of the reference width.
        prompt_ids: at least one token.
        answer_ids: at least one token.
        reuse_prompt: the cache's entries of the prompt were written at the reference width. Only the prompt's
            last token, whose logits are those of the first token, and the answer are then run.
        chunk_tokens: most tokens of one pass.
        is_cancelled: asked before every pass.
    """
    began_ns = time.perf_counter_ns()
    ids = [*prompt_ids, *answer_ids[:-1]]
    first = len(prompt_ids) - 1  # its logits are the answer's first
    # A KV cache with a window may not reach back to the end of the prompt.
    start = runner.keeps(first) if reuse_prompt else 0
    runner.truncate(start)
    answer_chunk = max(1, min(chunk_tokens, PASS_LOGITS // len(used[0])))
    num_bytes = 0
    compared: list[_Comparison] = []
    for begin, end in [*_chunks(start, first, chunk_tokens), *_chunks(first, len(ids), answer_chunk)]:
        if is_cancelled():
            return None
        if begin < first:
            runner.prefill(ids[begin:end], bits, is_last=False)
        else:
            at = slice(begin - first, end - first)
            rows = runner.verify(ids[begin:end], bits)
            compared += map(compare, rows, used[at], answer_ids[at])
        num_bytes += runner.bytes_of_last_pass(bits)
    return Audit(
        bits=bits,
        kl=tuple(token.kl for token in compared),
        agreement=tuple(token.agrees for token in compared),
        logprobs=tuple(token.logprob for token in compared),
        reference_logprobs=tuple(token.reference_logprob for token in compared),
        certainty=tuple(token.certainty for token in compared),
        seconds=(time.perf_counter_ns() - began_ns) * 1e-9,
        num_bytes=num_bytes,
        num_pass_tokens=len(ids) - start,
    )


def _chunks(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, end)) for at in range(begin, end, size)]
