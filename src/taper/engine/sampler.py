"""From logits to a token: pure functions over NumPy arrays, and the sampler of one sequence."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taper.engine.constraint import Constraint
from taper.engine.sampling_params import SamplingParams
from taper.errors import TaperError, UsageError
from taper.kernels import exp
from taper.precision import LogitFeatures

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

SMALLEST_TEMPERATURE = 1e-30  # a float32 above 0 with room below; already greedy but for ties
# splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"): its step and its two
# rounds of mixing.
HASH_STEP = np.uint64(0x9E3779B97F4A7C15)
HASH_ROUNDS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
HASH_LAST_SHIFT = np.uint64(31)
UNIFORM_SHIFT = np.uint64(12)
MOST_IN_ONE_RACE = 4096
RACE_BLOCK = 256
FIRST_NUCLEUS = 128  # candidates sorted first for top-p; most nuclei at p <= 0.95 are smaller


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A drawn token; log-probabilities are of the raw distribution, and absent unless asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def descending(values: Floats, at_least: int) -> Ids:
    """Indices of the largest positive values, largest first, ties by index, without sorting the whole array.

    Args:
        values: float32, (n,), nothing negative.
        at_least: how many are wanted, from 1; more may come back, and fewer where fewer are positive.
    """
    floor = _floor(values, at_least)
    return _sorted(values, np.flatnonzero(values >= floor) if floor > 0 else np.flatnonzero(values))


def _sorted(values: Floats, ids: Ids) -> Ids:
    """Ascending indices in the order of their values, largest first, ties by index."""
    return ids[np.argsort(-values[ids], kind="stable")]


def _floor(values: Floats, count: int) -> np.float32:
    """A value that at least `count` of the values reach, or all, and few more than `count` do.

    The count-th largest of the maxima of 4 * count groups: 4 us for 40 of 4096, where a partition of all
    takes 20.
    """
    if count >= len(values):
        return np.float32(values.min())
    groups = 4 * count
    size = len(values) // groups
    if size > 1:
        values = values[: size * groups].reshape(size, groups).max(axis=0)
    return np.float32(np.partition(values, len(values) - count)[len(values) - count])


def candidates(logits: Floats, params: SamplingParams) -> tuple[Ids | None, Floats]:
    """Apply temperature, top-k, top-p and min-p.

    Args:
        logits: float32, (vocab,), penalties and bias already applied; the largest is finite.
        params: with a temperature above 0.

    Returns:
        The tokens that may be drawn (None for the whole vocabulary in order) and their weights: float32
        numbers proportional to the probabilities, by the specified exponential, so that they are the same on
        every machine.
    """
    temperature = np.float32(max(params.temperature, SMALLEST_TEMPERATURE))
    top = logits.max()
    if params.min_p > 0 and _is_alone(logits, top, temperature, params.min_p):
        return np.array([logits.argmax()]), np.ones(1, np.float32)
    ids = None
    if params.top_k:
        ids = _sorted(logits, np.flatnonzero(logits >= _floor(logits, params.top_k)))[: params.top_k]
    with np.errstate(over="ignore"):  # minus infinity has weight 0
        weights = exp(((logits if ids is None else logits[ids]) - top) / temperature)
    if params.top_p < 1:
        if ids is None:
            ids = _nucleus(weights, params.top_p)
            weights = weights[ids]
        else:  # in order already
            count = _reached(weights, params.top_p * weights.sum(dtype=np.float64))
            ids, weights = ids[:count], weights[:count]
    if params.min_p > 0:  # the largest weight is exp(0) = 1
        kept = np.flatnonzero(weights >= np.float32(params.min_p))
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def _is_alone(logits: Floats, top: np.float32, temperature: np.float32, min_p: float) -> bool:
    """Whether min-p leaves the likeliest token only, whatever the other filters do.

    So it is for half of the draws of `taper run` from children's stories, and takes an eighth of the time of
    all filters. The margin keeps clear of the rounding of exp; a token within it takes the long way.
    """
    margin = np.float32(math.log(min_p) - 0.01) * temperature
    return int(np.count_nonzero(logits >= top + margin)) == 1


def _nucleus(weights: Floats, top_p: float) -> Ids:
    """Indices of the fewest weights, largest first, whose share of the sum is at least `top_p`."""
    target = top_p * weights.sum(dtype=np.float64)
    count = FIRST_NUCLEUS
    while True:
        order = descending(weights, count)
        reached = _reached(weights[order], target)
        if reached <= len(order) or count >= len(
            weights
        ):  # rounding may leave the whole sum below the target
            return order[:reached]
        count *= 8


def _reached(weights: Floats, target: float) -> int:
    """How many weights, from the first on, it takes to reach a sum; one more than there are for too few."""
    return int(np.searchsorted(np.cumsum(weights, dtype=np.float64), target)) + 1


def race(weights: Floats | NDArray[np.float64], ids: Ids | None, key: int) -> int:
    """Index of the winner of an exponential race: index i wins with probability weights[i] / sum.

    Every token has an arrival time of its own, -log(u) / weight with u in (0, 1) a hash of the key and its
    id; the first one wins. This is the Gumbel-max trick without its second logarithm. Unlike one uniform
    number on the running sum of the weights, it draws the same token from two similar distributions wherever
    it can: at least with probability (1 - TV) / (1 + TV), TV their total variation distance (Daliri, Musco,
    Suresh, arXiv 2408.07978). Exact mode lives on that (docs/policies.md has the measurement).

    Args:
        weights: (n,), not all 0.
        ids: the tokens that they belong to, (n,); None for 0..n-1.
        key: random 64 bits, new for every draw.
    """
    if len(weights) == 1:
        return 0
    hashed = (np.arange(len(weights), dtype=np.uint64) if ids is None else ids.astype(np.uint64)) * HASH_STEP
    hashed += np.uint64(key)
    for shift, factor in HASH_ROUNDS:
        hashed ^= hashed >> shift
        hashed *= factor
    hashed ^= hashed >> HASH_LAST_SHIFT
    # 52 bits and a half: never 0 or 1. Another machine's log may differ in the last place, which changes a
    # draw where two arrivals agree to 2^-52 of their size.
    arrivals = -np.log((hashed >> UNIFORM_SHIFT) * 2.0**-52 + 2.0**-53)
    return int((weights / arrivals).argmax())


def race_in_blocks(weights: Floats, key: int) -> int:
    """`race` over a whole vocabulary: blocks of 256 race for the draw, then the tokens of the winner.

    Hashes one number a block instead of one a token: of 32000 tokens 0.06 ms instead of 0.5. Two similar
    distributions part 0.2 to 1 draws in 100 more often (docs/policies.md).

    Args:
        weights: float32, (n,), not all 0.
        key: random 64 bits, new for every draw.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), RACE_BLOCK), dtype=np.float64)
    start = RACE_BLOCK * race(sums, None, key)
    # Ids that no block has, so that the two races are independent.
    tokens = weights[start : start + RACE_BLOCK]
    return start + race(tokens, np.arange(len(sums) + start, len(sums) + start + len(tokens)), key)


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Log-probabilities of the raw distribution; float64, (vocab,)."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: NDArray[np.float64] = shifted - math.log(float(np.exp(shifted).sum()))
    return result


