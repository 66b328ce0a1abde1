"""Anda's processing unit (arXiv 2411.15982, section IV) in NumPy: an oracle for products, no fast path.

It takes one plane of 64 activations a cycle: an adder tree sums the weights where the plane has a one, each
with the sign of its activation, and the running sum is doubled before the next plane is added. So a group
takes M cycles and one for its exponent, and every sum is an integer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from taper.kernels import anda

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def serial_dots(values: anda.AndaValues, weights: NDArray[np.integer]) -> Int64:
    """Sums of magnitudes times weights of each group, most significant plane first.

    Args:
        values: activations (T, n).
        weights: integers (N, n).

    Returns:
        int64 (T, N, groups); of a group that is cut short by the row's end, over what there is.
    """
    num_rows, n = values.magnitudes.shape
    size = values.group_size
    groups = -(-n // size)
    dots = np.zeros((num_rows, len(weights), groups), np.int64)
    signs = np.where(values.negative, -1, 1).astype(np.int64)
    for g in range(groups):
        part = slice(g * size, min((g + 1) * size, n))
        for plane in range(values.magnitude_bits - 1, -1, -1):
            ones = values.magnitudes[:, part].astype(np.int64) >> plane & 1
            tree = (signs[:, part] * ones) @ weights[:, part].astype(np.int64).T
            dots[:, :, g] = 2 * dots[:, :, g] + tree
    return dots


def serial_matmul(
    values: anda.AndaValues, weights: NDArray[np.integer], scales: Float32, half: bool = True
) -> Float32:
    """The unit's product of activations and weights.

    A group's sum becomes float16 by the group's exponent, is multiplied with the weights' scale of that group
    and added to a float32 sum over the groups in rising order; the result is rounded to float16.

    Args:
        values: activations (T, n).
        weights: integers (N, n).
        scales: float32 (N, groups), of the weights; a scale that covers several groups is repeated.
        half: round to float16 as the unit does; without it both roundings are left out.

    Returns:
        float32 (T, N).
    """
    dots = serial_dots(values, weights)
    units = np.ldexp(1.0, values.exponents.astype(np.int64) - 15 - (values.magnitude_bits - 1))
    total = np.zeros(dots.shape[:2], np.float32)
    for g in range(dots.shape[2]):
        with np.errstate(over="ignore"):
            part = (dots[:, :, g] * units[:, None, g]).astype(np.float16 if half else np.float32)
        total = total + part.astype(np.float32) * scales[None, :, g]
    return total.astype(np.float16).astype(np.float32) if half else total


def cycles(magnitude_bits: int, num_groups: int) -> int:
    """Of one processing unit for so many groups: a plane each, and one for signs and exponent."""
    return num_groups * (magnitude_bits + 1)
