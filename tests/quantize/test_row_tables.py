"""Tables of each row's own values: against exact programmes over all cuts, and rules worked out by hand."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

from taper.errors import TaperError
from taper.kernels import _native, num_threads, set_num_threads
from taper.quantize.row_tables import fit_row_tables, round_tables

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def problem(rows: int, cols: int, seed: int = 0) -> tuple[F32, F32]:
    generator = np.random.default_rng(seed)
    weights = generator.standard_t(5, (rows, cols)).astype(np.float32)
    return weights, generator.gamma(0.7, size=(1, cols)).astype(np.float32) + np.float32(0.01)


def fit(
    weights: F32,
    sensitivity: F32,
    bits: tuple[int, int],
    base: float = 3.0,
    cells: int = 128,
    greedy: bool = False,
) -> tuple[npt.NDArray[np.uint8], dict[int, F64]]:
    """Codes, and each width's values before they are rounded to int8."""
    widths = range(bits[0], bits[1] + 1)
    importance = np.array([base ** (b - bits[0]) for b in widths], dtype=np.float32)
    codes, flat = _native.fit_row_tables(weights, sensitivity, importance, *bits, cells, greedy, 0)
    parts = np.split(flat.astype(np.float64), np.cumsum([2**b for b in widths])[:-1], axis=1)
    return codes, dict(zip(widths, parts, strict=True))


def objective(
    weights: F32, sensitivity: F32, codes: npt.NDArray[np.uint8], values: dict[int, F64], base: float = 3.0
) -> F64:
    """Row by row sum over the widths of importance times weighted squared error."""
    total = np.zeros(len(weights))
    for bits, table in values.items():
        chosen = np.take_along_axis(table, (codes >> (max(values) - bits)).astype(np.intp), axis=1)
        total += base ** (bits - min(values)) * np.sum(sensitivity * (weights - chosen) ** 2, axis=1)
    return total


def best_tree(row: F32, sensitivity: F32, bits: tuple[int, int], base: float = 3.0) -> float:
    """The least objective over all trees of runs of the sorted row, by trying every cut of every run."""
    order = np.argsort(row)
    x, f = row[order].astype(np.float64), sensitivity[order].astype(np.float64)

    def cost(i: int, j: int) -> float:
        if i == j:
            return 0.0
        mean = np.sum(f[i:j] * x[i:j]) / np.sum(f[i:j])
        return float(np.sum(f[i:j] * (x[i:j] - mean) ** 2))

    @cache
    def least(width: int, i: int, j: int) -> float:
        own = base ** (width - bits[0]) * cost(i, j) if width >= bits[0] else 0.0
        if width == bits[1] or i == j:
            return own
        return own + min(least(width + 1, i, k) + least(width + 1, k, j) for k in range(i, j + 1))

    return least(0, 0, len(x))


@pytest.mark.parametrize("bits", [(2, 4), (1, 3), (3, 3), (2, 2)])
def test_joint_tree_is_the_best_of_all_trees(bits: tuple[int, int]) -> None:
    # Fails when a width's weight, the order of the children or the traceback of the programme is wrong. The
    # programme runs in float32, so a tie within 1e-6 may go the other way.
    weights, sensitivity = problem(4, 22)
    codes, values = fit(weights, sensitivity, bits)
    found = objective(weights, sensitivity, codes, values)
    best = [best_tree(row, sensitivity[0], bits) for row in weights]
    np.testing.assert_allclose(found, best, rtol=2e-5, atol=1e-6 * np.sum(weights**2))


def test_cells_cost_little() -> None:
    # 40 cells for 200 weights: fails without the steps off the grid, or with cells of equal width.
    weights, sensitivity = problem(6, 200, seed=1)
    exact = objective(weights, sensitivity, *fit(weights, sensitivity, (2, 4), cells=200))
    coarse = objective(weights, sensitivity, *fit(weights, sensitivity, (2, 4), cells=40))
    assert np.all(coarse >= exact * (1 - 1e-5))
    assert coarse.sum() < 1.02 * exact.sum()


def test_codes_are_nested_intervals_and_values_their_centroids() -> None:
    weights, sensitivity = problem(3, 300, seed=2)
    for greedy in (False, True):
        codes, values = fit(weights, sensitivity, (2, 5), greedy=greedy)
        for row, code in zip(weights, codes, strict=True):
            assert np.all(np.diff(code[np.argsort(row)].astype(int)) >= 0)
        for bits, table in values.items():
            for row, code, centres in zip(weights, codes >> (5 - bits), table, strict=True):
                for leaf in np.unique(code):
                    inside = code == leaf
                    mean = np.average(row[inside], weights=sensitivity[0][inside])
                    assert centres[leaf] == pytest.approx(mean, rel=1e-5, abs=1e-6)