def logit_features(logits: Floats) -> LogitFeatures:
    """Certainty of the raw distribution, for policies that look at it."""
    logprobs = log_softmax(logits)
    probabilities = np.exp(logprobs)
    second, first = (
        np.partition(probabilities, -2)[-2:] if len(probabilities) > 1 else (0.0, probabilities[0])
    )
    finite = probabilities > 0
    entropy = -float((probabilities[finite] * logprobs[finite]).sum())
    return LogitFeatures(entropy=entropy, margin=float(first - second), max_probability=float(first))


class Sampler:
    """Draws the tokens of one sequence.

    Token n uses the n-th number of a Philox stream keyed by the seed, whatever else runs beside it; greedy
    sampling uses none. So a fork can draw ahead of it, with the numbers that it will use itself.

    Args:
        params: how to draw.
        vocab_size: length of the logits.
        prompt_ids: the prompt, for the repetition penalty.
        seed: of the draws, used in place of `params.seed`.
        constraint: tokens that may be drawn; None for all. The raw distribution is reported all the same.

    Raises:
        UsageError: a bias for a token outside the vocabulary, more top log-probabilities than tokens.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        prompt_ids: SequenceOf[int],
        seed: int,
        constraint: Constraint | None = None,
    ) -> None:
        outside = [token_id for token_id in params.logit_bias if token_id >= vocab_size]
        if outside:
            raise UsageError(f"logit_bias names token {outside[0]}; the vocabulary has {vocab_size} tokens")
        if params.top_logprobs > vocab_size:
            raise UsageError(f"top_logprobs is {params.top_logprobs}; the vocabulary has {vocab_size} tokens")
        self.params = params
        self._constraint = constraint
        self._random = np.random.Philox(key=seed)
        self._keys: list[int] = []  # the stream as far as it was used, shared with forks
        self._num_drawn = 0
        self._penalises = (
            params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        self._biased = np.fromiter(params.logit_bias.keys(), np.intp)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)
        self._seen = np.zeros(vocab_size, np.bool_)  # in the prompt or the output
        self._seen[np.asarray(prompt_ids, np.intp)] = True
        self._counts: dict[int, int] = {}  # in the output

    def fork(self) -> Sampler:
        """A sampler that draws what this one would draw, for logits to come; this one does not notice."""
        other = copy.copy(self)
        if self._penalises:
            other._seen, other._counts = self._seen.copy(), dict(self._counts)
        if self._constraint is not None:
            other._constraint = self._constraint.fork()
        return other

    def sample(self, logits: Floats) -> SampledToken:
        """Draw the next token and report on it. Arguments and errors as `draw`."""
        token_id = self.draw(logits)
        return self._report(token_id, logits) if self.params.logprobs else SampledToken(token_id)

    def draw(self, logits: Floats) -> int:
        """Draw the next token.

        Args:
            logits: float32, (vocab,), as the model gave them; not changed.

        Raises:
            TaperError: logits that are NaN or whose largest is not finite.
        """
        scores = self._adjusted(logits)
        token_id = int(scores.argmax())  # the index of a NaN where there is one
        if not math.isfinite(scores[token_id]):
            raise TaperError(
                f"the model's logits are not finite (token {token_id}: {logits[token_id]})",
                "check the file with taper inspect --verify, or read it at more bits",
            )
        if not self.params.is_greedy:
            token_id = self._race(scores)
        if self._constraint is not None:
            self._constraint.accept(token_id)
        if self._penalises:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
            self._seen[token_id] = True
        return token_id

    def _adjusted(self, logits: Floats) -> Floats:
        """Penalties, then bias, then the constraint."""
        if not self._penalises and not len(self._bias) and self._constraint is None:
            return logits
        scores = logits.copy()
        if self._penalises:
            self._penalise(scores)
        scores[self._biased] += self._bias
        if self._constraint is not None:
            scores[~self._constraint.mask()] = -np.inf
        return scores

    def _penalise(self, scores: Floats) -> None:
        """Repetition penalty on prompt and output, presence and frequency penalty on the output; in place."""
        params = self.params
        if params.repetition_penalty != 1:
            penalty = np.float32(params.repetition_penalty)
            seen = np.flatnonzero(self._seen)
            old = scores[seen]
            scores[seen] = np.where(old < 0, old * penalty, old / penalty)
        if self._counts:
            ids = np.fromiter(self._counts.keys(), np.intp, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            scores[ids] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * counts

    def _race(self, scores: Floats) -> int:
        """Draw one of the candidates with the next number of the stream."""
        ids, weights = candidates(scores, self.params)
        if self._num_drawn == len(self._keys):
            self._keys.append(self._random.random_raw())
        key = self._keys[self._num_drawn]
        self._num_drawn += 1
        if ids is not None:
            return int(ids[race(weights, ids, key)])
        return race(weights, None, key) if len(weights) <= MOST_IN_ONE_RACE else race_in_blocks(weights, key)

    def _report(self, token_id: int, logits: Floats) -> SampledToken:
        """Log-probabilities of the raw distribution, likeliest first, ties by id."""
        logprobs = log_softmax(logits)
        wanted = self.params.top_logprobs
        top: tuple[tuple[int, float], ...] = ()
        if wanted:
            floor = np.partition(logprobs, len(logprobs) - wanted)[len(logprobs) - wanted]
            ids = np.flatnonzero(logprobs >= floor)
            ids = ids[np.argsort(-logprobs[ids], kind="stable")][:wanted]
            top = tuple((int(i), float(logprobs[i])) for i in ids)
        return SampledToken(token_id, float(logprobs[token_id]), top)
