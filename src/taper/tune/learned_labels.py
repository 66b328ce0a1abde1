"""What the learned scheduler is trained on: prompts, what their KV entries look like, and when each could
have switched to the lower width at no more than a given loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from taper.evaluate.divergence import kl_divergences, log_normalisers
from taper.models import Decoder
from taper.precision.learned import mean_over_heads, switch_start
from taper.tune.greedy import new_cache, run_prompt
from taper.tune.prompts import PromptSet

F64 = NDArray[np.float64]

# PMPD cuts prompts at a random length of at least 32 tokens.
MIN_PROMPT_TOKENS = 32
# Answers that are drawn side by side: one pass over the weights for all of them.
BATCH = 16


@dataclass(frozen=True, slots=True)
class LabelPlan:
    """What the branches are.

    Attributes:
        widths: falling, at least two.
        prefill_bits: of every prompt.
        num_segments: of an answer.
        reference_bits: of the answer that all branches are compared with.
    """

    widths: tuple[float, ...]
    prefill_bits: float
    num_segments: int
    reference_bits: float


@dataclass(frozen=True, slots=True)
class MeasuredPrompt:
    """One prompt.

    Attributes:
        keys, values: float64 (tokens, head_dim), the last layer's after the prompt, means over the KV heads.
        damage: float64 (pairs, segments + 1): how much the mean KL divergence from the reference, in nats a
            token, grows when the pair's lower width begins with each segment; the last column, never, is 0.
    """

    keys: F64
    values: F64
    damage: F64


def random_cuts(prompts: PromptSet, seed: int) -> PromptSet:
    """The prompts, each cut at a random length from 32 tokens (or half, where that is less) to all.

    What is cut off begins the reference, as the text has it.
    """
    generator = np.random.default_rng(seed)
    cut, after = [], []
    for prompt, reference in zip(prompts.prompts, prompts.references, strict=True):
        least = min(MIN_PROMPT_TOKENS, max(1, len(prompt) // 2))
        length = int(generator.integers(least, len(prompt) + 1))
        cut.append(prompt[:length])
        after.append((*prompt[length:], *reference)[: prompts.max_tokens])
    return replace(prompts, prompts=tuple(cut), references=tuple(after))


def with_greedy_answers(
    decoder: Decoder,
    prompts: PromptSet,
    bits: float,
    progress: Callable[[str, float], None] | None = None,
) -> PromptSet:
    """The prompts with the model's greedy answers at these bits as references; a stop token is the last."""
    answers: list[tuple[int, ...]] = []
    for begin in range(0, len(prompts), BATCH):
        answers += _greedy(decoder, prompts.prompts[begin : begin + BATCH], prompts.max_tokens, bits)
        if progress is not None:
            progress("answers", len(answers) / len(prompts))
    return replace(prompts, references=tuple(answers))


def measure_prompts(
    decoder: Decoder,
    prompts: PromptSet,
    plan: LabelPlan,
    progress: Callable[[str, float], None] | None = None,
) -> list[MeasuredPrompt]:
    """Measure every prompt's branches, one after the other.

    PMPD labels by ROUGE-L of the branches' own answers. That says little here: two greedy answers part at
    their first difference, wherever the switch was. The divergence from the reference's distributions along
    one answer, the prompt's reference, is a number for every token.
    """
    measured = []
    for number, (prompt, answer) in enumerate(zip(prompts.prompts, prompts.references, strict=True), 1):
        measured.append(_measured(decoder, prompt, answer, prompts.max_tokens, plan))
        if progress is not None:
            progress("labels", number / len(prompts))
    return measured


def labels_within(damage: F64, tolerance: float) -> NDArray[np.int64]:
    """The earliest switch whose damage is at most the tolerance, for each prompt.

    Args:
        damage: (prompts, segments + 1); the last column is 0.
        tolerance: nats a token, at least 0.
    """
    labels: NDArray[np.int64] = (damage <= tolerance).argmax(axis=1)
    return labels