def test_joint_beats_greedy_where_widths_are_shared() -> None:
    # Greedy is the better one at its least width alone.
    weights, sensitivity = problem(16, 512, seed=3)
    joint = objective(weights, sensitivity, *fit(weights, sensitivity, (2, 6)))
    greedy = objective(weights, sensitivity, *fit(weights, sensitivity, (2, 6), greedy=True))
    assert joint.sum() < 0.97 * greedy.sum()


def test_greedy_seed_is_a_fixed_point_of_weighted_k_means() -> None:
    weights, sensitivity = problem(8, 400, seed=4)
    codes, values = fit(weights, sensitivity, (3, 3), greedy=True)
    for row, code, centres in zip(weights, codes, values[3], strict=True):
        nearest = np.argmin(np.abs(row[:, None] - centres[None, :]), axis=1)
        border = np.min(np.abs(row[:, None] - 0.5 * (centres[1:] + centres[:-1])[None, :]), axis=1)
        assert np.all((nearest == code) | (border < 1e-5))


def test_greedy_splits_by_hand() -> None:
    # One cluster each at 1 bit: {0, 1, 10} and {100, 101, 140}. Bisection of three begins at the middle:
    # {0 | 1, 10} has its border at 2.75 > 1, so {0, 1 | 10}: border 5.25, which is left alone. Likewise the
    # other. At 3 bits two elements part, and a single one gives both children its own value.
    weights = np.array([[0, 1, 10, 100, 101, 140]], dtype=np.float32)
    codes, values = fit(weights, np.ones((1, 6), dtype=np.float32), (1, 3), greedy=True)
    assert values[2].tolist() == [[0.5, 10.0, 100.5, 140.0]]
    assert values[3].tolist() == [[0, 1, 10, 10, 100, 101, 140, 140]]
    assert (codes >> 2).tolist() == [[0, 0, 0, 1, 1, 1]]
    assert (codes >> 1).tolist() == [[0, 0, 1, 2, 2, 3]]
    assert (codes & 1)[0, [0, 1, 3, 4]].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("greedy", [False, True])
def test_fewer_weights_than_leaves_and_rows_without_sensitivity(greedy: bool) -> None:
    weights = np.array([[3, 3, 3, 3], [1, 2, 3, 4], [0, 0, 0, 0]], dtype=np.float32)
    sensitivity = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=np.float32)
    tables = fit_row_tables(weights, sensitivity, (2, 4), importance_base=3.0, greedy=greedy)
    # A row of zeros in sensitivity counts as ones; float16 steps of 4/127 cost half a step at most.
    np.testing.assert_allclose(tables.dequantised(4), weights, atol=0.02)


def test_threads_and_calls_do_not_change_the_tables() -> None:
    weights, sensitivity = problem(20, 256, seed=5)
    before = num_threads()
    try:
        found = []
        for threads in (1, 3):
            set_num_threads(threads)
            found.append(
                fit_row_tables(weights, sensitivity, (2, 4), importance_base=3.0, greedy=True, seed=7)
            )
    finally:
        set_num_threads(before)
    assert np.array_equal(found[0].codes, found[1].codes)
    assert all(np.array_equal(found[0].values[b], found[1].values[b]) for b in (2, 3, 4))


def test_rounding_uses_all_steps_and_never_overflows() -> None:
    reals = np.array([[-1.0, -0.25, 0.5, 0.999], [1e-9, 0, 0, -1e-9], [0, 0, 0, 0]], dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        tables = round_tables(np.array([[0, 1, 2, 3]] * 3, dtype=np.uint8), {2: reals})
    assert tables.values[2][0].tolist() == [-127, -32, 63, 127]
    assert tables.values[2].min() >= -127
    assert np.all(tables.scales[:, 2] == 0)
    np.testing.assert_allclose(tables.dequantised(2)[0], reals[0], atol=0.5 / 127 * 1.001)


def test_refusals() -> None:
    weights, sensitivity = problem(2, 8)
    with pytest.raises(TaperError, match=r"has a scale of .*, beyond float16"):
        fit_row_tables(weights * np.float32(1e8), sensitivity, (2, 3), importance_base=3.0)
    with pytest.raises(ValueError, match="weight 0 is"):
        fit_row_tables(np.full((1, 8), np.nan, dtype=np.float32), sensitivity, (2, 3), importance_base=3.0)
    with pytest.raises(ValueError, match="sensitivity 0 is"):
        fit_row_tables(weights, -sensitivity, (2, 3), importance_base=3.0)
