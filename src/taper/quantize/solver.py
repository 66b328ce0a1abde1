"""Nested codes of one matrix: GPTQ's error feedback at every width at once, then coordinate descent.

For rotated weights W and second moments H of the rotated inputs, the squared error of a layer's output at b
bits is tr((W - Q_b) H (W - Q_b)^T). The solver minimises sum_b importance_b times that, over the codes that
all widths share:

1. A sweep over the columns (GPTQ, arXiv 2210.17323, algorithm 1) in which every width keeps its own
   compensated copy of the columns to come; the code of a weight is the leaf with the least weighted sum of
   squared errors.
2. Passes of coordinate descent: each width's target for a column is its own value plus the column of (W -
   Q_b) H divided by H_jj. Before each pass every width's row scales are fitted by least squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.kernels import _native
from taper.quantize.codebook import NestedCodebook
from taper.quantize.half import check_float16

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# Rows of one native call: a second or so at 4096 columns, so that progress shows and Ctrl-C is heard.
_CALL_ROWS = 512
_ROOT_COLUMNS = 128

# At 7 and 8 bits next to nothing is lost, so they need not take from the others: with full growth 8 bits had
# 0.4 times the divergence of Q8_0 at its size, and 6 bits 1.26 times that of 6 bits alone.
_FULL_GROWTH_BITS = 6


@dataclass(frozen=True, slots=True)
class SolverOptions:
    """What the solver weighs and how long it works; the defaults were measured (docs/quantization.md).

    Attributes:
        importance_base: a width's error counts importance_base times that of the width below, above 6 bits
            its square root times; 1 favours few bits, 4 many.
        damping: added to the diagonal of H, as a share of its mean.
        passes: coordinate-descent passes after the sweep.
        refit_scales: fit the row scales of each width by least squares.
        feedback: weigh errors by the inputs' second moments; without it every code is the nearest one, which
            is what the calibration has to beat.
        balance: scale the columns before the rotation (taper.quantize.balance).
        centre: give each width a bias for the mean input, and weigh errors about that mean.
        lookup_share: of a tied embedding, what the look-up's error counts beside that of the head, whose
            moments have a mean diagonal of 1.
    """

    importance_base: float = 2.75
    damping: float = 0.01
    passes: int = 2
    refit_scales: bool = True
    feedback: bool = True
    balance: bool = True
    centre: bool = True
    lookup_share: float = 0.3

    def __post_init__(self) -> None:
        if not (np.isfinite(self.importance_base) and self.importance_base > 0):
            raise UsageError(
                f"importance base {self.importance_base} is not a positive number",
                hint="1 weighs all widths alike, 4 the wide ones most",
            )
        if not (np.isfinite(self.damping) and self.damping > 0):
            raise UsageError(
                f"damping {self.damping} is not a positive number", hint="0.01 suits most models"
            )
        if not (np.isfinite(self.lookup_share) and self.lookup_share >= 0):
            raise UsageError(
                f"lookup share {self.lookup_share} is not a number from 0 up",
                hint="0 leaves the look-up out",
            )
        if self.passes < 0:
            raise UsageError(f"passes {self.passes} is negative", hint="0 stops after the sweep")


@dataclass(frozen=True, slots=True)
class Solution:
    """Codes of one matrix.

    Attributes:
        codes: uint8 (out_features, in_features), max_bits wide.
        scales: float16 (levels, out_features), a row for each width from min_bits up.
        relative_errors: for each width, output error over output energy, both summed over all rows.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    relative_errors: tuple[float, ...]


