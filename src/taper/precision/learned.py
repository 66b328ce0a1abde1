"""The learned scheduler: after the prompt, a small network says when each width gives way to the next.

PMPD (arXiv 2410.13461), section 4 and appendix: keys and values of the last layer after prefill, a mean over
their heads, attention by learned queries, layer norm, a perceptron of two layers, one class for each switch
point. All in float64 from the float32 of the cache: what another order of the sums changes, 1e-14, decides
nothing, so machines agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.formats.learned import LearnedScheduler, PredictorWeights
from taper.precision.kinds import Progressive
from taper.precision.policy import StepContext

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

NORM_EPSILON = 1e-5


class Prompts(NamedTuple):
    """Some prompts' last layer, means over the KV heads, padded to the longest.

    Attributes:
        keys, values: float64 (prompts, tokens, head_dim); padding is 0.
        is_token: bool (prompts, tokens), false where there is padding.
    """

    keys: F64
    values: F64
    is_token: NDArray[np.bool_]


class Activations(NamedTuple):
    """What the layers gave; the backward pass reads them (`taper.tune.learned_train`).

    Attributes:
        attention: (prompts, heads, heads, tokens), each row sums to 1.
        normed: (prompts, features), before gain and bias.
        inverse_deviation: (prompts, 1).
        features: (prompts, features), after gain and bias.
        hidden: (prompts, hidden), after ReLU.
        logits: (prompts, classes).
    """

    attention: F64
    normed: F64
    inverse_deviation: F64
    features: F64
    hidden: F64
    logits: F64


def mean_over_heads(entries: tuple[F32, F32]) -> tuple[F64, F64]:
    """(tokens, head_dim) keys and values, of (kv_heads, tokens, head_dim) ones."""
    keys, values = entries
    return keys.mean(axis=0, dtype=np.float64), values.mean(axis=0, dtype=np.float64)


def padded(prompts: Sequence[tuple[F64, F64]]) -> Prompts:
    """A batch of prompts of any lengths, each (tokens, head_dim) keys and values."""
    lengths = np.array([len(keys) for keys, _ in prompts])
    shape = (len(prompts), int(lengths.max()), prompts[0][0].shape[1])
    keys, values = np.zeros(shape), np.zeros(shape)
    for row, (own_keys, own_values) in enumerate(prompts):
        keys[row, : len(own_keys)], values[row, : len(own_values)] = own_keys, own_values
    return Prompts(keys, values, np.arange(shape[1]) < lengths[:, None])


def predict(weights: PredictorWeights, prompts: Prompts) -> Activations:
    """Run the network on a batch; a prompt's logits do not depend on the others beyond rounding.

    With H = kv_heads and d = head_dim: A = softmax(q k^T / sqrt(d)) over the tokens, for each of the H x H
    queries; z = mean over the second query axis of A v, (H, d), transposed and flattened; logits =
    W2 ReLU(W1 LayerNorm(z) + b1) + b2.
    """
    num_prompts, num_tokens, head_dim = prompts.keys.shape
    queries = weights.query.reshape(-1, head_dim).astype(np.float64) / np.sqrt(head_dim)
    scores = queries @ prompts.keys.swapaxes(1, 2)
    scores = np.where(prompts.is_token[:, None, :], scores, -np.inf)
    attention = np.exp(scores - scores.max(axis=2, keepdims=True))
    attention /= attention.sum(axis=2, keepdims=True)
    attention = attention.reshape(num_prompts, *weights.query.shape[:2], num_tokens)
    pooled = attention.mean(axis=2) @ prompts.values
    flat = pooled.swapaxes(1, 2).reshape(num_prompts, -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    inverse = 1.0 / np.sqrt((centred**2).mean(axis=1, keepdims=True) + NORM_EPSILON)
    normed = centred * inverse
    features = normed * weights.norm_gain + weights.norm_bias
    hidden = np.maximum(features @ weights.hidden_weight.T + weights.hidden_bias, 0.0)
    logits = hidden @ weights.class_weight.T + weights.class_bias
    return Activations(attention, normed, inverse, features, hidden, logits)


class Learned:
    """A schedule of the request's own, decided once, before the first decode pass.

    Keeps the decision until the next prompt, so it serves one request at a time.

    Args:
        scheduler: of the model's file.
    """

    name = "learned"

    def __init__(self, scheduler: LearnedScheduler) -> None:
        self._scheduler = scheduler
        self._schedule: Progressive | None = None

    def bits(self, step: StepContext) -> float:
        """The prompt's bits; then those of the schedule that its KV entries decide on.

        Raises:
            UsageError: an engine that does not show the KV cache.
        """
        if step.phase == "prefill":
            self._schedule = None
            return self._scheduler.prefill_bits
        if self._schedule is None:
            if step.kv is None:
                raise UsageError(
                    "policy 'learned' needs the KV cache after the prompt, which this engine does not show"
                )
            self._schedule = schedule_of(self._scheduler, step.kv(), step.max_tokens)
        return self._schedule.bits(step)


def schedule_of(scheduler: LearnedScheduler, entries: tuple[F32, F32], max_tokens: int) -> Progressive:
    """What the predictors say to a prompt.

    Each pair of neighbouring widths has its own decision. Where a lower pair's comes before a higher one's,
    the width between them is left out: bits only fall.

    Args:
        scheduler: of the model's file.
        entries: keys and values of the last layer, float32 (kv_heads, tokens, head_dim).
        max_tokens: limit on the generated tokens.
    """
    prompts = padded([mean_over_heads(entries)])
    classes = [int(predict(weights, prompts).logits[0].argmax()) for weights in scheduler.predictors]
    segments, prefill_bits = scheduler.num_segments, scheduler.prefill_bits
    return progressive_of(scheduler.widths, classes, segments, max_tokens, prefill_bits)


def progressive_of(
    widths: Sequence[float], classes: Sequence[int], num_segments: int, max_tokens: int, prefill_bits: float
) -> Progressive:
    """The schedule that switches where the classes say.

    Args:
        widths: falling.
        classes: of each pair of neighbours, the segment that begins at the lower width; `num_segments` is
            never.
        num_segments: of the token limit.
        max_tokens: limit on the generated tokens.
        prefill_bits: of the prompt, which draws token 0 whatever the classes say.
    """
    points, latest = [(widths[0], 0)], 1
    for bits, chosen in zip(widths[1:], classes, strict=True):
        if chosen == num_segments:
            break
        start = max(latest, switch_start(chosen, num_segments, max_tokens))
        if points[-1][1] == start:
            points.pop()
        points.append((bits, start))
        latest = start
    return Progressive(tuple(points), prefill_bits)


def switch_start(segment: int, num_segments: int, max_tokens: int) -> int:
    """First token of a segment of the limit; at least 1, since the prompt draws token 0."""
    return max(1, segment * max_tokens // num_segments)
