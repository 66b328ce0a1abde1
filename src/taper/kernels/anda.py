"""The Anda format (arXiv 2411.15982, HPCA 2025) in NumPy: exact, slow, the oracle of native code.

Consecutive values of a row form a group. A group shares the 5-bit exponent E of its largest value; each value
keeps a sign s and M magnitude bits m, the leading bit of a significand among them:

    x ~ (-1)^s * m * 2^(E - 15 - (M - 1)),    0 <= m < 2^M

E is biased as in float16, 1..30; subnormals and zeros count as exponent 1 (docs/anda.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEFAULT_GROUP_SIZE = 64
MAX_MAGNITUDE_BITS = 16
# The largest finite float16: with it E stays below 31 and no result is beyond float16 either.
MAX_VALUE = 65504.0
EXPONENT_BITS = 5
# Values of a word of a plane, and words side by side at one address (1,024 bits).
WORD_VALUES = 64
WORDS_AT_ADDRESS = 16

_BIAS = 15
_ROUND: Mapping[str, Callable[[Any], Any]] = {"nearest": np.rint, "truncate": np.floor}


@dataclass(frozen=True, slots=True)
class AndaValues:
    """Rows (T, n) in the format, a field at a time.

    Attributes:
        negative: bool (T, n), the sign bits; a zero keeps its own.
        magnitudes: uint16 (T, n), m.
        exponents: uint8 (T, ceil(n / group_size)), E of each group; the last group may be short.
        magnitude_bits: M, 1..16.
        group_size: values that share an exponent.
    """

    negative: NDArray[np.bool_]
    magnitudes: NDArray[np.uint16]
    exponents: NDArray[np.uint8]
    magnitude_bits: int
    group_size: int

    def first_bits(self, magnitude_bits: int) -> AndaValues:
        """The same values read at fewer magnitude bits: what is left out is cut off.

        Raises:
            ValueError: more bits than there are, or fewer than 1.
        """
        if not 1 <= magnitude_bits <= self.magnitude_bits:
            raise ValueError(f"magnitude_bits is {magnitude_bits}, expected 1..{self.magnitude_bits}")
        shift = np.uint16(self.magnitude_bits - magnitude_bits)
        return replace(self, magnitudes=self.magnitudes >> shift, magnitude_bits=magnitude_bits)


@dataclass(frozen=True, slots=True)
class AndaPlanes:
    """Rows (num_rows, num_values) in the format's memory layout.

    A row is cut into words of 64 values, value i at bit i mod 64; the last word of a row is filled up with
    zeros. The words of all rows, one after another, lie 16 side by side.

    Attributes:
        words: uint64 (ceil(words of a plane / 16), M + 1, 16): at consecutive addresses the signs, then
            a plane for each magnitude bit, most significant first. A smaller M is fewer addresses.
        exponents: uint8 (10 * ceil(groups / 16),): E of one group after another, 5 bits each, lowest bit
            first; 16 groups are 80 bits.
        num_rows, num_values: shape of the rows.
        magnitude_bits, group_size: as in `AndaValues`.
    """

    words: NDArray[np.uint64]
    exponents: NDArray[np.uint8]
    num_rows: int
    num_values: int
    magnitude_bits: int
    group_size: int

    @property
    def num_bytes(self) -> int:
        """All that is stored, filling included."""
        return self.words.nbytes + self.exponents.nbytes


def bits_per_value(magnitude_bits: int, group_size: int = DEFAULT_GROUP_SIZE) -> float:
    """Stored bits of a value: sign, magnitude, and its share of the exponent."""
    return 1 + magnitude_bits + EXPONENT_BITS / group_size


def quantize(
    x: NDArray[np.float16] | NDArray[np.float32],
    magnitude_bits: int,
    group_size: int | None = DEFAULT_GROUP_SIZE,
    rounding: str = "nearest",
) -> AndaValues:
    """Turn rows into the format, with one rounding.

    Args:
        x: float16 or float32 (T, n), n at least 1, at most 65,504 in magnitude.
        magnitude_bits: M, 1..16.
        group_size: a power of two, or None for one exponent a row.
        rounding: "nearest", ties to even, or "truncate", toward zero, as in the paper. A value that would
            round up to 2^M becomes 2^M - 1: E is the largest value's exponent in either case.

    Raises:
        TypeError: x is neither float16 nor float32.
        ValueError: x is not (T, n), not finite or too large; another argument is outside its range.
    """
    _check_arguments(x, magnitude_bits, group_size, rounding)
    size = x.shape[1] if group_size is None else group_size
    a = np.abs(x.astype(np.float64))
    if not (a <= MAX_VALUE).all():  # a NaN is not
        value = float(x[~(a <= MAX_VALUE)][0])
        raise ValueError(
            f"x holds {value:.9g}, expected finite values of at most {MAX_VALUE:.0f} in magnitude"
        )
    # a = f * 2^k with f in [0.5, 1), so its float16 exponent field is k + 14.
    own = np.where(a == 0, 1, np.maximum(np.frexp(a)[1] + _BIAS - 1, 1))
    exponents = np.maximum.reduceat(own, np.arange(0, x.shape[1], size), axis=1).astype(np.uint8)
    scaled = np.ldexp(a, -_unit_exponents(exponents, magnitude_bits, size, x.shape[1]))
    magnitudes = np.minimum(_ROUND[rounding](scaled), 2**magnitude_bits - 1).astype(np.uint16)
    return AndaValues(np.signbit(x), magnitudes, exponents, magnitude_bits, size)


def dequantize(values: AndaValues, dtype: Any = np.float32) -> NDArray[Any]:
    """The rows (T, n) again: exact in float32; in float16 rounded to nearest even, exact for M up to 11.

    Raises:
        TypeError: `dtype` is neither float16 nor float32.
    """
    _check_dtype("dtype", np.dtype(dtype))
    units = _unit_exponents(
        values.exponents, values.magnitude_bits, values.group_size, values.magnitudes.shape[1]
    )
    a = np.ldexp(values.magnitudes.astype(np.float64), units)
    return np.where(values.negative, -a, a).astype(dtype)


def pack(values: AndaValues) -> AndaPlanes:
    """Lay the values out as bit planes and 5-bit exponents."""
    num_rows, num_values = values.magnitudes.shape
    m = values.magnitude_bits
    bits = np.empty((m + 1, num_rows, _ceil_to(num_values, WORD_VALUES)), np.uint8)
    bits[:, :, num_values:] = 0
    bits[0, :, :num_values] = values.negative
    for plane in range(m):
        bits[1 + plane, :, :num_values] = values.magnitudes >> (m - 1 - plane) & 1
    words = np.packbits(bits.reshape(m + 1, -1), axis=1, bitorder="little").view("<u8")
    filled = np.zeros((m + 1, _ceil_to(words.shape[1], WORDS_AT_ADDRESS)), np.uint64)
    filled[:, : words.shape[1]] = words
    addresses = filled.reshape(m + 1, -1, WORDS_AT_ADDRESS).transpose(1, 0, 2)
    return AndaPlanes(
        np.ascontiguousarray(addresses),
        _pack_exponents(values.exponents.ravel()),
        num_rows,
        num_values,
        m,
        values.group_size,
    )


def unpack(planes: AndaPlanes, magnitude_bits: int | None = None) -> AndaValues:
    """The values again, or only the first `magnitude_bits` of each; planes past them are not read.

    Raises:
        ValueError: more bits than there are, or fewer than 1.
    """
    m = planes.magnitude_bits if magnitude_bits is None else magnitude_bits
    if not 1 <= m <= planes.magnitude_bits:
        raise ValueError(f"magnitude_bits is {m}, expected 1..{planes.magnitude_bits}")
    rows, width = planes.num_rows, _ceil_to(planes.num_values, WORD_VALUES)
    words = planes.words[:, : m + 1].transpose(1, 0, 2).reshape(m + 1, -1)
    used = np.ascontiguousarray(words[:, : rows * width // WORD_VALUES].astype("<u8"))
    bits = np.unpackbits(used.view(np.uint8), axis=1, bitorder="little").reshape(m + 1, rows, width)
    bits = bits[:, :, : planes.num_values]
    magnitudes = np.zeros(bits.shape[1:], np.uint16)
    for plane in bits[1:]:
        magnitudes = magnitudes << 1 | plane
    groups = -(-planes.num_values // planes.group_size)
    exponents = _unpack_exponents(planes.exponents, rows * groups).reshape(rows, groups)
    return AndaValues(bits[0].astype(np.bool_), magnitudes, exponents, m, planes.group_size)


def _unit_exponents(
    exponents: NDArray[np.uint8], magnitude_bits: int, group_size: int, num_values: int
) -> NDArray[np.int64]:
    """For each value (T, n) the power of two that m = 1 stands for."""
    units = exponents.astype(np.int64) - _BIAS - (magnitude_bits - 1)
    return np.repeat(units, group_size, axis=1)[:, :num_values]


def _pack_exponents(exponents: NDArray[np.uint8]) -> NDArray[np.uint8]:
    filled = np.zeros(_ceil_to(exponents.size, WORDS_AT_ADDRESS), np.uint8)
    filled[: exponents.size] = exponents
    bits = filled[:, None] >> np.arange(EXPONENT_BITS, dtype=np.uint8) & 1
    return np.packbits(bits, bitorder="little")


def _unpack_exponents(packed: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    bits = np.unpackbits(packed, bitorder="little", count=count * EXPONENT_BITS)
    powers = np.uint8(1) << np.arange(EXPONENT_BITS, dtype=np.uint8)
    exponents: NDArray[np.uint8] = (bits.reshape(-1, EXPONENT_BITS) * powers).sum(axis=1, dtype=np.uint8)
    return exponents


def _ceil_to(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _check_dtype(name: str, dtype: np.dtype[Any]) -> None:
    if dtype not in (np.float16, np.float32):
        raise TypeError(f"{name} is {dtype}, expected float16 or float32")


def _check_arguments(x: NDArray[Any], magnitude_bits: int, group_size: int | None, rounding: str) -> None:
    _check_dtype("x", x.dtype)
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(f"x has shape {x.shape}, expected (T, n) with n at least 1")
    if not 1 <= magnitude_bits <= MAX_MAGNITUDE_BITS:
        raise ValueError(f"magnitude_bits is {magnitude_bits}, expected 1..{MAX_MAGNITUDE_BITS}")
    if group_size is not None and (group_size < 1 or group_size & (group_size - 1)):
        raise ValueError(f"group_size is {group_size}, expected a power of two, or None for the whole row")
    if rounding not in _ROUND:
        raise ValueError(f"rounding is {rounding!r}, expected one of {', '.join(_ROUND)}")
