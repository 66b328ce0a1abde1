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
) -> AndaPlanes:
    """What `anda.pack(anda.quantize(...))` gives; the same arguments.

    Raises:
        TypeError: x is neither float16 nor float32.
        ValueError: x is not (T, n) or holds a value that is not finite or beyond 65,504; another argument is
            outside its range.
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
    num_words = num_rows * -(-num_values // WORD_VALUES)
    words = np.zeros((-(-num_words // WORDS_AT_ADDRESS), magnitude_bits + 1, WORDS_AT_ADDRESS), np.uint64)
    num_groups = num_rows * -(-num_values // max(1, size))
    exponents = np.zeros(-(-num_groups // 16) * 10, np.uint8)
    rows = np.ascontiguousarray(x, dtype=np.float32)
    _native.anda_pack(rows, size, magnitude_bits, rounding == "truncate", words.view(np.int64), exponents)
    return AndaPlanes(words, exponents, num_rows, num_values, magnitude_bits, size)


def unpack_rows(
    planes: AndaPlanes, magnitude_bits: int | None = None, dtype: Any = np.float32
) -> NDArray[Any]:
    """What `anda.dequantize(anda.unpack(...))` gives; planes past `magnitude_bits` are not read.

    Raises:
        TypeError: `dtype` is neither float16 nor float32.
        ValueError: more bits than there are, fewer than 1, or arrays of another shape.
    """
    if np.dtype(dtype) not in (np.float16, np.float32):
        raise TypeError(f"dtype is {np.dtype(dtype)}, expected float16 or float32")
    bits = planes.magnitude_bits if magnitude_bits is None else magnitude_bits
    found = _native.anda_unpack(
        planes.words.view(np.int64),
        planes.exponents,
        planes.num_rows,
        planes.num_values,
        planes.group_size,
        planes.magnitude_bits,
        bits,
    )
    return found.astype(dtype, copy=False)
