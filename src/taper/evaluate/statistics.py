"""Estimates with their errors, from tokens that come in blocks.

Tokens of one block are correlated (one document, one context), blocks are not: every error here comes from
the spread between blocks, never from the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

# The error of a standard error from B resamples is about 1 / sqrt(2 B) of it: 5 %.
NUM_RESAMPLES = 200
BOOTSTRAP_SEED = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its standard error; None where a single block says nothing about the spread."""

    value: float
    standard_error: float | None


def mean_of_blocks(blocks: npt.NDArray[np.floating] | npt.NDArray[np.bool_]) -> Estimate:
    """Mean over all, error s / sqrt(n) of the block means.

    Args:
        blocks: (blocks, tokens) of equal length, or (blocks,) of block means.
    """
    wide = np.asarray(blocks, dtype=np.float64)
    means = wide.reshape(len(wide), -1).mean(axis=1)
    return Estimate(float(means.mean()), standard_error(means))


def standard_error(values: Float64) -> float | None:
    """Of the mean of independent values; None for fewer than two."""
    return None if len(values) < 2 else float(values.std(ddof=1)) / math.sqrt(len(values))


def proportion(num_right: int, num_items: int) -> Estimate:
    """Share of independent items that are right, error sqrt(p (1 - p) / (n - 1)) as lm-eval-harness."""
    share = num_right / num_items
    error = None if num_items < 2 else math.sqrt(share * (1.0 - share) / (num_items - 1))
    return Estimate(share, error)


def quantiles_of_blocks(
    blocks: npt.NDArray[np.floating], probabilities: Sequence[float], seed: int = BOOTSTRAP_SEED
) -> list[Estimate]:
    """Quantiles over all tokens, with errors from a bootstrap that draws whole blocks.

    The q-quantile is the least value that at least a share q of the tokens does not exceed (the inverse of
    the empirical distribution). Blocks are drawn with replacement `NUM_RESAMPLES` times (Efron and
    Tibshirani, An Introduction to the Bootstrap, chapter 6); the standard error is the spread of the
    quantile.

    Args:
        blocks: (blocks, tokens) of equal length.
        probabilities: within 0..1.
        seed: of the draws; the same one gives the same errors.
    """
    num_blocks, num_tokens = blocks.shape
    flat = blocks.reshape(-1)
    order = np.argsort(flat, kind="stable")
    block_of, ascending = order // num_tokens, flat[order]
    # Products such as 0.999 * 1000 lie an ulp off the whole number.
    ranks = [max(1, math.ceil(q * flat.size - 1e-9)) for q in probabilities]
    values = [float(ascending[rank - 1]) for rank in ranks]
    if num_blocks < 2:
        return [Estimate(value, None) for value in values]
    generator = np.random.default_rng(seed)
    drawn = np.empty((NUM_RESAMPLES, len(ranks)))
    for resample in drawn:
        times = np.bincount(generator.integers(0, num_blocks, num_blocks), minlength=num_blocks)
        resample[:] = ascending[np.searchsorted(np.cumsum(times[block_of]), ranks)]
    errors = drawn.std(axis=0, ddof=1)
    return [Estimate(value, float(error)) for value, error in zip(values, errors, strict=True)]
