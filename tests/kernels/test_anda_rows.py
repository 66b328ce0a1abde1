"""Native packing and unpacking of the Anda format against the oracle, over every float16."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ISAS, assert_same_bits, rows, seeds, thread_counts, threads

from taper import kernels
from taper.kernels import anda
from taper.kernels.anda_rows import pack_rows, unpack_rows

EVERY = np.arange(2**16, dtype=np.uint16).view(np.float16)
FINITE = EVERY[np.isfinite(EVERY)]


def check(x, bits, group, rounding):
    expected = anda.pack(anda.quantize(x, bits, group, rounding))
    found = pack_rows(x, bits, group, rounding)
    np.testing.assert_array_equal(found.words, expected.words)
    np.testing.assert_array_equal(found.exponents, expected.exponents)
    for read in {1, (bits + 1) // 2, bits}:
        wanted = anda.unpack(expected, read)
        for dtype in (np.float32, np.float16):
            got = unpack_rows(found, read, dtype)
            assert got.dtype == dtype
            assert_same_bits(got, anda.dequantize(wanted, dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("bits", range(1, 17))
def test_every_float16_beside_its_like_and_beside_others(isa, rounding, bits):
    shuffled = np.random.default_rng(bits).permutation(FINITE)
    with kernels.use_isa(isa):
        check(FINITE.reshape(-1, 62), bits, 64, rounding)
        check(shuffled.reshape(-1, 256), bits, 64, rounding)


@settings(max_examples=40, deadline=None)
@given(
    seeds,
    st.integers(1, 16),
    st.integers(1, 200),
    st.sampled_from([1, 2, 8, 16, 32, 64, 128, 256, None]),
    st.sampled_from(["nearest", "truncate"]),
    thread_counts,
)
def test_rows_of_any_length_and_group(seed, bits, n, group, rounding, num_threads):
    x = rows(seed, 7, n, spread=10.0 ** np.random.default_rng(seed).integers(-7, 4))
    x[2] = 0
    x[3] = -0.0
    for isa in ISAS:
        with kernels.use_isa(isa), threads(num_threads):
            check(x, bits, group, rounding)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 15, 64, 100, 1024])
@pytest.mark.parametrize("group", [8, 64, 128, None])
def test_halves_and_memory_used_before(isa, n, group):
    """What the arrays held before leaves no trace, in the filling neither."""
    x = rows(n, 3, n).astype(np.float16)
    expected = anda.pack(anda.quantize(x, 11, group))
    words, exponents = np.full_like(expected.words, 2**64 - 1), np.full_like(expected.exponents, 255)
    used = replace(expected, words=words, exponents=exponents)
    with kernels.use_isa(isa):
        assert pack_rows(x, 11, group, out=used) is used
        np.testing.assert_array_equal(used.words, expected.words)
        np.testing.assert_array_equal(used.exponents, expected.exponents)
        for dtype in (np.float16, np.float32):
            back = np.full(x.shape, np.nan, dtype)
            assert unpack_rows(used, 7, dtype, out=back) is back
            assert_same_bits(back, anda.dequantize(anda.unpack(expected, 7), dtype))


def test_rows_that_lie_apart_are_packed_as_if_they_did_not():
    x = rows(1, 4, 200).astype(np.float16)[::2, ::2]
    expected = anda.pack(anda.quantize(x, 7))
    np.testing.assert_array_equal(pack_rows(x, 7).words, expected.words)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 65520.0])
def test_what_the_format_cannot_hold_is_refused_with_its_row(isa, bad, dtype):
    x = rows(1, 5, 100).astype(dtype)
    with np.errstate(over="ignore"):
        x[3, 70] = bad
    with kernels.use_isa(isa), pytest.raises(ValueError, match="not finite or beyond 65504 in row 3"):
        pack_rows(x, 7)


def test_wrong_arguments_are_refused():
    x = rows(1, 2, 100)
    with pytest.raises(ValueError, match="group_size is 48"):
        pack_rows(x, 7, 48)
    with pytest.raises(ValueError, match="magnitude_bits is 17"):
        pack_rows(x, 17)
    with pytest.raises(ValueError, match="rounding is 'up'"):
        pack_rows(x, 7, rounding="up")
    with pytest.raises(TypeError, match="float64"):
        pack_rows(x.astype(np.float64), 7)
    planes = pack_rows(x, 5)
    with pytest.raises(ValueError, match=r"magnitude_bits is 6, expected 1\.\.5"):
        unpack_rows(planes, 6)
    with pytest.raises(TypeError, match="float64"):
        unpack_rows(planes, dtype=np.float64)
    with pytest.raises(ValueError, match=r"out holds .*\(2, 100, 5, 64\), expected \(2, 100, 6, 64\)"):
        pack_rows(x, 6, out=planes)
    with pytest.raises(ValueError, match=r"out has shape \(3, 100\), expected \(2, 100\)"):
        unpack_rows(planes, out=np.empty((3, 100), np.float32))
    with pytest.raises(TypeError, match="out is float16, expected float32"):
        unpack_rows(planes, out=np.empty((2, 100), np.float16))
    short = anda.AndaPlanes(planes.words[:0], planes.exponents, 2, 100, 5, 64)
    with pytest.raises(ValueError, match="words has shape"):
        unpack_rows(short)