def tolerance_for(damage: F64, high_frac: float) -> float:
    """The tolerance whose labels spend about this share of the answers at the higher width.

    Args:
        damage: (prompts, segments + 1).
        high_frac: from 0, never the higher width, to 1, always.
    """
    num_segments = damage.shape[1] - 1
    candidates = np.unique(np.maximum(damage, 0.0))
    means = np.array([labels_within(damage, value).mean() for value in candidates])
    return float(candidates[np.abs(means / num_segments - high_frac).argmin()])


def _measured(
    decoder: Decoder, prompt: Sequence[int], answer: Sequence[int], max_tokens: int, plan: LabelPlan
) -> MeasuredPrompt:
    branches = _Branches(decoder, prompt, answer, max_tokens, plan.reference_bits)
    keys, values = branches.prefill(plan.prefill_bits)
    starts = [switch_start(segment, plan.num_segments, max_tokens) for segment in range(plan.num_segments)]
    damage = np.zeros((len(plan.widths) - 1, plan.num_segments + 1))
    for pair, (high, low) in enumerate(pairwise(plan.widths)):
        at_high = branches.divergences(0, high)
        # The latest switch first: each branch then finds the entries before its own as `high` wrote them.
        for segment in reversed(range(plan.num_segments)):
            after = branches.divergences(starts[segment] - 1, low)
            damage[pair, segment] = after.sum() - at_high[len(at_high) - len(after) :].sum()
        damage[pair] /= max(1, len(at_high))
    return MeasuredPrompt(keys, values, damage)


def _greedy(
    decoder: Decoder, prompts: Sequence[Sequence[int]], max_tokens: int, bits: float
) -> list[tuple[int, ...]]:
    caches = [new_cache(decoder, prompt, max_tokens) for prompt in prompts]
    logits = [run_prompt(decoder, cache, ids, bits) for cache, ids in zip(caches, prompts, strict=True)]
    answers = [[int(row.argmax())] for row in logits]
    stop_ids = decoder.config.eos_token_ids
    while running := [
        i for i, answer in enumerate(answers) if len(answer) < max_tokens and answer[-1] not in stop_ids
    ]:
        rows = decoder.decode_batch([answers[i][-1] for i in running], [caches[i] for i in running], bits)
        for i, row in zip(running, rows, strict=True):
            answers[i].append(int(row.argmax()))
    return [tuple(answer) for answer in answers]


class _Branches:
    """Passes over one answer at several widths, compared with those at the reference's bits."""

    def __init__(
        self, decoder: Decoder, prompt: Sequence[int], answer: Sequence[int], max_tokens: int, bits: float
    ) -> None:
        self._decoder, self._prompt, self._answer = decoder, prompt, answer
        self._cache = new_cache(decoder, prompt, max_tokens)
        run_prompt(decoder, self._cache, prompt, bits)
        rows: NDArray[np.float32] | None = np.empty((0, decoder.config.vocab_size), dtype=np.float32)
        if len(answer) > 1:
            rows = decoder.forward(answer[:-1], self._cache, bits, "all")
        assert rows is not None
        # Of the tokens that a decode pass draws; the prompt draws the first.
        self._reference, self._norms = rows, log_normalisers(rows)

    def prefill(self, bits: float) -> tuple[F64, F64]:
        """Run the prompt anew; keys and values of its last layer, means over the heads."""
        run_prompt(self._decoder, self._cache, self._prompt, bits)
        return mean_over_heads(self._cache.entries(-1))

    def divergences(self, num_kept: int, bits: float) -> F64:
        """KL of the tokens whose passes come after the first `num_kept` decode passes, which stay as they
        are in the cache; empty where the answer ends before."""
        read = self._answer[num_kept:-1]
        if not read:
            return np.empty(0)
        self._cache.truncate(len(self._prompt) + num_kept)
        logits = self._decoder.forward(read, self._cache, bits, "all")
        assert logits is not None
        reference, norms = self._reference[num_kept:], self._norms[num_kept:]
        return kl_divergences(reference, norms, logits, log_normalisers(logits))
