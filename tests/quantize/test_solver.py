"""The native solver against NumPy in float64, and the properties that its result must have."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from taper.errors import TaperError, UsageError
from taper.kernels import _native, num_threads, set_num_threads
from taper.quantize.codebook import NestedCodebook, gaussian_codebook
from taper.quantize.solver import (
    Solution,
    SolverOptions,
    factorise,
    importance_of,
    solve,
    triangular_root,
)

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

BOOK = gaussian_codebook(2, 5)


def problem(rows: int, cols: int, seed: int = 0) -> tuple[F32, F64]:
    """Gaussian weights, and second moments with strong correlations."""
    generator = np.random.default_rng(seed)
    weights = (generator.standard_normal((rows, cols)) * generator.uniform(0.02, 2, (rows, 1))).astype(
        np.float32
    )
    mixing = generator.standard_normal((cols, cols)) * np.linspace(0.1, 2, cols)
    return weights, mixing @ mixing.T / cols


def dequantised(solution: Solution, bits: int, book: NestedCodebook = BOOK) -> F64:
    level = book.level(bits)
    values = level.reals[solution.codes >> (book.max_bits - bits)].astype(np.float64)
    return values * solution.scales[bits - book.min_bits].astype(np.float64)[:, None]


def errors(weights: F32, moments: F64, solution: Solution, damping: float = 0.01) -> dict[int, F64]:
    """Row by row (w - q) H (w - q)^T at every width, H damped as the solver does."""
    hessian = moments / np.mean(np.diag(moments)) + damping * np.eye(len(moments))
    found = {}
    for level in BOOK.levels:
        rest = weights - dequantised(solution, level.bits)
        found[level.bits] = np.einsum("ij,jk,ik->i", rest, hessian, rest)
    return found


def path_costs(targets: F64, scales: F64, importance: F64) -> F64:
    """Weighted squared error of every leaf: the sum over its path. targets, scales, importance: (levels)."""
    leaves = np.arange(2**BOOK.max_bits)
    cost = np.zeros(len(leaves))
    for target, scale, weight, level in zip(targets, scales, importance, BOOK.levels, strict=True):
        values = level.reals[leaves >> (BOOK.max_bits - level.bits)].astype(np.float64) * scale
        cost += weight * (target - values) ** 2
    return cost


def reference_sweep(weights: F32, moments: F64, base: float) -> npt.NDArray[np.uint8]:
    """GPTQ at all widths at once, row by row and column by column, in float64."""
    _, factor, _ = factorise(moments, 0.01)
    upper = factor.astype(np.float64)
    importance = base ** np.arange(len(BOOK.levels))
    codes = np.zeros(weights.shape, dtype=np.uint8)
    for row, weight in enumerate(weights.astype(np.float64)):
        scale = float(np.float16(np.sqrt(np.mean(weight**2))))
        work = np.repeat(weight[None, :], len(BOOK.levels), axis=0)
        for col in range(len(weight)):
            leaf = int(np.argmin(path_costs(work[:, col], np.full(len(work), scale), importance)))
            codes[row, col] = leaf
            for index, level in enumerate(BOOK.levels):
                value = float(level.reals[leaf >> (BOOK.max_bits - level.bits)]) * scale
                error = (work[index, col] - value) / upper[col, col]
                work[index, col + 1 :] -= error * upper[col, col + 1 :]
    return codes


def test_sweep_is_gptq_at_every_width() -> None:
    # 140 columns cross the border of the solver's blocks of 128.
    weights, moments = problem(6, 140)
    solution = solve(weights, moments, BOOK, SolverOptions(passes=0, refit_scales=False))
    expected = reference_sweep(weights, moments, SolverOptions().importance_base)
    # float32 may turn one near tie, after which the rest of that row differs; else whole rows agree.
    agree = (solution.codes == expected).all(axis=1)
    assert agree.mean() >= 5 / 6
    np.testing.assert_array_equal(solution.codes[:, :8], expected[:, :8])


@pytest.mark.parametrize("base", [0.25, 1.0, 4.0])
def test_without_correlations_each_code_is_the_exact_best_leaf(base: float) -> None:
    weights, _ = problem(16, 64, seed=1)
    options = SolverOptions(importance_base=base, passes=0, refit_scales=False)
    solution = solve(weights, np.eye(64), BOOK, options)
    importance = base ** np.arange(len(BOOK.levels))
    for row in range(len(weights)):
        scales = solution.scales[:, row].astype(np.float64)
        for col in range(0, 64, 5):
            targets = np.full(len(BOOK.levels), float(weights[row, col]))
            costs = path_costs(targets, scales, importance)
            assert costs[solution.codes[row, col]] <= costs.min() * (1 + 1e-4) + 1e-12


def test_feedback_and_passes_lower_the_output_error() -> None:
    weights, moments = problem(32, 128, seed=2)

    def total(options: SolverOptions, seen: F64) -> list[float]:
        solution = solve(weights, seen, BOOK, options)
        return [float(e.sum()) for e in errors(weights, moments, solution).values()]

    rounding = total(SolverOptions(passes=0), np.eye(128))
    sweep = total(SolverOptions(passes=0), moments)
    assert all(better < worse for better, worse in zip(sweep, rounding, strict=True))
    assert sweep[1] < 0.7 * rounding[1]

    importance = SolverOptions().importance_base ** np.arange(len(BOOK.levels))
    objective = [
        float(importance @ total(SolverOptions(passes=passes, refit_scales=False), moments))
        for passes in range(4)
    ]
    # Coordinate descent can only lower its objective; 1e-4 is room for float32 products.
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(objective))
    assert objective[1] < 0.99 * objective[0]


def test_importance_grows_by_its_base_and_above_six_bits_by_the_root() -> None:
    figures = [importance_of(4.0, bits) for bits in range(4, 9)]
    assert [more / less for less, more in pairwise(figures)] == [4.0, 4.0, 2.0, 2.0]


def test_scales_are_the_least_squares_ones() -> None:
    weights, moments = problem(8, 96, seed=3)
    solution = solve(weights, moments, BOOK, SolverOptions())
    hessian = moments / np.mean(np.diag(moments)) + 0.01 * np.eye(96)
    for bits in (2, 5):
        scales = solution.scales[bits - 2].astype(np.float64)
        values = dequantised(solution, bits) / scales[:, None]
        best = np.einsum("ij,jk,ik->i", weights, hessian, values) / np.einsum(
            "ij,jk,ik->i", values, hessian, values
        )
        # float16 rounds to 2^-11; float32 products add less.
        np.testing.assert_allclose(scales, best, rtol=2**-11 + 2**-16)


def test_reported_errors_are_those_of_the_result() -> None:
    weights, moments = problem(8, 96, seed=4)
    solution = solve(weights, moments, BOOK, SolverOptions())
    hessian = moments / np.mean(np.diag(moments)) + 0.01 * np.eye(96)
    energy = np.einsum("ij,jk,ik->", weights, hessian, weights)
    expected = [e.sum() / energy for e in errors(weights, moments, solution).values()]
    np.testing.assert_allclose(solution.relative_errors, expected, rtol=1e-3)


def test_threads_and_neighbouring_rows_change_nothing() -> None:
    weights, moments = problem(37, 80, seed=5)
    before = num_threads()
    try:
        set_num_threads(1)
        one = solve(weights, moments, BOOK, SolverOptions())
        set_num_threads(3)
        three = solve(weights, moments, BOOK, SolverOptions())
    finally:
        set_num_threads(before)
    tail = solve(weights[5:], moments, BOOK, SolverOptions())
    for other, rows in ((three, slice(None)), (tail, slice(5, None))):
        np.testing.assert_array_equal(one.codes[rows], other.codes)
        np.testing.assert_array_equal(one.scales[:, rows], other.scales)


def test_dead_inputs_and_zero_rows_are_harmless() -> None:
    weights, moments = problem(4, 32, seed=6)
    moments[:, 7] = moments[7, :] = 0
    weights[2] = 0
    solution = solve(weights, moments, BOOK, SolverOptions())
    assert np.isfinite(solution.scales).all()
    assert (solution.scales[:, 2] == 0).all()
    assert np.isfinite(solution.relative_errors).all()
    silent = solve(weights, np.zeros((32, 32)), BOOK, SolverOptions())
    assert np.isfinite(silent.relative_errors).all()


def test_factor_is_the_upper_root_of_the_inverse() -> None:
    _, moments = problem(1, 50, seed=7)
    hessian, factor, root = factorise(moments, 0.01)
    assert np.array_equal(factor, np.triu(factor))
    product = factor.astype(np.float64).T @ factor.astype(np.float64) @ hessian.astype(np.float64)
    np.testing.assert_allclose(product, np.eye(50), atol=1e-3)
    assert np.array_equal(root, np.tril(root))
    np.testing.assert_allclose(root.T @ root, hessian, atol=1e-3)


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(TaperError, match="row 1 has a root mean square of 1e"):
        solve(np.array([[1.0, 1.0], [1e6, 1e6]], dtype=np.float32), np.eye(2), BOOK, SolverOptions())


def test_weights_that_are_not_finite_are_refused() -> None:
    """Costs that are no numbers have no least one to stop the search at."""
    weights = np.full((2, 4), np.nan, dtype=np.float32)
    eye, ones = np.eye(4, dtype=np.float32), np.ones((3, 2), dtype=np.float32)
    values = np.concatenate([level.reals for level in gaussian_codebook(2, 4).levels])
    with pytest.raises(ValueError, match="weight 0 is nan"):
        _native.solve_nested(weights, eye, eye, eye, values, ones[:, 0].copy(), ones, 2, 4, 1, True)


@pytest.mark.parametrize("size", [1, 128, 129, 300])
def test_root_and_inverse_are_found_by_halves(size: int) -> None:
    wide = np.random.default_rng(size).standard_normal((size, 2 * size))
    square = wide @ wide.T / size
    expected = np.linalg.cholesky(square)
    lower, inverse = triangular_root(square.copy())
    assert np.array_equal(lower, np.tril(lower))
    assert np.array_equal(inverse, np.tril(inverse))
    # Either is within n u cond of the true one (Higham, Accuracy and Stability, sections 10.1 and 14.2).
    tolerance = 2 * size * np.finfo(np.float64).eps * np.linalg.cond(expected)
    assert np.linalg.norm(lower - expected) <= tolerance * np.linalg.norm(expected)
    assert np.linalg.norm(inverse - np.linalg.inv(expected)) <= tolerance * np.linalg.norm(inverse)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("importance_base", 0.0),
        ("importance_base", float("nan")),
        ("damping", 0.0),
        ("passes", -1),
        ("lookup_share", -0.1),
    ],
)
def test_options_outside_their_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=field.replace("_", " ")):
        SolverOptions(**{field: value})