def solve(
    weights: Float32,
    moments: Float64,
    codebook: NestedCodebook,
    options: SolverOptions,
    on_rows: Callable[[int], None] | None = None,
) -> Solution:
    """Choose nested codes and row scales. The result does not depend on the number of threads.

    Args:
        weights: float32 (out_features, in_features), rotated, finite.
        moments: float64 (in_features, in_features), E[x x^T] of the rotated inputs; only its shape matters,
            not its size.
        codebook: values of the widths.
        options: see `SolverOptions`.
        on_rows: called with the number of rows done, now and then.

    Raises:
        TaperError: a row's scale is beyond float16.
    """
    if not options.feedback:
        moments = np.eye(len(moments))
    hessian, factor, root = factorise(moments, options.damping)
    levels = codebook.levels
    values = np.concatenate([level.reals for level in levels])
    importance = np.array([importance_of(options.importance_base, level.bits) for level in levels])
    scales = np.repeat(row_scales(weights)[None, :], len(levels), axis=0)
    codes = np.empty(weights.shape, dtype=np.uint8)
    errors, energy = np.zeros(len(levels)), 0.0
    for begin in range(0, len(weights), _CALL_ROWS):
        rows = slice(begin, begin + _CALL_ROWS)
        codes[rows], scales[:, rows], part, energies = _native.solve_nested(
            np.ascontiguousarray(weights[rows]),
            hessian,
            factor,
            root,
            values,
            importance.astype(np.float32),
            np.ascontiguousarray(scales[:, rows]),
            codebook.min_bits,
            codebook.max_bits,
            options.passes,
            options.refit_scales,
        )
        errors += part.sum(axis=1, dtype=np.float64)
        energy += float(energies.sum(dtype=np.float64))
        if on_rows is not None:
            on_rows(min(begin + _CALL_ROWS, len(weights)))
    relative = tuple(float(error / energy) if energy > 0 else 0.0 for error in errors)
    return Solution(codes, scales.astype(np.float16), relative)


def importance_of(base: float, bits: int) -> float:
    """How much the error of a width counts, 1 at 0 bits."""
    growths = min(bits, _FULL_GROWTH_BITS) + 0.5 * max(bits - _FULL_GROWTH_BITS, 0)
    return float(base**growths)


def factorise(moments: Float64, damping: float) -> tuple[Float32, Float32, Float32]:
    """The damped second moments H, scaled to a mean diagonal of 1; the upper F with F^T F = H^-1; F^-1
    transposed.

    With J the exchange of first and last, J H J = L L^T gives H = M M^T with M = J L J upper triangular, and
    F = M^-1 = J L^-1 J: no inverse of H is formed.
    """
    mean = float(np.trace(moments)) / len(moments)
    hessian = moments / mean if mean > 0 else np.zeros_like(moments)
    hessian[np.diag_indices_from(hessian)] += damping
    lower, inverse = triangular_root(np.ascontiguousarray(hessian[::-1, ::-1]))
    factor = np.ascontiguousarray(inverse[::-1, ::-1], dtype=np.float32)
    root = np.ascontiguousarray(lower.T[::-1, ::-1], dtype=np.float32)
    return hessian.astype(np.float32), factor, root


def triangular_root(square: Float64) -> tuple[Float64, Float64]:
    """The lower triangular L with L L^T = square, and L^-1, both (n, n); `square` is overwritten.

    By halves, [[A, B^T], [B, C]] with A = L1 L1^T and D = B L1^-T has the root [[L1, 0], [D, L2]], L2 that of
    C - D D^T, and its inverse is [[L1', 0], [-L2' D L1', L2']]: nearly all the work is products, where
    LAPACK's factorisation and an inverse after it take half as long again.
    """
    lower, inverse = np.zeros(square.shape), np.zeros(square.shape)
    _root_into(square, lower, inverse)
    return lower, inverse


def _root_into(square: Float64, lower: Float64, inverse: Float64) -> None:
    if len(square) <= _ROOT_COLUMNS:
        lower[:] = np.linalg.cholesky(square)
        inverse[:] = np.tril(np.linalg.inv(lower))
        return
    half = len(square) // 2
    _root_into(square[:half, :half], lower[:half, :half], inverse[:half, :half])
    cross = square[half:, :half] @ inverse[:half, :half].T
    square[half:, half:] -= cross @ cross.T
    lower[half:, :half] = cross
    _root_into(square[half:, half:], lower[half:, half:], inverse[half:, half:])
    np.matmul(-inverse[half:, half:], cross @ inverse[:half, :half], out=inverse[half:, :half])


def row_scales(weights: Float32) -> Float32:
    """Root mean square of each row, rounded to float16: the codebook is that of the unit Gaussian."""
    scales: Float64 = np.sqrt(np.mean(np.square(weights, dtype=np.float64), axis=1))
    row = int(np.argmax(scales))
    check_float16(scales[row], f"row {row} has a root mean square")
    rounded: Float32 = scales.astype(np.float16).astype(np.float32)
    return rounded
