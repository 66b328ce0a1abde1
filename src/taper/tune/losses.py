"""From the values of walks to a loss in per cent: what it is, and what each document says about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taper.tune.walks import ScoredWalk, Task

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Loss:
    """A way to say how much worse than uniform high a schedule is.

    Attributes:
        name: on the command line.
        summary: for tables.
        walk: over one prompt of a task.
        search_walk: what schedules are ranked by before they are tested; of the same scale.
        terms: (values, values of uniform high), each float64 (documents,) -> one term for each document, on a
            scale where losses add up.
        search_terms: the same for values of `search_walk`.
        loss: from a mean of terms to the loss as a share.
        has_reference: whether it compares with a reference model.
    """

    name: str
    summary: str
    walk: Callable[[Task, int], ScoredWalk]
    search_walk: Callable[[Task, int], ScoredWalk]
    terms: Callable[[Float64, Float64], Float64]
    search_terms: Callable[[Float64, Float64], Float64]
    loss: Callable[[float], float]
    has_reference: bool = False


def _difference(values: Float64, high: Float64) -> Float64:
    return values - high


def _itself(values: Float64, high: Float64) -> Float64:
    return values


def _drop(values: Float64, high: Float64) -> Float64:
    """Terms whose mean is 1 - mean(values) / mean(high), each with its influence on that ratio."""
    level = high.mean()
    if level == 0.0:
        return np.zeros_like(values)
    share = values.mean() / level
    terms: Float64 = 1.0 - share + (share * high - values) / level
    return terms


# Along text that the model itself would write, a token's mean log-likelihood falls by exactly the mean KL: so
# KL ranks schedules for the likelihood with a hundredth of its variance, and exp(KL) - 1 is on its scale.
LOSSES = {
    "likelihood": Loss(
        "likelihood",
        "perplexity of the true answer over uniform high's",
        Task.likelihood,
        Task.divergence,
        _difference,
        _itself,
        math.expm1,
    ),
    "kl": Loss(
        "kl",
        "exp(mean KL from the reference along the greedy answer) - 1",
        Task.audit,
        Task.audit,
        _itself,
        _itself,
        math.expm1,
        has_reference=True,
    ),
    "rouge": Loss(
        "rouge",
        "drop of ROUGE-L with the true answer against uniform high's",
        Task.rouge,
        Task.rouge,
        _drop,
        _drop,
        float,
    ),
    "rouge-model": Loss(
        "rouge-model",
        "drop of ROUGE-L with the reference's greedy answer against uniform high's",
        Task.rouge_of_model,
        Task.rouge_of_model,
        _drop,
        _drop,
        float,
        has_reference=True,
    ),
}
