"""Activations of every instruction set against the NumPy oracle, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    ISAS,
    assert_same_bits,
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


def assert_same_activations(got, expected):
    assert_same_bits(got.scale, expected.scale)
    assert_same_bits(got.q, expected.q)
    assert_same_bits(got.sum, expected.sum)
    assert (got.low is None) == (expected.low is None)
    if expected.low is not None:
        assert_same_bits(got.low, expected.low)
        assert_same_bits(got.low_sum, expected.low_sum)


@settings(max_examples=80, deadline=None)
@given(seeds, st.integers(1, 4), widths, st.booleans(), st.booleans(), st.integers(1, 15), thread_counts)
def test_prepare(seed, tokens, width, with_norm, with_rotation, magnitude_bits, num_threads):
    x = rows_with_specials(seed, tokens, width)
    arguments = {
        "cols": kernels.padded_cols(width),
        "signs": signs(seed, width) if with_rotation else None,
        "block": kernels.hadamard_block(width),
        "eps": 1e-5 if with_norm else None,
        "gain": rows(seed + 1, 1, width)[0] if with_norm and seed % 2 else None,
        "magnitude_bits": magnitude_bits,
    }
    expected = oracle.prepare(x, **arguments)
    with threads(num_threads):
        for isa in ISAS:
            with kernels.use_isa(isa):
                assert_same_activations(kernels.prepare(x, **arguments), expected)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 4), widths, st.integers(1, 15))
def test_prepare_swiglu(seed, tokens, width, magnitude_bits):
    gate_up = rows_with_specials(seed, tokens, 2 * width)
    cols, s, block = kernels.padded_cols(width), signs(seed, width), kernels.hadamard_block(width)
    expected = oracle.prepare(
        oracle.swiglu(gate_up), cols=cols, signs=s, block=block, magnitude_bits=magnitude_bits
    )
    for isa in ISAS:
        with kernels.use_isa(isa):
            made = kernels.prepare_swiglu(
                gate_up, cols=cols, signs=s, block=block, magnitude_bits=magnitude_bits
            )
            assert_same_activations(made, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("largest", "scale", "q"),
    [
        (127.0, 1.0, 127),
        (127.49, 1.0, 127),
        (127.5, 2.0, 64),  # rounds to 128 at scale 1, which is out of range
        (1.0, 2.0**-6, 64),
        (0.0, 1.0, 0),
        (1e-45, 2.0**-100, 0),  # below half of the least scale
        (np.float32(3.4e38), 2.0**121, 128),
    ],
)
def test_exponent_of_a_row(isa, largest, scale, q):
    x = np.zeros((1, 64), np.float32)
    x[0, 5] = -largest
    with kernels.use_isa(isa):
        made = kernels.prepare(x, cols=64, signs=None, block=1)
    if q == 128:
        scale, q = 2 * scale, 64
    assert made.scale[0] == scale
    assert made.q[0, 5] == -q
    assert made.sum[0] == -q


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_row_that_is_not_finite_says_so_in_its_scale(isa, poison):
    x = rows(0, 2, 100)
    x[1, 99] = poison
    with kernels.use_isa(isa):
        made = kernels.prepare(x, cols=128, signs=None, block=1)
    assert np.isfinite(made.scale[0])
    assert np.isnan(made.scale[1])
    assert not made.q[1].any()
    assert made.sum[1] == 0


@pytest.mark.parametrize("isa", ISAS)
def test_padding_is_zero_in_used_memory(isa):
    with kernels.use_isa(isa):
        for _ in range(4):  # memory that the allocator hands out again is full of the last round's bytes
            kernels.prepare(rows(1, 3, 128, 100.0), cols=128, signs=None, block=1)
            made = kernels.prepare(rows(2, 3, 70), cols=128, signs=None, block=1)
            assert not made.q[:, 70:].any()


def test_a_token_alone_equals_itself_in_a_batch():
    x, s = rows(3, 33, 576), signs(3, 576)
    together = kernels.prepare(x, cols=576, signs=s, block=64, eps=1e-5)
    for t in (0, 16, 32):
        alone = kernels.prepare(x[t : t + 1], cols=576, signs=s, block=64, eps=1e-5)
        assert_same_bits(alone.q[0], together.q[t])
        assert_same_bits(alone.scale, together.scale[t : t + 1])


@pytest.mark.parametrize("isa", ISAS)
def test_parts_of_a_wide_row(isa):
    """The largest magnitudes, and low parts on both sides of their wrap at 128."""
    x = np.zeros((1, 64), np.float32)
    x[0, :7] = [16383, -16383, 127, 128, -128, -129, 0.5]
    with kernels.use_isa(isa):
        made = kernels.prepare(x, cols=64, signs=None, block=1, magnitude_bits=14)
    assert made.scale[0] == 1.0
    np.testing.assert_array_equal(made.q[0, :7], [64, -64, 0, 1, 0, -1, 0])
    np.testing.assert_array_equal(made.low[0, :7], [-1, 1, 127, -128, -128, 127, 0])
    assert (made.sum[0], made.low_sum[0]) == (0, -2)


@pytest.mark.parametrize("isa", ISAS)
def test_fifteen_bits_end_where_both_parts_do(isa):
    """127 * 256 + 127; half above it, a tie whose even neighbour is too large, raises the scale."""
    x = np.zeros((3, 64), np.float32)
    x[:, 0] = [32639, np.nextafter(np.float32(32639.5), np.float32(0)), 32639.5]
    x[:, 1] = -x[:, 0]
    with kernels.use_isa(isa):
        made = kernels.prepare(x, cols=64, signs=None, block=1, magnitude_bits=15)
    np.testing.assert_array_equal(made.scale, [1.0, 1.0, 2.0])
    whole = 256 * made.q[:, :2].astype(np.int32) + made.low[:, :2]
    np.testing.assert_array_equal(whole, [[32639, -32639], [32639, -32639], [16320, -16320]])
    np.testing.assert_array_equal(made.q[0, :2], [127, -127])
    np.testing.assert_array_equal(made.low[0, :2], [127, -127])


@pytest.mark.parametrize("magnitude_bits", [8, 15])
def test_padding_of_wide_rows_is_zero_in_used_memory(magnitude_bits):
    for isa in ISAS:
        with kernels.use_isa(isa):
            for _ in range(4):
                kernels.prepare(
                    rows(1, 3, 128, 100.0), cols=128, signs=None, block=1, magnitude_bits=magnitude_bits
                )
                made = kernels.prepare(
                    rows(2, 3, 70), cols=128, signs=None, block=1, magnitude_bits=magnitude_bits
                )
                assert not made.q[:, 70:].any()
                assert not made.low[:, 70:].any()


def test_activations_keep_what_they_are_given():
    q = np.arange(-64, 64, dtype=np.int8).reshape(2, 64)
    scale, sums = np.array([0.5, 2.0], np.float32), q.sum(axis=1, dtype=np.int32)
    made = kernels.Activations(q, scale, sums)
    assert_same_activations(made, oracle.OracleActivations(q, scale, sums))
    assert (made.num_tokens, made.cols) == (2, 64)
    wide = kernels.Activations(q, scale, sums, q[::-1].copy(), sums[::-1].copy())
    assert_same_activations(wide, oracle.OracleActivations(q, scale, sums, q[::-1], sums[::-1]))
