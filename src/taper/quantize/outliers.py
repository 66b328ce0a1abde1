"""Dense and sparse (SqueezeLLM, arXiv 2306.07629, section 4.2): which weights stay beside the planes.

First the weights of the greatest sensitivity, then those of the greatest magnitude. SqueezeLLM's threshold on
magnitude, quartiles plus a range scaled until the share is right, is symmetric about zero and so the same as
taking the largest. What is taken leaves a zero in the dense matrix.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.formats.outliers import MAX_COLUMNS, OutlierRows
from taper.quantize.half import check_float16

Float32 = NDArray[np.float32]

# SqueezeLLM takes 0.05 % by sensitivity and 0.40 % by magnitude.
SENSITIVE_PART = 1 / 9


def split_outliers(weights: Float32, sensitivity: Float32, share: float) -> tuple[OutlierRows, Float32]:
    """Take a share of the weights out. Equal ones go in the order of their places.

    Args:
        weights: float32 (out_features, in_features), finite.
        sensitivity: float32 (1, in_features) or (out_features, in_features). Among equals the larger weight
            is the more sensitive one: second moments give a whole column one figure.
        share: of all weights, above 0 and below 1; one ninth by sensitivity, the others by magnitude.

    Returns:
        The outliers, and the dense rest with zeros in their places.

    Raises:
        TaperError: an outlier is beyond float16.
        UsageError: the matrix has more columns than an outlier's column can say.
    """
    if weights.shape[1] > MAX_COLUMNS:
        raise UsageError(
            f"a matrix has {weights.shape[1]:,} columns; outliers need at most {MAX_COLUMNS:,}",
            hint="quantise without outliers",
        )
    count = round(share * weights.size)
    num_sensitive = round(count * SENSITIVE_PART)
    magnitude = np.abs(weights).reshape(-1)
    figures = np.broadcast_to(sensitivity, weights.shape).reshape(-1)
    # lexsort: the last key leads. Stable, so equal ones stay in order.
    taken = np.zeros(weights.size, dtype=bool)
    taken[np.lexsort((-magnitude, -figures))[:num_sensitive]] = True
    magnitude[taken] = -1.0
    taken[np.argsort(-magnitude, kind="stable")[: count - num_sensitive]] = True
    mask = taken.reshape(weights.shape)
    return _rows(weights, mask), np.where(mask, np.float32(0), weights)


def _rows(weights: Float32, mask: NDArray[np.bool_]) -> OutlierRows:
    kept = weights[mask]
    check_float16(float(np.abs(kept).max(initial=0)), "the weights have an outlier")
    starts = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])
    return OutlierRows(
        starts.astype(np.int32), np.nonzero(mask)[1].astype(np.uint16), kept.astype(np.float16)
    )
