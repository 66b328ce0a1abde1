"""No kernel reads or writes past an array's last byte: each array ends where a page without access begins.

A violation is a segmentation fault of the test process.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
from kernel_cases import ISAS, rows, signs
from numpy.typing import NDArray

from taper import kernels

PROT_NONE = 0
LIBC = ctypes.CDLL(None, use_errno=True)
WIDTHS = [1, 17, 64, 172, 320, 576]

pytestmark = pytest.mark.skipif(not hasattr(LIBC, "mprotect"), reason="no mprotect")


def guarded(array: NDArray[Any]) -> NDArray[Any]:
    """A copy whose last byte is the last that may be touched."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if LIBC.mprotect(ctypes.c_void_p(begin + size), ctypes.c_size_t(page), PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


def test_the_guard_stands():
    memory = guarded(np.arange(10, dtype=np.uint8))
    np.testing.assert_array_equal(memory, np.arange(10))
    assert (memory.ctypes.data + memory.nbytes) % mmap.PAGESIZE == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_matmul_and_rows(isa, width, tokens):
    rng = np.random.default_rng(width)
    out = 21
    for bits in (1, 4, 5, 7, 8):
        codes = rng.integers(0, 2**bits, (out, width)).astype(np.uint8)
        values = {bits: np.sort(rng.integers(-127, 128, 2**bits)).astype(np.int8)}
        planes = kernels.Planes(
            [guarded(plane) for plane in kernels.pack_planes(codes, bits)],
            values,
            {bits: 1.0},
            guarded(np.ones((1, out), np.float32)),
            guarded(np.ones(out, np.float32)),
            width,
        )
        x = kernels.prepare(rows(width, tokens, width), cols=kernels.padded_cols(width), signs=None, block=1)
        with kernels.use_isa(isa):
            planes.matmul(x, bits, guarded(rows(1, tokens, out)))
            got = planes.rows(np.array([0, out - 1]), bits)
        np.testing.assert_array_equal(got, values[bits][codes[[0, out - 1]]])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", WIDTHS)
def test_row_operations(isa, width):
    x, gain, turn = guarded(rows(0, 1, width)), guarded(rows(1, 1, width)[0]), guarded(signs(2, width))
    gate_up = guarded(rows(3, 1, 2 * width))
    cols, block = kernels.padded_cols(width), kernels.hadamard_block(width)
    with kernels.use_isa(isa):
        kernels.rms_norm(x, gain, 1e-5)
        kernels.rotate(x, turn, block)
        kernels.exp(x)
        kernels.swiglu(gate_up)
        kernels.prepare(x, cols=cols, signs=None, block=1)
        kernels.prepare(x, cols=cols, signs=turn, block=block, eps=1e-5, gain=gain)
        kernels.prepare_swiglu(gate_up, cols=cols, signs=turn, block=block)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("dim", [2, 6, 20, 64, 80])
def test_rope_store_and_attention(isa, dtype, dim):
    """The cache is full: its last entry is the last of the array."""
    heads, kv_heads, capacity = 6, 2, 32
    keys, values = (guarded(rows(s, kv_heads * capacity, dim).astype(dtype)) for s in (0, 1))
    keys, values = keys.reshape(kv_heads, capacity // 16, dim, 16), values.reshape(kv_heads, capacity, dim)
    cos, sin = (guarded(table) for table in kernels.rope_tables(np.ones(dim // 2), capacity))
    qkv = guarded(rows(2, 2, (heads + 2 * kv_heads) * dim))
    with kernels.use_isa(isa):
        kernels.rope_store(qkv, heads, keys, values, capacity - 2, cos, sin)
        assert np.isfinite(kernels.attention(qkv, heads, keys, values, capacity - 2, 1.0)).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_packing(width):
    codes = guarded(np.random.default_rng(width).integers(0, 16, (3, width)).astype(np.uint8))
    planes = [guarded(plane) for plane in kernels.pack_planes(codes, 4)]
    np.testing.assert_array_equal(kernels.unpack_codes(planes, 4, width), codes)
