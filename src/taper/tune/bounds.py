"""Upper confidence bounds of a mean over documents, and the test of a ladder of schedules."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError

Float64 = NDArray[np.float64]

CONFIDENCE = 0.95
# The 5 % quantile of 4,000 resamples is known to 0.35 % of probability (one standard error).
NUM_RESAMPLES = 4000
SEED = 0
_CHUNK_ELEMENTS = 1 << 18
# Below this the bootstrap's tails are those of a handful of documents.
LEAST_DOCUMENTS = 20


def upper_bound(values: Float64, confidence: float = CONFIDENCE) -> float:
    """One-sided upper confidence bound of the mean of independent values, by the bootstrap-t.

    Resamples of the values give t* = (mean* - mean) / se*; the bound is mean - q se with q the (1 -
    confidence) quantile of t* (Efron and Tibshirani, An Introduction to the Bootstrap, section 12.5). Its
    coverage is right to second order, also for the skewed losses of few documents, where the normal and the
    percentile bound are right to first order only (Hall, The Annals of Statistics 16, 1988).

    Args:
        values: float64 (documents,), one for each.
        confidence: 0.5..1, at which the mean is below the bound.

    Raises:
        UsageError: fewer than `LEAST_DOCUMENTS` values.
    """
    count = len(values)
    if count < LEAST_DOCUMENTS:
        raise UsageError(
            f"{count} held-out documents are too few for a confidence bound",
            hint=f"give at least {LEAST_DOCUMENTS}",
        )
    mean, error = float(values.mean()), float(values.std(ddof=1)) / np.sqrt(count)
    if error == 0.0:
        return mean
    ratios = np.concatenate([*_studentised(values, mean)])
    return mean - float(np.quantile(ratios, 1.0 - confidence, method="lower")) * float(error)


def _studentised(values: Float64, mean: float) -> Iterator[Float64]:
    """t* of `NUM_RESAMPLES` resamples, some rows at a time."""
    generator, count = np.random.default_rng(SEED), len(values)
    rows = max(1, _CHUNK_ELEMENTS // count)
    for begin in range(0, NUM_RESAMPLES, rows):
        drawn = values[generator.integers(0, count, (min(rows, NUM_RESAMPLES - begin), count))]
        shift, spread = drawn.mean(axis=1) - mean, drawn.std(axis=1, ddof=1) / np.sqrt(count)
        # A resample of one value again and again has no spread; it says no more than the sign of its shift.
        with np.errstate(divide="ignore", invalid="ignore"):
            yield np.nan_to_num(shift / spread, nan=0.0, posinf=np.inf, neginf=-np.inf)


def by_document(values: Float64, documents: tuple[int, ...]) -> Float64:
    """Means over the prompts of each document, which are not independent of each other."""
    places = np.unique(np.asarray(documents), return_inverse=True)[1]
    means: Float64 = np.bincount(places, weights=values) / np.bincount(places)
    return means
