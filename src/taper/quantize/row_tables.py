"""Tables of each row's own values, nested: what Any-Precision LLM and SqueezeLLM store, unrotated.

Each row is cut by itself. Its weighted squared error counts a weight by its sensitivity: the second moment of
the input that it meets, or the diagonal Fisher of a file (`taper.quantize.fisher`). Two ways to cut:

- joint: the tree of least sum_b importance_b * error_b over all widths, by the interval recursion on 128
  cells of the sorted row, then Lloyd's two steps on the tree.
- greedy: weighted k-means at the least width (SqueezeLLM, arXiv 2306.07629), then every cluster in two,
  width by width (Any-Precision LLM, arXiv 2402.10517, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taper.kernels import _native
from taper.quantize.half import check_float16

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# Two cells a leaf at 6 bits; the steps after the programme move the borders off the grid. 256 cells take
# three times as long for 0.2 % less error or none (64 rows of Student's t, 4096 columns, 2 to 6 bits).
NUM_CELLS = 128
_CALL_ROWS = 512  # half a second at 4096 columns
_INT8_LIMIT = 127


@dataclass(frozen=True, slots=True)
class RowTables:
    """Codes and tables of one matrix.

    Attributes:
        codes: uint8 (out_features, in_features), max_bits wide.
        values: bits to int8 (out_features, 2**bits), in code order.
        scales: float16 (levels, out_features): what one step of `values` is worth, from the least width up.
    """

    codes: NDArray[np.uint8]
    values: dict[int, NDArray[np.int8]]
    scales: NDArray[np.float16]

    def dequantised(self, bits: int) -> Float32:
        """The matrix at a width, float32 (out_features, in_features)."""
        min_bits, max_bits = min(self.values), max(self.values)
        codes = (self.codes >> (max_bits - bits)).astype(np.intp)
        values: Float32 = np.take_along_axis(self.values[bits], codes, axis=1).astype(np.float32)
        values *= self.scales[bits - min_bits].astype(np.float32)[:, None]
        return values


def fit_row_tables(
    weights: Float32,
    sensitivity: Float32,
    bits: tuple[int, int],
    *,
    importance_base: float,
    greedy: bool = False,
    seed: int = 0,
    num_cells: int = NUM_CELLS,
) -> RowTables:
    """Cut every row. The result does not depend on the number of threads.

    Args:
        weights: float32 (out_features, in_features), finite.
        sensitivity: float32 (1, in_features) or (out_features, in_features), not negative; a row of zeros
            counts as a row of ones.
        bits: least width and number of planes.
        importance_base: a width's error counts importance_base**bits times (joint only).
        greedy: cut greedily; else jointly.
        seed: of the draws of k-means++ (greedy only).
        num_cells: of the joint programme; a row with no more distinct weights than cells is cut exactly.

    Raises:
        TaperError: a row's values are beyond float16.
        ValueError: a weight or a sensitivity that is not finite.
    """
    min_bits, max_bits = bits
    levels = range(min_bits, max_bits + 1)
    importance = np.array([importance_base ** (b - min_bits) for b in levels], dtype=np.float32)
    codes = np.empty(weights.shape, dtype=np.uint8)
    flat = np.empty((len(weights), 2 ** (max_bits + 1) - 2**min_bits), dtype=np.float32)
    for begin in range(0, len(weights), _CALL_ROWS):
        rows = slice(begin, begin + _CALL_ROWS)
        codes[rows], flat[rows] = _native.fit_row_tables(
            np.ascontiguousarray(weights[rows]),
            np.ascontiguousarray(sensitivity if len(sensitivity) == 1 else sensitivity[rows]),
            importance,
            min_bits,
            max_bits,
            num_cells,
            greedy,
            seed + begin,
        )
    reals = dict(zip(levels, np.split(flat, np.cumsum([2**b for b in levels])[:-1], axis=1), strict=True))
    return round_tables(codes, reals)


def round_tables(codes: NDArray[np.uint8], reals: dict[int, Float32]) -> RowTables:
    """Tables in int8 with a float16 scale for each row and width: the largest value of a row becomes 127.

    Args:
        codes: uint8 (out_features, in_features).
        reals: bits to float32 (out_features, 2**bits), widths in rising order.

    Raises:
        TaperError: a row's values are beyond float16.
    """
    values, scales = {}, []
    for bits, table in reals.items():
        largest = np.abs(table).max(axis=1)
        row = int(np.argmax(largest))
        check_float16(largest[row] / _INT8_LIMIT, f"row {row} has a scale")
        # Rounded up, so that no value is beyond 127 steps.
        scale = (largest / _INT8_LIMIT).astype(np.float16)
        scale = np.where(
            scale.astype(np.float32) * _INT8_LIMIT < largest, np.nextafter(scale, np.float16(np.inf)), scale
        )
        steps = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)
        values[bits] = np.rint(table / steps[:, None]).astype(np.int8)
        scales.append(scale)
    return RowTables(codes, values, np.stack(scales))
