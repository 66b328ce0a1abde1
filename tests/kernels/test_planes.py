"""Packing, and linear layers over planes, of every instruction set against the NumPy oracle, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ISAS, assert_same_bits, rows, seeds, threads, widths
from numpy.typing import NDArray

from taper import kernels
from taper.kernels import oracle

WIDE = 127 * 128 + 63  # the largest value at 7 and 8 bits


@dataclass
class Matrix:
    """A random matrix in every form that a test compares."""

    codes: NDArray[np.uint8]
    planes: list[NDArray[np.uint8]]
    values: dict[int, NDArray[Any]]
    level_scales: dict[int, float]
    row_scales: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    parent_bits: int

    @classmethod
    def random(
        cls,
        seed: int,
        out: int,
        width: int,
        bits: range,
        *,
        level_rows: bool,
        bias: bool,
        kind: str = "narrow",
    ) -> Matrix:
        rng = np.random.default_rng(seed)
        parent = bits[-1]
        codes = rng.integers(0, 2**parent, (out, width)).astype(np.uint8)
        values = {b: np.sort(rng.integers(-127, 128, 2**b)).astype(np.int8) for b in bits}
        if kind == "wide":
            values |= {b: rng.integers(-WIDE, WIDE + 1, 2**b).astype(np.int16) for b in bits if b >= 7}
        elif kind == "tables":
            values = {b: rng.integers(-127, 128, (out, 2**b)).astype(np.int8) for b in bits}
        return cls(
            codes,
            kernels.pack_planes(codes, parent),
            values,
            {b: float(rng.random()) for b in bits},
            rng.standard_normal((len(bits) if level_rows else 1, out)).astype(np.float32),
            rng.standard_normal(out).astype(np.float32) if bias else None,
            parent,
        )

    def native(self, **changes: Any) -> kernels.Planes:
        parts = {
            "planes": self.planes,
            "values": self.values,
            "level_scales": self.level_scales,
            "row_scales": self.row_scales,
            "bias": self.bias,
            "in_features": self.codes.shape[1],
        }
        return kernels.Planes(**(parts | changes))

    def dequantised(self, bits: int) -> NDArray[Any]:
        values, codes = self.values[bits], self.codes >> (self.parent_bits - bits)
        return (
            np.take_along_axis(values, codes.astype(np.intp), axis=1) if values.ndim == 2 else values[codes]
        )

    def row_scale(self, bits: int) -> NDArray[np.float32]:
        level = 0 if len(self.row_scales) == 1 else bits - min(self.values)
        return self.row_scales[level]

    def expected(self, activations: Any, bits: int, residual: NDArray[np.float32] | None) -> Any:
        return oracle.matmul(
            self.dequantised(bits),
            activations,
            level_scale=self.level_scales[bits],
            row_scale=self.row_scale(bits),
            bias=self.bias,
            residual=residual,
        )


def activations(seed: int, tokens: int, width: int, magnitude_bits: int = 7) -> Any:
    return kernels.prepare(
        rows(seed, tokens, width),
        cols=kernels.padded_cols(width),
        signs=None,
        block=1,
        magnitude_bits=magnitude_bits,
    )


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 5), widths, st.integers(1, 8))
def test_packing_matches_the_oracle(seed, out, width, parent_bits):
    codes = np.random.default_rng(seed).integers(0, 2**parent_bits, (out, width)).astype(np.uint8)
    planes = kernels.pack_planes(codes, parent_bits)
    for plane, expected in zip(planes, oracle.pack_planes(codes, parent_bits), strict=True):
        assert_same_bits(plane, expected)
    for bits in range(1, parent_bits + 1):
        poisoned = [*planes[:bits], *(np.full_like(plane, 0xFF) for plane in planes[bits:])]
        np.testing.assert_array_equal(
            kernels.unpack_codes(poisoned, bits, width), codes >> (parent_bits - bits)
        )
        np.testing.assert_array_equal(
            oracle.unpack_codes(poisoned, bits, width), codes >> (parent_bits - bits)
        )


@settings(max_examples=80, deadline=None)
@given(
    seeds, st.integers(1, 70), widths, st.integers(1, 40), st.integers(1, 8), st.booleans(), st.integers(1, 2)
)
def test_matmul(seed, out, width, tokens, parent_bits, rich, num_threads):
    first = 1 + seed % parent_bits
    matrix = Matrix.random(seed, out, width, range(first, parent_bits + 1), level_rows=rich, bias=rich)
    x = activations(seed, tokens, width)
    residual = rows(seed + 1, tokens, out) if rich else None
    planes = matrix.native()
    with threads(num_threads):
        for bits in (first, parent_bits):
            expected = matrix.expected(x, bits, residual)
            for isa in ISAS:
                with kernels.use_isa(isa):
                    assert_same_bits(planes.matmul(x, bits, residual), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_small_batch(isa, bits):
    """Kernels are compiled for numbers of tokens up to 8, and begin again from there."""
    matrix = Matrix.random(bits, 21, 1984, range(bits, bits + 1), level_rows=False, bias=True)
    planes, x = matrix.native(), rows(3, 18, 1984)
    with kernels.use_isa(isa):
        for tokens in range(1, 19):
            some = kernels.prepare(x[:tokens], cols=1984, signs=None, block=1)
            assert_same_bits(planes.matmul(some, bits), matrix.expected(some, bits, None))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("tokens", "width"), [(64, 1984), (101, 576), (150, 16384)])
@pytest.mark.parametrize("magnitude_bits", [7, 14])
def test_many_tokens(isa, tokens, width, magnitude_bits):
    """So many that AMX has them packed; of 16384 columns more than pass over the weights at once."""
    matrix = Matrix.random(tokens, 37, width, range(4, 5), level_rows=False, bias=True)
    planes, residual = matrix.native(), rows(1, tokens, 37)
    with kernels.use_isa(isa), threads(2):
        x = activations(2, tokens, width, magnitude_bits)
        y = planes.matmul(x, 4, residual)
    assert_same_bits(y, matrix.expected(x, 4, residual))


@settings(max_examples=80, deadline=None)
@given(
    seeds,
    st.integers(1, 70),
    widths,
    st.integers(1, 12),
    st.integers(1, 8),
    st.sampled_from(["narrow", "wide", "tables"]),
    st.sampled_from([7, 8, 12, 14, 15]),
    st.integers(1, 2),
)
def test_matmul_of_parts_and_tables(seed, out, width, tokens, bits, kind, magnitude_bits, num_threads):
    """Wide values, a table a row and wide activations, in every combination."""
    rich = bool(seed % 2)
    matrix = Matrix.random(seed, out, width, range(bits, bits + 1), level_rows=False, bias=rich, kind=kind)
    x = activations(seed, tokens, width, magnitude_bits)
    residual = rows(seed + 1, tokens, out) if rich else None
    planes, expected = matrix.native(), matrix.expected(x, bits, residual)
    with threads(num_threads):
        for isa in ISAS:
            with kernels.use_isa(isa):
                assert_same_bits(planes.matmul(x, bits, residual), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize(("magnitude_bits", "largest"), [(14, 16383), (15, 32639)])
def test_wide_parts_at_their_extremes(isa, bits, tokens, magnitude_bits, largest):
    """The largest sums are beyond int32 and float32's integers, and still rounded once."""
    width = 5632
    values = np.linspace(-WIDE, WIDE, 2**bits).astype(np.int16)
    codes = np.zeros((3, width), np.uint8)
    codes[1:] = 2**bits - 1
    codes[2, ::2] = 0
    planes = kernels.Planes(
        kernels.pack_planes(codes, bits),
        {bits: values},
        {bits: 1.0},
        np.ones((1, 3), np.float32),
        None,
        width,
    )
    rows_of = np.full((tokens, width), largest, np.float32)
    rows_of[:, 1] = largest - 1
    x = kernels.prepare(rows_of, cols=width, signs=None, block=1, magnitude_bits=magnitude_bits)
    with kernels.use_isa(isa):
        y = planes.matmul(x, bits)
    whole = WIDE * (largest * (width - 1) + largest - 1)
    np.testing.assert_array_equal(y, np.tile(np.float32([-whole, whole, -WIDE]), (tokens, 1)))


