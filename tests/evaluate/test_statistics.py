"""Estimates and their errors: against NumPy's definitions and against draws with known spread."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taper.evaluate.statistics import mean_of_blocks, proportion, quantiles_of_blocks


def test_mean_and_error_come_from_block_means() -> None:
    blocks = np.array([[1.0, 3.0], [5.0, 7.0], [2.0, 0.0]], dtype=np.float32)
    estimate = mean_of_blocks(blocks)
    assert estimate.value == 3.0
    # Means 2, 6, 1: s = sqrt(7). Counting the six tokens as independent would give 1.06.
    assert estimate.standard_error == pytest.approx(math.sqrt(7) / math.sqrt(3))
    assert mean_of_blocks(np.array([[True, False]])).value == 0.5
    assert mean_of_blocks(blocks[:1]).standard_error is None


@given(
    st.lists(st.floats(0, 100, width=32), min_size=1, max_size=60),
    st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.999, 1.0]),
)
def test_quantiles_are_numpys_inverted_distribution(values: list[float], q: float) -> None:
    blocks = np.array([values], dtype=np.float32)
    (estimate,) = quantiles_of_blocks(blocks, [q])
    assert estimate.value == np.quantile(blocks, q, method="inverted_cdf")
    assert estimate.standard_error is None


def test_the_999th_of_a_thousand_is_the_second_largest() -> None:
    blocks = np.arange(1000.0).reshape(2, 500)
    # 0.999 * 1000 is 999 and a bit in floating point: rounded up it would name the largest.
    assert [e.value for e in quantiles_of_blocks(blocks, [0.999, 0.9991])] == [998.0, 999.0]


def test_bootstrap_error_of_a_median() -> None:
    generator = np.random.default_rng(1)
    blocks = generator.standard_normal((400, 1))
    (estimate,) = quantiles_of_blocks(blocks, [0.5])
    # A sample median of n normals spreads by sqrt(pi / 2n) = 0.063; 200 resamples and the sample itself
    # know that to some 15 %.
    assert estimate.standard_error == pytest.approx(math.sqrt(math.pi / 800), rel=0.4)
    assert quantiles_of_blocks(blocks, [0.5]) == [estimate]
    assert quantiles_of_blocks(blocks, [0.5], seed=1) != [estimate]


def test_correlated_tokens_do_not_shrink_the_error() -> None:
    generator = np.random.default_rng(2)
    single = generator.standard_normal((100, 1))
    repeated = np.repeat(single, 50, axis=1)
    errors = [quantiles_of_blocks(blocks, [0.5])[0].standard_error for blocks in (single, repeated)]
    # The same 100 blocks say the same, however often each says it; drawing tokens would give a seventh.
    assert errors[1] == pytest.approx(errors[0], rel=1e-9)


def test_proportion() -> None:
    assert proportion(3, 4).value == 0.75
    assert proportion(3, 4).standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert proportion(1, 1).standard_error is None
