"""Plain GPTQ of a single width (arXiv 2210.17323, algorithm 1): the control of the nested solver.

Error feedback in the order of the columns, one scale a row from the weights alone: no passes, no fitted
scales, no other width to heed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.kernels import _native
from taper.quantize.codebook import NestedCodebook
from taper.quantize.solver import factorise

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_CALL_ROWS = 512


def gptq(
    weights: Float32,
    moments: Float64,
    codebook: NestedCodebook,
    scales: Float32,
    damping: float,
    on_rows: Callable[[int], None] | None = None,
) -> NDArray[np.uint8]:
    """Codes by error feedback, uint8 (out_features, in_features).

    Args:
        weights: float32 (out_features, in_features).
        moments: float64 (in_features, in_features), E[x x^T] of the inputs.
        codebook: of one width.
        scales: float32 (out_features), kept as they are.
        damping: added to the diagonal of the moments, as a share of its mean.
        on_rows: called with the number of rows done, now and then.

    Raises:
        UsageError: a codebook of several widths.
    """
    if codebook.min_bits != codebook.max_bits:
        raise UsageError(
            f"plain GPTQ makes one width, not {codebook.min_bits}-{codebook.max_bits}",
            hint=f"give one width, as in --bits {codebook.max_bits}",
        )
    hessian, factor, root = factorise(moments, damping)
    codes = np.empty(weights.shape, dtype=np.uint8)
    for begin in range(0, len(weights), _CALL_ROWS):
        rows = slice(begin, begin + _CALL_ROWS)
        codes[rows], *_ = _native.solve_nested(
            np.ascontiguousarray(weights[rows]),
            hessian,
            factor,
            root,
            codebook.levels[0].reals,
            np.ones(1, dtype=np.float32),
            np.ascontiguousarray(scales[None, rows]),
            codebook.min_bits,
            codebook.max_bits,
            0,
            False,
        )
        if on_rows is not None:
            on_rows(min(begin + _CALL_ROWS, len(weights)))
    return codes