@pytest.mark.parametrize("isa", ISAS)
def test_low_parts_of_minus_128(isa):
    """-128 has no counterpart in int8: every kernel has to survive it next to the ends of a table."""
    values = np.array([-127, 127], np.int8)
    codes = np.zeros((2, 576), np.uint8)
    codes[1] = 1
    planes = kernels.Planes(
        kernels.pack_planes(codes, 1), {1: values}, {1: 1.0}, np.ones((1, 2), np.float32), None, 576
    )
    x = kernels.prepare(np.full((5, 576), 128, np.float32), cols=576, signs=None, block=1, magnitude_bits=8)
    assert (x.low == -128).all()
    with kernels.use_isa(isa):
        np.testing.assert_array_equal(
            planes.matmul(x, 1), np.tile(np.float32([-1, 1]) * 127 * 128 * 576, (5, 1))
        )


def test_tables_whose_rows_lie_apart():
    """Two widths side by side in one array, as a file holds them."""
    matrix = Matrix.random(14, 21, 320, range(3, 5), level_rows=True, bias=False, kind="tables")
    side_by_side = np.concatenate([matrix.values[3], matrix.values[4]], axis=1)
    planes = matrix.native(values={3: side_by_side[:, :8], 4: side_by_side[:, 8:]})
    x = activations(14, 2, 320)
    del side_by_side
    for bits in (3, 4):
        for isa in ISAS:
            with kernels.use_isa(isa):
                assert_same_bits(planes.matmul(x, bits), matrix.expected(x, bits, None))
    assert planes.bytes_read(3) == 21 * (3 * 320 // 8 + 4 + 8)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["wide", "tables"])
def test_parts_do_not_depend_on_batch_or_threads(isa, kind):
    matrix = Matrix.random(7, 1031, 448, range(8, 9), level_rows=False, bias=True, kind=kind)
    planes, x = matrix.native(), rows(8, 12, 448)

    def run(begin: int, end: int) -> NDArray[np.float32]:
        acts = kernels.prepare(x[begin:end], cols=448, signs=None, block=1, magnitude_bits=14)
        return planes.matmul(acts, 8)

    with kernels.use_isa(isa):
        whole = run(0, 12)
        for num_threads in (1, 3):
            with threads(num_threads):
                for begin, end in ((0, 1), (3, 5), (4, 7)):
                    assert_same_bits(run(begin, end), whole[begin:end])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_at_the_extremes_of_int8(isa, bits):
    """All codes at the ends of the table and all activations at +-127 reach the largest sums."""
    width, out = 5632, 3
    values = np.linspace(-127, 127, 2**bits).astype(np.int8)
    codes = np.zeros((out, width), np.uint8)
    codes[1:] = 2**bits - 1
    codes[2, ::2] = 0
    planes = kernels.Planes(
        kernels.pack_planes(codes, bits),
        {bits: values},
        {bits: 1.0},
        np.ones((1, out), np.float32),
        None,
        width,
    )
    q = np.full((1, width), 127, np.int8)
    x = kernels.Activations(q, np.ones(1, np.float32), q.sum(axis=1, dtype=np.int32))
    with kernels.use_isa(isa):
        y = planes.matmul(x, bits)
    np.testing.assert_array_equal(y[0], [-127 * 127 * width, 127 * 127 * width, 0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_planes_past_bits_are_not_read(isa, tokens):
    matrix = Matrix.random(5, 37, 576, range(2, 9), level_rows=False, bias=False)
    x = activations(5, tokens, 576)
    with kernels.use_isa(isa):
        for bits in range(2, 8):
            poisoned = [*matrix.planes[:bits], *(np.full_like(p, 0xFF) for p in matrix.planes[bits:])]
            planes = matrix.native(planes=poisoned)
            assert_same_bits(planes.matmul(x, bits), matrix.expected(x, bits, None))


@pytest.mark.parametrize("isa", ISAS)
def test_a_truncated_list_of_planes_is_the_same_model_of_fewer_bits(isa):
    matrix = Matrix.random(6, 20, 192, range(2, 7), level_rows=True, bias=True)
    x = activations(6, 2, 192)
    whole, short = matrix.native(), matrix.native(planes=matrix.planes[:3])
    assert (short.min_bits, short.max_bits) == (2, 3)
    with kernels.use_isa(isa):
        assert_same_bits(short.matmul(x, 3), whole.matmul(x, 3))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [64, 172, 2048])
def test_result_does_not_depend_on_batch_or_threads(isa, width):
    matrix = Matrix.random(7, 1031, width, range(4, 5), level_rows=False, bias=True)
    planes, x, residual = matrix.native(), rows(8, 40, width), rows(9, 40, 1031)
    cols = kernels.padded_cols(width)

    def run(begin: int, end: int) -> NDArray[np.float32]:
        acts = kernels.prepare(x[begin:end], cols=cols, signs=None, block=1)
        return planes.matmul(acts, 4, residual[begin:end])

    with kernels.use_isa(isa):
        with threads(1):
            whole = run(0, 40)
        for num_threads in (1, 2, 5):
            with threads(num_threads):
                for begin, end in ((0, 1), (3, 5), (7, 24), (39, 40), (0, 40)):
                    assert_same_bits(run(begin, end), whole[begin:end])


@pytest.mark.parametrize("isa", ISAS)
def test_planes_at_any_byte_of_read_only_memory(isa):
    matrix = Matrix.random(10, 19, 448, range(3, 4), level_rows=False, bias=False)
    odd = []
    for plane in matrix.planes:
        memory = np.zeros(plane.size + 64, np.uint8)
        start = 1 - memory.ctypes.data % 64 + 64 if memory.ctypes.data % 64 else 1
        memory[start : start + plane.size] = plane.ravel()
        view = memory[start : start + plane.size].reshape(plane.shape)
        view.flags.writeable = False
        odd.append(view)
    x = activations(10, 1, 448)
    with kernels.use_isa(isa):
        assert_same_bits(matrix.native(planes=odd).matmul(x, 3), matrix.expected(x, 3, None))


def test_planes_keep_their_arrays_alive():
    matrix = Matrix.random(11, 64, 2048, range(2, 3), level_rows=False, bias=True)
    x = activations(11, 1, 2048)
    expected = matrix.expected(x, 2, None)
    planes = matrix.native(
        planes=[p.copy() for p in matrix.planes], row_scales=matrix.row_scales.copy(), bias=matrix.bias.copy()
    )
    for _ in range(8):  # takes the memory that a lost reference would have freed
        np.full((64, 2048), 0xFF, np.uint8)
    assert_same_bits(planes.matmul(x, 2), expected)


@settings(max_examples=30, deadline=None)
@given(seeds, widths, st.integers(1, 8), st.booleans(), st.sampled_from(["narrow", "wide", "tables"]))
def test_rows(seed, width, bits, wide_indices, kind):
    matrix = Matrix.random(seed, 50, width, range(bits, bits + 1), level_rows=False, bias=False, kind=kind)
    indices = np.array([49, 0, 7, 7], np.int64 if wide_indices else np.int32)
    expected = oracle.dequantize_rows(
        matrix.dequantised(bits)[indices], matrix.level_scales[bits], matrix.row_scale(bits)[indices]
    )
    planes = matrix.native()
    for isa in ISAS:
        with kernels.use_isa(isa):
            assert_same_bits(planes.rows(indices, bits), expected)


def test_activation_that_is_not_finite_reaches_the_result():
    matrix = Matrix.random(12, 5, 64, range(2, 3), level_rows=False, bias=False)
    x = rows(12, 2, 64)
    x[1, 0] = np.nan
    y = matrix.native().matmul(kernels.prepare(x, cols=64, signs=None, block=1), 2)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()


def test_bytes_read_counts_planes_and_row_scales():
    matrix = Matrix.random(13, 10, 172, range(2, 5), level_rows=False, bias=False)
    planes = matrix.native()
    assert planes.bytes_read(3) == 10 * (3 * 192 // 8 + 4)
    assert (planes.out_features, planes.in_features, planes.cols) == (10, 172, 192)


@pytest.mark.parametrize(("features", "cols"), [(1, 64), (64, 64), (65, 128), (172, 192)])
def test_padded_cols(features, cols):
    assert kernels.padded_cols(features) == cols


@pytest.mark.parametrize(("features", "block"), [(1, 1), (172, 4), (576, 64), (2048, 2048), (5632, 512)])
def test_hadamard_block(features, block):
    assert kernels.hadamard_block(features) == block
