"""One matrix by any of the methods: codebooks and ways to choose codes, and what goes with what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.formats.outliers import OUTLIER_PARTS, OutlierRows
from taper.quantize.codebook import NestedCodebook, gaussian_codebook
from taper.quantize.gptq import gptq
from taper.quantize.nearest import grid_scales, nearest, uniform_codebook
from taper.quantize.outliers import split_outliers
from taper.quantize.row_tables import fit_row_tables
from taper.quantize.solver import SolverOptions, solve

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# Codebook to the ways of choosing its codes, its own first.
METHODS: dict[str, tuple[str, ...]] = {
    "shared": ("nested", "nearest", "gptq"),
    "uniform": ("nearest", "gptq"),
    "row": ("nested",),
    "row-greedy": ("nested",),
}
ROW_MAX_BITS = 6  # tables of 7 and 8 bits take 384 and 768 bytes a row
_MAX_OUTLIERS = 0.1


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """Which codebook, and how its codes are chosen (docs/quantization.md, "Codebooks of the papers").

    Attributes:
        codebook: `shared` (the Gaussian tree, rotated weights), `uniform` (a grid up to each row's largest
            weight), `row` (tables of each row, jointly cut) or `row-greedy` (cut as Any-Precision LLM does);
            all but the first over weights that are not rotated.
        method: `nested` (all widths together), `nearest` or `gptq`; None is the codebook's own.
        outliers: share of the weights that stay in float16 beside the planes.
    """

    codebook: str = "shared"
    method: str | None = None
    outliers: float = 0.0

    def __post_init__(self) -> None:
        if self.codebook not in METHODS:
            raise UsageError(f"codebook {self.codebook!r} is none of {', '.join(METHODS)}")
        if self.method is not None and self.method not in METHODS[self.codebook]:
            raise UsageError(
                f"method {self.method!r} does not go with codebook {self.codebook!r}",
                hint=f"choose {' or '.join(METHODS[self.codebook])}",
            )
        if not 0 <= self.outliers <= _MAX_OUTLIERS:
            raise UsageError(
                f"a share of {self.outliers:g} outliers is outside 0..{_MAX_OUTLIERS:g}",
                hint="SqueezeLLM takes 0.45%",
            )

    @property
    def resolved(self) -> str:
        """The method, the codebook's own where none is given."""
        return self.method or METHODS[self.codebook][0]

    @property
    def has_tables(self) -> bool:
        """Whether every row has values of its own."""
        return self.codebook in ("row", "row-greedy")

    @property
    def rotated(self) -> bool:
        """Whether the weights are rotated first."""
        return self.codebook == "shared"

    @property
    def is_adjusted(self) -> bool:
        """Whether columns are balanced and inputs centred; the papers' methods take them as they are."""
        return (self.codebook, self.resolved) == ("shared", "nested") and not self.outliers

    def build_codebook(self, bits: tuple[int, int]) -> NestedCodebook:
        """The header's codebook; where rows have their own values, only its widths count.

        Raises:
            UsageError: bits that the codebook or the method cannot have.
        """
        if self.resolved == "gptq" and bits[0] != bits[1]:
            raise UsageError(
                f"plain GPTQ makes one width, not {bits[0]}-{bits[1]}",
                hint=f"give one width, as in --bits {bits[1]}",
            )
        if self.has_tables and bits[1] > ROW_MAX_BITS:
            raise UsageError(
                f"tables of each row go up to {ROW_MAX_BITS} bits, not {bits[1]}",
                hint=f"give --bits {min(bits[0], ROW_MAX_BITS)}-{ROW_MAX_BITS}",
            )
        if self.codebook == "shared":
            return gaussian_codebook(*bits)
        levels = uniform_codebook(*bits).levels
        # A row's own values are worth their row's scale and nothing else.
        scale = 1.0 if self.has_tables else None
        return NestedCodebook(tuple(replace(level, scale=scale or level.scale) for level in levels))


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """What a method makes of one matrix.

    Attributes:
        codes: uint8 (out_features, in_features), max_bits wide.
        scales: float16 (levels, out_features).
        relative_errors: for each width, output error over output energy, both summed over all rows.
        tables: int8 (out_features, sum of 2**bits over the widths), or None.
        outliers: beside the planes, or None.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    relative_errors: tuple[float, ...]
    tables: NDArray[np.int8] | None = None
    outliers: OutlierRows | None = None

    def extras(self) -> dict[str, NDArray[Any]]:
        """Tables and outliers by name, where they are."""
        found: dict[str, NDArray[Any]] = {} if self.tables is None else {"tables": self.tables}
        if self.outliers is not None:
            found |= {f"outliers.{part}": getattr(self.outliers, part) for part in OUTLIER_PARTS}
        return found


@dataclass(frozen=True, slots=True)
class MatrixProblem:
    """One matrix and what is known about its inputs.

    Attributes:
        weights: float32 (out_features, in_features), rotated where the method says so.
        moments: float64 (in_features, in_features), E[x x^T] of the inputs, rotated alike.
        sensitivity: float32 (out_features, in_features) of each weight; None takes the moments' diagonal.
    """

    weights: Float32
    moments: Float64
    sensitivity: Float32 | None = None

    def row_sensitivity(self, damping: float) -> Float32:
        """Sensitivity with `damping` times its mean added, so that no weight counts nothing."""
        raw = np.diag(self.moments)[None, :] if self.sensitivity is None else self.sensitivity
        mean = float(np.mean(raw, dtype=np.float64))
        scaled: Float32 = (raw / mean + damping if mean > 0 else np.ones(raw.shape)).astype(np.float32)
        return scaled


def quantize_matrix(
    problem: MatrixProblem,
    codebook: NestedCodebook,
    method: MethodOptions,
    solver: SolverOptions,
    seed: int,
    on_rows: Callable[[int], None] | None = None,
) -> QuantizedMatrix:
    """Quantise one matrix. The result does not depend on the number of threads.

    Args:
        problem: weights and moments.
        codebook: of `method.build_codebook`.
        method: see `MethodOptions`.
        solver: damping for all, weights of the widths for all nested ones, the rest for the shared codebook.
        seed: of the greedy tables' start.
        on_rows: called with the number of rows done, now and then.

    Raises:
        TaperError: a scale or an outlier is beyond float16.
    """
    outliers, dense = None, problem.weights
    if method.outliers:
        sensitivity = problem.row_sensitivity(solver.damping)
        outliers, dense = split_outliers(problem.weights, sensitivity, method.outliers)
    if method.has_tables:
        made = _row_tables(problem, dense, outliers, codebook, method, solver, seed)
        if on_rows is not None:
            on_rows(len(dense))
        return made
    if (method.codebook, method.resolved) == ("shared", "nested"):
        found = solve(dense, problem.moments, codebook, solver, on_rows)
        return QuantizedMatrix(found.codes, found.scales, found.relative_errors, None, outliers)
    return _one_scale_a_row(problem, dense, outliers, codebook, method, solver.damping, on_rows)


def _one_scale_a_row(
    problem: MatrixProblem,
    dense: Float32,
    outliers: OutlierRows | None,
    codebook: NestedCodebook,
    method: MethodOptions,
    damping: float,
    on_rows: Callable[[int], None] | None,
) -> QuantizedMatrix:
    """Plain GPTQ or nearest codes: the scales come from the weights alone and serve every width."""
    scales = grid_scales(dense, uniform=method.codebook == "uniform")
    if method.resolved == "gptq":
        codes = gptq(dense, problem.moments, codebook, scales, damping, on_rows)
    else:
        codes = nearest(dense, codebook, scales)
        if on_rows is not None:
            on_rows(len(dense))
    errors = tuple(
        _relative_error(
            dense - level.reals[codes >> (codebook.max_bits - level.bits)] * scales[:, None],
            problem,
            damping,
        )
        for level in codebook.levels
    )
    kept = np.repeat(scales[None, :], len(codebook.levels), axis=0).astype(np.float16)
    return QuantizedMatrix(codes, kept, errors, None, outliers)


def _row_tables(
    problem: MatrixProblem,
    dense: Float32,
    outliers: OutlierRows | None,
    codebook: NestedCodebook,
    method: MethodOptions,
    solver: SolverOptions,
    seed: int,
) -> QuantizedMatrix:
    sensitivity = problem.row_sensitivity(solver.damping)
    if outliers is not None:  # what is kept beside the planes does not pull at the tables
        taken = outliers.dense(dense.shape[1]) != 0
        sensitivity = np.where(taken, np.float32(0), np.broadcast_to(sensitivity, dense.shape))
    bits = (codebook.min_bits, codebook.max_bits)
    tables = fit_row_tables(
        dense,
        sensitivity,
        bits,
        importance_base=solver.importance_base,
        greedy=method.codebook == "row-greedy",
        seed=seed,
    )
    errors = tuple(
        _relative_error(dense - tables.dequantised(width), problem, solver.damping)
        for width in range(bits[0], bits[1] + 1)
    )
    flat = np.concatenate([tables.values[width] for width in range(bits[0], bits[1] + 1)], axis=1)
    return QuantizedMatrix(tables.codes, tables.scales, errors, flat, outliers)


def _relative_error(rest: Float32, problem: MatrixProblem, damping: float) -> float:
    """tr(rest H rest^T) over the same of the weights, H damped as the solver does."""
    mean = float(np.trace(problem.moments)) / len(problem.moments)
    hessian = (problem.moments / mean if mean > 0 else 0 * problem.moments).astype(np.float32)
    hessian[np.diag_indices_from(hessian)] += np.float32(damping)
    error, energy = (
        float(np.einsum("ij,ij->", x @ hessian, x, dtype=np.float64)) for x in (rest, problem.weights)
    )
    return error / energy if energy > 0 else 0.0
