"""What the learned scheduler is trained on: prompts, what their KV entries look like, and when each could
have switched to the lower width at no more than a given loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from taper.evaluate.divergence import kl_divergences, log_normalisers
from taper.models import Decoder
from taper.precision.learned import mean_over_heads, switch_start
from taper.tune.greedy import GreedyWalk
from taper.tune.prompts import PromptSet

F64 = NDArray[np.float64]

# PMPD cuts prompts at a random length of at least 32 tokens.
MIN_PROMPT_TOKENS = 32


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
    """The prompts, each cut at a random length from 32 tokens (or half, where that is less) to all."""
    generator = np.random.default_rng(seed)
    cut = []
    for prompt in prompts.prompts:
        least = min(MIN_PROMPT_TOKENS, max(1, len(prompt) // 2))
        cut.append(prompt[: int(generator.integers(least, len(prompt) + 1))])
    return replace(prompts, prompts=tuple(cut), references=((),) * len(cut))


def measure_prompts(
    decoder: Decoder,
    prompts: PromptSet,
    plan: LabelPlan,
    progress: Callable[[str, float], None] | None = None,
) -> list[MeasuredPrompt]:
    """Measure every prompt's branches, one after the other.

    PMPD labels by ROUGE-L of the branches' own answers. That says little here: two greedy answers part at
    their first difference, wherever the switch was. The divergence from the reference's distributions along
    the reference's own answer is a number for every token.
    """
    measured = []
    for number, prompt in enumerate(prompts.prompts, 1):
        measured.append(_measured(decoder, prompt, prompts.max_tokens, plan))
        if progress is not None:
            progress("labels", number / len(prompts))
    return measured


def labels_within(damage: F64, tolerance: float) -> NDArray[np.int64]:
    """The earliest switch whose damage is at most the tolerance, for each prompt.

    Args:
        damage: (prompts, segments + 1); the last column is 0.
        tolerance: nats a token, at least 0.
    """
    return (damage <= tolerance).argmax(axis=1)


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


def _measured(decoder: Decoder, prompt: Sequence[int], max_tokens: int, plan: LabelPlan) -> MeasuredPrompt:
    walk = GreedyWalk(decoder, prompt, max_tokens, keep_logits=True)
    walk.prefill(plan.reference_bits)
    walk.extend(plan.reference_bits, max_tokens)
    branches = _Branches(decoder, walk, len(prompt))
    walk.prefill(plan.prefill_bits)
    keys, values = mean_over_heads(walk.cache.entries(-1))
    starts = [switch_start(segment, plan.num_segments, max_tokens) for segment in range(plan.num_segments)]
    damage = np.zeros((len(plan.widths) - 1, plan.num_segments + 1))
    for pair, (high, low) in enumerate(zip(plan.widths, plan.widths[1:], strict=False)):
        at_high = branches.divergences(0, high)
        # The latest switch first: each branch then finds the entries before its own as `high` wrote them.
        for segment in reversed(range(plan.num_segments)):
            after = branches.divergences(starts[segment] - 1, low)
            damage[pair, segment] = after.sum() - at_high[len(at_high) - len(after) :].sum()
        damage[pair] /= max(1, len(at_high))
    return MeasuredPrompt(keys, values, damage)


class _Branches:
    """Passes over a reference answer in the cache of the walk that drew it."""

    def __init__(self, decoder: Decoder, walk: GreedyWalk, num_prompt: int) -> None:
        self._decoder, self._cache, self._num_prompt = decoder, walk.cache, num_prompt
        self._answer = list(walk.tokens)
        self._reference = np.array(walk.logits)
        self._norms = log_normalisers(self._reference)

    def divergences(self, num_kept: int, bits: float) -> F64:
        """KL of the tokens whose passes come after the first `num_kept` decode passes, which stay as they
        are in the cache; empty where the answer ends before."""
        read = self._answer[num_kept:-1]
        if not read:
            return np.empty(0)
        self._cache.truncate(self._num_prompt + num_kept)
        logits = self._decoder.forward(read, self._cache, bits, "all")
        assert logits is not None
        first = num_kept + 1
        return kl_divergences(self._reference[first:], self._norms[first:], logits, log_normalisers(logits))
