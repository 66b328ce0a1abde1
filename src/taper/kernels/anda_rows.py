"""Rows into the Anda format and back by the native library: the bytes that `taper.kernels.anda` gives."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from taper.kernels import _native
from taper.kernels.anda import DEFAULT_GROUP_SIZE, WORD_VALUES, WORDS_AT_ADDRESS, AndaPlanes


def pack_rows(
    x: NDArray[np.float16] | NDArray[np.float32],
    magnitude_bits: int,
    group_size: int | None = DEFAULT_GROUP_SIZE,
    rounding: str = "nearest",
    out: AndaPlanes | None = None,
) -> AndaPlanes:
    """What `anda.pack(anda.quantize(...))` gives; the same arguments.

    Args:
        x: float16 or float32 (T, n), read where it lies if it is C-contiguous.
        magnitude_bits, group_size, rounding: as there.
        out: planes of the same shape, bits and group size, whose arrays are overwritten and returned: new
            memory costs the system's page faults, up to as much as the packing. Without it arrays are made.

    Raises:
        TypeError: x is neither float16 nor float32.
        ValueError: x is not (T, n) or holds a value that is not finite or beyond 65,504 (what `out` holds is
            undefined then); another argument is outside its range; `out` is of another shape.
    """
    if x.dtype not in (np.float16, np.float32):
        raise TypeError(f"x is {x.dtype}, expected float16 or float32")
    if rounding not in ("nearest", "truncate"):
        raise ValueError(f"rounding is {rounding!r}, expected nearest or truncate")
    if x.ndim != 2 or not x.size or magnitude_bits < 1:
        raise ValueError(
            f"x has shape {x.shape}, magnitude_bits is {magnitude_bits}; expected (T, n) and 1..16"
        )
    num_rows, num_values = x.shape
    size = num_values if group_size is None else group_size
    if out is None:
        num_words = num_rows * -(-num_values // WORD_VALUES)
        num_groups = num_rows * -(-num_values // max(1, size))
        words = np.empty((-(-num_words // WORDS_AT_ADDRESS), magnitude_bits + 1, WORDS_AT_ADDRESS), np.uint64)
        exponents = np.empty(-(-num_groups // 16) * 10, np.uint8)
        out = AndaPlanes(words, exponents, num_rows, num_values, magnitude_bits, size)
    wanted = (num_rows, num_values, magnitude_bits, size)
    found = (out.num_rows, out.num_values, out.magnitude_bits, out.group_size)
    if found != wanted:
        raise ValueError(f"out holds rows, values, magnitude_bits, group_size {found}, expected {wanted}")
    rows: Any = np.ascontiguousarray(x)
    _native.anda_pack(
        rows,
        size,
        magnitude_bits,
        rounding == "truncate",
        out.words.view(np.int64),
        out.exponents,
    )
    return out


def unpack_rows(
    planes: AndaPlanes,
    magnitude_bits: int | None = None,
    dtype: Any = np.float32,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """What `anda.dequantize(anda.unpack(...))` gives; planes past `magnitude_bits` are not read.

    Args:
        planes: rows (T, n).
        magnitude_bits: to read; None takes all.
        dtype: float16, rounded to nearest even, or float32.
        out: C-contiguous (T, n) of `dtype`, overwritten and returned; see `pack_rows`.

    Raises:
        TypeError: `dtype` is neither float16 nor float32, or not that of `out`.
        ValueError: more bits than there are, fewer than 1, or arrays of another shape.
    """
    if np.dtype(dtype) not in (np.float16, np.float32):
        raise TypeError(f"dtype is {np.dtype(dtype)}, expected float16 or float32")
    found = np.empty((planes.num_rows, planes.num_values), dtype) if out is None else out
    if found.dtype != np.dtype(dtype):
        raise TypeError(f"out is {found.dtype}, expected {np.dtype(dtype)}")
    _native.anda_unpack(
        planes.words.view(np.int64),
        planes.exponents,
        planes.num_rows,
        planes.num_values,
        planes.group_size,
        planes.magnitude_bits,
        planes.magnitude_bits if magnitude_bits is None else magnitude_bits,
        found,
    )
    return found
