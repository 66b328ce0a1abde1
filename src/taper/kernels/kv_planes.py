"""The KV cache as planes in NumPy (docs/numerics.md, "KV cache as planes"): where bits lie, what they mean.

The engine looks into a cache with it; as a second definition of the native kernels it is bit exact and slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taper.kernels import anda
from taper.kernels.oracle import fma, quantize, rotate, softmax

Float32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

BLOCK_ENTRIES = 64
EXPONENT_BITS = anda.EXPONENT_BITS
QUERY_BITS = 7
WEIGHT_BITS = 7

_BIAS = 15
_NOT_FINITE = 31
_LINE = 64

# Of a layer: magnitude bits of keys, how many of them lie in the upper part, and the same of values.
StoredBits = tuple[int, int, int, int]


def group_size(head_dim: int) -> int:
    """Elements that share an exponent: the largest power of two that divides head_dim, at most 64."""
    return min(anda.DEFAULT_GROUP_SIZE, head_dim & -head_dim)


def rotated(x: Float32) -> Float32:
    """Rows (..., D) by the Hadamard matrix of the largest power of two that divides D, signs all +1."""
    dim = x.shape[-1]
    return rotate(x.reshape(-1, dim), np.ones(dim, np.float32), dim & -dim).reshape(x.shape)


def rotate_back(x: Float32) -> Float32:
    """The inverse of `rotated`, which is its own but for rounding."""
    return rotated(x)


def key_bits(head_dim: int) -> NDArray[np.int64]:
    """Bit of entry t's element d in a plane of keys, (64, D): byte * 8 + bit."""
    t, d = np.arange(BLOCK_ENTRIES)[:, None], np.arange(head_dim)
    return _place(t // 16 * (head_dim // 4) + d // 4, t % 16 * 4 + d % 4)


def value_bits(head_dim: int) -> NDArray[np.int64]:
    """The same of a plane of values."""
    t, d = np.arange(BLOCK_ENTRIES)[:, None], np.arange(head_dim)
    return _place(t // 4 * (head_dim // 16) + d // 16, d % 16 * 4 + t % 4)


def _place(word: NDArray[np.int64], bit: NDArray[np.int64]) -> NDArray[np.int64]:
    byte = bit // 8
    return (word // 8 * _LINE + byte // 2 * 16 + word % 8 * 2 + byte % 2) * 8 + bit % 8


class BlockView:
    """One layer of a block as arrays of planes and exponents.

    Args:
        stored: bits of every layer.
        shape: layers, KV heads, head_dim.
        layer: which.
        upper, lower: uint8, the parts of the block; lower may be None.

    Attributes:
        planes: for keys and for values, by head, the sign plane and the magnitude planes that are there,
            uint8 (8 * D,) views.
        exponents: uint8 (2, heads, groups, 5, 8), views.
    """

    def __init__(
        self,
        stored: Sequence[StoredBits],
        shape: tuple[int, int, int],
        layer: int,
        upper: U8,
        lower: U8 | None,
    ) -> None:
        _, heads, dim = shape
        plane, groups = 8 * dim, dim // group_size(dim)
        self.stored = stored[layer]
        self.planes: tuple[list[list[U8]], list[list[U8]]] = ([], [])
        above = sum(heads * plane * (2 + key + value) for _, key, _, value in stored[:layer])
        below = sum(heads * plane * (k - ku + v - vu) for k, ku, v, vu in stored[:layer])
        for side in range(2):
            bits, kept = self.stored[2 * side : 2 * side + 2]
            for head in range(heads):
                begin = above + head * (1 + kept) * plane
                found = list(upper[begin : begin + (1 + kept) * plane].reshape(-1, plane))
                if lower is not None:
                    begin = below + head * (bits - kept) * plane
                    found += list(lower[begin : begin + (bits - kept) * plane].reshape(-1, plane))
                self.planes[side].append(found)
            above += heads * plane * (1 + kept)
            below += heads * plane * (bits - kept)
        begin = sum(heads * plane * (2 + key + value) for _, key, _, value in stored)
        size = 2 * heads * groups * EXPONENT_BITS * 8
        begin += layer * size
        self.exponents = upper[begin : begin + size].reshape(2, heads, groups, EXPONENT_BITS, 8)

    def read(self, side: int, head: int, dim: int, bits: int) -> tuple[NDArray[np.int64], Float32]:
        """Integers (64, D) of keys (side 0) or values (1), and what one is worth (64, groups)."""
        places = (key_bits if side == 0 else value_bits)(dim)
        planes = [np.unpackbits(plane, bitorder="little")[places] for plane in self.planes[side][head]]
        m = np.zeros(places.shape, np.int64)
        for plane in planes[1 : 1 + bits]:
            m = 2 * m + plane
        half = bits < self.stored[2 * side]
        if half:
            m = 2 * m + 1
        words = np.unpackbits(self.exponents[side, head], axis=-1, bitorder="little").astype(np.int64)
        e = (words << np.arange(EXPONENT_BITS - 1, -1, -1)[:, None]).sum(axis=1).T
        units = np.ldexp(1.0, e - _BIAS - (bits - 1) - int(half))
        units[e == _NOT_FINITE] = np.nan
        return np.where(planes[0], -m, m), units.astype(np.float32)

    def write(self, side: int, head: int, entry: int, x: Float32) -> None:
        """Quantise an entry's row (D,) into the planes."""
        dim = len(x)
        group, bits = group_size(dim), self.stored[2 * side]
        rows = x.reshape(-1, group)
        finite = np.less_equal(np.abs(rows).max(axis=1), anda.MAX_VALUE)  # not for NaN
        values = anda.quantize(np.where(finite[:, None], rows, np.float32(0)), bits, group)
        negative = (values.negative & finite[:, None]).ravel()
        e: list[int] = np.where(finite, values.exponents[:, 0], _NOT_FINITE).tolist()
        places = (key_bits if side == 0 else value_bits)(dim)[entry]
        m = values.magnitudes.ravel().astype(np.int64)
        for index, plane in enumerate(self.planes[side][head]):
            _set(plane, places, negative if index == 0 else m >> (bits - index) & 1)
        for g, exponent in enumerate(e):
            for j in range(EXPONENT_BITS):
                at = np.array([entry])
                _set(
                    self.exponents[side, head, g, j], at, np.array([exponent >> (EXPONENT_BITS - 1 - j) & 1])
                )


def _set(plane: U8, places: NDArray[np.int64], on: NDArray[Any]) -> None:
    all_bits = np.unpackbits(plane, bitorder="little")
    all_bits[places] = on
    plane[:] = np.packbits(all_bits, bitorder="little")


def read_block(
    stored: Sequence[StoredBits],
    shape: tuple[int, int, int],
    layer: int,
    upper: U8,
    lower: U8 | None,
    bits: tuple[int, int],
) -> tuple[Float32, Float32]:
    """Keys, as they are stored, and values of a block at these bits, float32 (heads, 64, D) each."""
    view, (_, heads, dim) = BlockView(stored, shape, layer, upper, lower), shape
    sides = []
    for side in range(2):
        rows = [view.read(side, head, dim, bits[side]) for head in range(heads)]
        sides.append(
            np.stack([m.astype(np.float32) * np.repeat(u, group_size(dim), axis=1) for m, u in rows])
        )
    return sides[0], sides[1]


def _integers(x: Float32, bits: int) -> tuple[NDArray[np.int64], np.float32]:
    """A row by the rule of "Activations"."""
    made = quantize(x[None], len(x), bits)
    return made.q[0].astype(np.int64), made.scale[0]


def attend(
    q: Float32,
    keys: Sequence[tuple[NDArray[np.int64], Float32]],
    values: Sequence[tuple[NDArray[np.int64], Float32]],
    num_entries: int,
    scale: float,
) -> tuple[Float32, Float32, Float32]:
    """One query head (D,), rotated, over a chunk of blocks as `BlockView.read` gives them: largest score, sum
    of the weights, weighted sum."""
    dim = len(q)
    group = group_size(dim)
    integers, units = (np.concatenate(parts)[:num_entries] for parts in zip(*keys, strict=True))
    scores = np.zeros(num_entries, np.float32)
    for g in range(dim // group):
        part = slice(g * group, (g + 1) * group)
        query, query_scale = _integers(q[part], QUERY_BITS)
        scores = fma((integers[:, part] @ query).astype(np.float32), query_scale * units[:, g], scores)
    most, total, weights = softmax(scores * np.float32(scale))
    acc = np.zeros(dim, np.float32)
    for block, (entries, block_units) in enumerate(values):
        w = weights[block * BLOCK_ENTRIES : (block + 1) * BLOCK_ENTRIES]
        for g in range(dim // group):
            part, unit = slice(g * group, (g + 1) * group), block_units[: len(w), g]
            with np.errstate(invalid="ignore"):
                product = w * unit
            q_weights, weight_scale = _integers(
                np.where(np.isnan(product), np.float32(0), product), WEIGHT_BITS
            )
            if np.isnan(unit).any():
                weight_scale = np.float32(np.nan)
            sums = (q_weights @ entries[: len(w), part]).astype(np.float32)
            acc[part] = fma(sums, weight_scale, acc[part])
    return most, total, acc
