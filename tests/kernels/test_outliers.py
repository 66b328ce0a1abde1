"""Weights beside the planes: the native product against the oracle, bit for bit, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from taper.kernels import Outliers, num_threads, oracle, prepare, set_num_threads

IN_FEATURES, ROWS = 100, 37


def made(seed: int = 0) -> tuple[Any, Any, Any]:
    """Starts, columns and values of rows with none, one and many outliers, subnormal values among them."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 9, ROWS) * (generator.random(ROWS) < 0.7)
    lengths[-1] = IN_FEATURES
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    columns = [np.sort(generator.choice(IN_FEATURES, size, replace=False)) for size in lengths]
    values = generator.standard_normal(starts[-1]) * 10.0 ** generator.integers(-7, 4, starts[-1])
    return starts, np.concatenate(columns).astype(np.uint16), values.astype(np.float16)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("magnitude_bits", [7, 14, 15])
def test_product_is_the_oracle_bit_for_bit(tokens: int, threads: int, magnitude_bits: int) -> None:
    # Fails when terms are summed in another order, fused, or when a row without outliers is touched (-0 + 0).
    generator = np.random.default_rng(1)
    x = generator.standard_normal((tokens, IN_FEATURES)).astype(np.float32)
    out = generator.standard_normal((tokens, ROWS)).astype(np.float32)
    parts = made()
    out[:, np.diff(parts[0]) == 0] = -0.0
    acts = prepare(x, cols=128, signs=None, block=1, magnitude_bits=magnitude_bits)
    integers = oracle.OracleActivations(acts.q, acts.scale, acts.sum, acts.low, acts.low_sum)
    expected = oracle.add_outliers(out, integers, *parts)
    before = num_threads()
    try:
        set_num_threads(threads)
        Outliers(*parts, in_features=IN_FEATURES).add_product(acts, out)
    finally:
        set_num_threads(before)
    assert out.tobytes() == expected.tobytes()
    assert np.signbit(out[:, np.diff(parts[0]) == 0]).all()


def test_product_is_that_of_the_dense_matrix() -> None:
    # The oracle could share a mistake about which entries belong to which row; a dense product cannot.
    starts, columns, values = made(2)
    dense = np.zeros((ROWS, IN_FEATURES))
    for row in range(ROWS):
        for entry in range(starts[row], starts[row + 1]):
            dense[row, columns[entry]] = values[entry]
    acts = prepare(np.eye(IN_FEATURES, dtype=np.float32)[:5], cols=128, signs=None, block=1)
    out = np.zeros((5, ROWS), dtype=np.float32)
    Outliers(starts, columns, values, IN_FEATURES).add_product(acts, out)
    np.testing.assert_allclose(out, dense[:, :5].T, rtol=1e-6)
    rows = np.ones((3, IN_FEATURES), dtype=np.float32)
    Outliers(starts, columns, values, IN_FEATURES).add_rows(np.array([36, 0, 5], dtype=np.int32), rows)
    np.testing.assert_allclose(rows, 1 + dense[[36, 0, 5]], rtol=1e-6)


def test_bytes_are_those_of_the_arrays() -> None:
    starts, columns, values = made()
    outliers = Outliers(starts, columns, values, IN_FEATURES)
    assert outliers.num_bytes == starts.nbytes + columns.nbytes + values.nbytes


def test_hostile_rows_are_refused() -> None:
    columns, values = np.array([3, 5, 1], dtype=np.uint16), np.ones(3, dtype=np.float16)

    def build(starts: list[int], columns: Any = columns) -> None:
        Outliers(np.array(starts, dtype=np.int32), columns, values, 8)

    build([0, 2, 3])
    for starts in ([0, 2, 2], [1, 2, 3], [0, 4, 3], [0, 5, -1, 3], [0, -1, 3], [0], []):
        with pytest.raises(ValueError, match=r"outliers|expected"):
            build(starts)
    with pytest.raises(ValueError, match="must rise"):
        build([0, 3, 3])  # 5, 1 in one row
    with pytest.raises(ValueError, match="column 8"):
        build([0, 2, 3], np.array([3, 8, 1], dtype=np.uint16))
    with pytest.raises(ValueError, match="must rise"):
        build([0, 2, 3], np.array([3, 3, 1], dtype=np.uint16))
    with pytest.raises(TypeError, match="uint16"):
        build([0, 2, 3], columns.astype(np.int32))


def test_shapes_and_indices_are_refused() -> None:
    outliers = Outliers(*made(), in_features=IN_FEATURES)
    acts = prepare(np.ones((2, IN_FEATURES), dtype=np.float32), cols=128, signs=None, block=1)
    with pytest.raises(ValueError, match="out has shape"):
        outliers.add_product(acts, np.zeros((3, ROWS), dtype=np.float32))
    narrow = prepare(np.ones((2, 64), dtype=np.float32), cols=64, signs=None, block=1)
    with pytest.raises(ValueError, match="64 columns"):
        outliers.add_product(narrow, np.zeros((2, ROWS), dtype=np.float32))
    for index in (-1, ROWS):
        with pytest.raises(ValueError, match="outside"):
            outliers.add_rows(np.array([index]), np.zeros((1, IN_FEATURES), dtype=np.float32))
