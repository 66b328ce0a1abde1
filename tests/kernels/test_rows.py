"""Row operations of every instruction set against the NumPy oracle, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    assert_on_every_isa,
    rows,
    rows_with_specials,
    seeds,
    signs,
    thread_counts,
    threads,
    widths,
)

from taper import kernels
from taper.kernels import oracle

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 4), widths, st.booleans(), thread_counts)
def test_rms_norm(seed, tokens, width, with_gain, num_threads):
    x = rows_with_specials(seed, tokens, width)
    gain = rows(seed + 1, 1, width)[0] if with_gain else None
    with threads(num_threads):
        assert_on_every_isa(lambda: kernels.rms_norm(x, gain, 1e-5), oracle.rms_norm(x, gain, 1e-5))


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 4), widths, st.booleans(), thread_counts)
def test_rotate(seed, tokens, width, inverse, num_threads):
    x, s, block = rows_with_specials(seed, tokens, width), signs(seed, width), kernels.hadamard_block(width)
    with threads(num_threads):
        assert_on_every_isa(lambda: kernels.rotate(x, s, block, inverse), oracle.rotate(x, s, block, inverse))


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128, 512])
def test_rotate_blocks_smaller_than_the_row(block):
    x, s = rows(block, 2, 1536), signs(block, 1536)
    assert_on_every_isa(lambda: kernels.rotate(x, s, block), oracle.rotate(x, s, block))


@pytest.mark.parametrize("width", [172, 576, 2048])
def test_rotate_is_orthogonal(width):
    x, s, block = rows(width, 3, width), signs(width, width), kernels.hadamard_block(width)
    turned = kernels.rotate(x, s, block)
    # log2(block) + 2 roundings of half an ulp each way, on values of the row's own size.
    bound = 2 * (np.log2(block) + 2) * 2.0**-24 * np.linalg.norm(x, axis=1, keepdims=True)
    assert (np.abs(kernels.rotate(turned, s, block, inverse=True) - x) <= bound).all()
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)


def test_rotate_leaves_its_input():
    x = rows(0, 2, 64)
    before = x.copy()
    kernels.rotate(x, signs(0, 64), 64)
    np.testing.assert_array_equal(x, before)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 4), widths, thread_counts)
def test_swiglu(seed, tokens, width, num_threads):
    gate_up = rows_with_specials(seed, tokens, 2 * width)
    with threads(num_threads):
        assert_on_every_isa(lambda: kernels.swiglu(gate_up), oracle.swiglu(gate_up))


@settings(max_examples=40, deadline=None)
@given(seeds, widths)
def test_exp(seed, width):
    x = rows_with_specials(seed, 3, width)
    assert_on_every_isa(lambda: kernels.exp(x), oracle.exp(x))


def test_exp_is_within_two_ulp_of_the_exponential():
    x = np.linspace(-87, 88, 200_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    # The polynomial's own error at |r| = ln2 / 2 is r**7 / 5040 = 1.2e-7, one ulp; its roundings add less
    # than another.
    assert (np.abs(kernels.exp(x) - exact) <= 2 * 2.0**-23 * exact).all()


def test_the_weights_of_a_softmax_are_as_exact_as_the_largest_needs():
    x = np.linspace(-90, 0, 200_001, dtype=np.float32)
    found = oracle.weight32(x)
    # Of x * log2(e), |t| units of 2**-24 are lost; |t| * 2**t is at most 0.54. The polynomial's own error is
    # 0.92 and its roundings' 1.5 units of 2**-24, both relative; below 2**-100 the weight stays there.
    assert (np.abs(found - np.exp(x.astype(np.float64))) <= 3 * 2.0**-24).all()
    assert found[-1] == 1
    assert oracle.weight32(np.array([-np.inf], np.float32))[0] == 2.0**-100
    assert np.isnan(oracle.weight32(np.array([np.nan], np.float32))[0])


def test_exp_at_the_ends_of_its_range():
    x = np.array([-np.inf, -87.00001, -87.0, 0.0, -0.0, 88.0, 200.0, np.inf, np.nan], np.float32)
    y = kernels.exp(x)
    assert y[0] == y[1] == 0
    assert y[2] > 0
    assert y[3] == y[4] == 1
    assert y[5] == y[6] == y[7] < np.inf
    assert np.isnan(y[8])


def test_exp_of_a_long_array_is_split_over_threads_without_a_trace():
    x = rows(1, 1, 100_003)[0]
    with threads(1):
        alone = kernels.exp(x)
    with threads(2):
        np.testing.assert_array_equal(kernels.exp(x), alone)
