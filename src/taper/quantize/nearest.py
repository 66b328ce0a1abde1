"""Plain round-to-nearest: every weight takes the nearest value by itself. Calibration must beat it.

On the shared codebook a code is the nearest value of the largest width, and narrower widths read its first
bits. On the uniform grid, the classic meaning of RTN, a row's levels are (2 i + 1 - 2^b) / 2^b times its
largest weight: cutting a code then gives the nearest code of the narrower grid, so nesting costs nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.formats.spec import MAX_BITS, NARROW_VALUE
from taper.quantize.codebook import CodebookLevel, NestedCodebook
from taper.quantize.half import check_float16
from taper.quantize.solver import row_scales

Float32 = NDArray[np.float32]


def uniform_codebook(min_bits: int, max_bits: int) -> NestedCodebook:
    """The uniform grid over -1..1, whose widths nest; `mse` is that of a weight uniform in that range.

    Raises:
        UsageError: the widths are not 1 <= min_bits <= max_bits <= 8.
    """
    if not 1 <= min_bits <= max_bits <= MAX_BITS:
        raise UsageError(f"bits {min_bits}-{max_bits} are outside 1 <= min <= max <= {MAX_BITS}")
    return NestedCodebook(tuple(_uniform_level(bits) for bits in range(min_bits, max_bits + 1)))


def _uniform_level(bits: int) -> CodebookLevel:
    steps = np.arange(1 - 2**bits, 2**bits, 2)
    values = steps.astype(np.int8) if steps[-1] <= NARROW_VALUE else steps.astype(np.int16)
    return CodebookLevel(bits, values, 2.0**-bits, 1.0 / (3.0 * 4.0**bits))


def grid_scales(weights: Float32, uniform: bool) -> Float32:
    """A scale for each row, rounded to float16: its largest weight for the uniform grid, else its root mean
    square, float32 (out_features).

    Raises:
        TaperError: a row's scale is beyond float16.
    """
    if not uniform:
        return row_scales(weights)
    scales = np.abs(weights).max(axis=1)
    row = int(np.argmax(scales))
    check_float16(scales[row], f"row {row} has a scale")
    rounded: Float32 = scales.astype(np.float16).astype(np.float32)
    return rounded


def nearest(weights: Float32, codebook: NestedCodebook, scales: Float32) -> NDArray[np.uint8]:
    """The nearest value of the largest width for every weight; on a border the lower one.

    Args:
        weights: float32 (out_features, in_features).
        codebook: values of the widths.
        scales: float32 (out_features).

    Returns:
        Codes, uint8 (out_features, in_features).
    """
    values = codebook.levels[-1].reals
    borders = 0.5 * (values[1:] + values[:-1])
    safe = np.where(scales > 0, scales, np.float32(1))
    codes: NDArray[np.uint8] = np.searchsorted(borders, weights / safe[:, None]).astype(np.uint8)
    return codes
