"""Non-negative least squares in NumPy: a few dozen columns need no scipy at run time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def non_negative_least_squares(matrix: F64, target: F64) -> F64:
    """The x >= 0 that makes |matrix @ x - target| least: the active sets of Lawson and Hanson (1974).

    Args:
        matrix: float64, (rows, columns).
        target: float64, (rows,).

    Returns:
        Float64, (columns,), at least 0.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1  # a column of zeros stays out: its gradient is 0
    scaled = matrix / scale
    columns = scaled.shape[1]
    x, active = np.zeros(columns), np.zeros(columns, bool)
    # Float64 keeps the gradient to about 1e-16 of its terms; 1e-10 is far above that.
    tolerance = 1e-10 * max(1e-300, float(np.linalg.norm(scaled.T @ target, np.inf)))
    for _ in range(3 * columns):
        gradient = np.where(active, -np.inf, scaled.T @ (target - scaled @ x))
        best = int(np.argmax(gradient))
        if gradient[best] <= tolerance:
            break
        active[best] = True
        x = _step(scaled, target, x, active)
    result: F64 = x / scale
    return result


def _step(matrix: F64, target: F64, x: F64, active: NDArray[np.bool_]) -> F64:
    """The best x over the active columns, of which those that would become negative leave `active`."""
    while True:
        free = np.zeros_like(x)
        free[active] = np.linalg.lstsq(matrix[:, active], target, rcond=None)[0]
        negative = active & (free <= 0)
        if not negative.any():
            return free
        share = float(np.min(x[negative] / (x[negative] - free[negative])))
        x = x + share * (free - x)
        leaving = active & (x <= 1e-15 * max(1.0, float(x.max())))
        active &= ~(leaving if leaving.any() else negative)
        x[~active] = 0
        if not active.any():
            return x
