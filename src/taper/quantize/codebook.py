"""Nested codebook of the unit Gaussian: one binary tree whose level b holds 2^b values.

The joint dynamic programme minimises sum_b w_b * D_b over all trees, where D_b is the mean squared error of
level b (interval recursion f_b(i, j) = w_b * cost(i, j) + min_k [f_{b+1}(i, k) + f_{b+1}(k, j)]). Greedy
splits, as in Any-Precision LLM (arXiv 2402.10517, section 3.2), are optimal at the lowest width and worse the
further above it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.formats.spec import LEAST_WIDE_BITS, NARROW_VALUE, WIDE_VALUE

FloatArray = NDArray[np.float64]

# Cells of the half line: 3 per leaf at 8 bits. The continuous refinement removes what the grid costs (below
# 0.1 %).
_NUM_CELLS = 384
_REFINEMENT_SWEEPS = 400
# Largest int8 values tried for a level's outermost value; all 127 steps are not always the least error.
_LIMITS_TRIED = range(64, NARROW_VALUE + 1)
# Magnitude bits of the activations by width. The rounding of int8 costs about 0.0003 nats of KL whatever the
# weights are: nothing beside the weights' own error up to 5 bits, more than all of it at 8.
ACTIVATION_BITS_OF = {1: 7, 2: 7, 3: 7, 4: 7, 5: 7, 6: 12, 7: 14, 8: 14}


@dataclass(frozen=True, slots=True)
class CodebookLevel:
    """Values of one width.

    Attributes:
        values: int8, (2**bits,), ascending, in code order; int16 at 7 and 8 bits, where int8 steps would
            set the error (8 bits: 2.7 times Lloyd-Max).
        scale: what one step is worth in standard deviations of the weights.
        mse: mean squared error on the unit Gaussian with nearest-value codes of this level alone.
    """

    bits: int
    values: NDArray[np.int8] | NDArray[np.int16]
    scale: float
    mse: float

    @property
    def reals(self) -> NDArray[np.float32]:
        """The values in standard deviations: float32, (2**bits,)."""
        return self.values.astype(np.float32) * np.float32(self.scale)

    @property
    def activation_bits(self) -> int:
        """Magnitude bits of the activations that this width multiplies."""
        return ACTIVATION_BITS_OF[self.bits]


@dataclass(frozen=True, slots=True)
class NestedCodebook:
    """A tree of values: the b-bit code of a weight is the first b bits of its code at any larger width."""

    levels: tuple[CodebookLevel, ...]

    @property
    def min_bits(self) -> int:
        """Least width with values."""
        return self.levels[0].bits

    @property
    def max_bits(self) -> int:
        """Largest width: the number of planes."""
        return self.levels[-1].bits

    @property
    def sha256(self) -> str:
        """Of every level's values: codes of one codebook mean nothing under another."""
        return hashlib.sha256(b"".join(level.reals.tobytes() for level in self.levels)).hexdigest()

    def level(self, bits: int) -> CodebookLevel:
        """The values of one width. Raises UsageError for a width outside min_bits..max_bits."""
        if not self.min_bits <= bits <= self.max_bits:
            raise UsageError(
                f"no codebook level of {bits} bits; the levels are {self.min_bits}..{self.max_bits}"
            )
        return self.levels[bits - self.min_bits]


@cache
def gaussian_codebook(min_bits: int = 2, max_bits: int = 8) -> NestedCodebook:
    """Build the nested codebook of the unit Gaussian; deterministic, symmetric about zero.

    Args:
        min_bits: least width that may be read, 1..max_bits.
        max_bits: number of planes, at most 8.

    Raises:
        UsageError: the widths are not 1 <= min_bits <= max_bits <= 8.
    """
    if not 1 <= min_bits <= max_bits <= 8:
        raise UsageError(f"bits {min_bits}-{max_bits} are outside 1 <= min <= max <= 8")
    # Lloyd-Max error falls by 4 a bit, so 4^b weighs the relative error of every width alike.
    weights = np.array([4.0**bits if bits >= min_bits else 0.0 for bits in range(max_bits + 1)])
    edges = _refine(_optimal_tree(weights), weights)
    levels = tuple(_level(edges[:: 2 ** (max_bits - bits)], bits) for bits in range(min_bits, max_bits + 1))
    return NestedCodebook(levels)


def moments(edges: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mass, first and second moment of the unit Gaussian below each edge, three arrays like `edges`."""
    density = np.exp(-0.5 * np.minimum(np.abs(edges), 40.0) ** 2) / math.sqrt(2.0 * math.pi)
    mass = np.array([0.5 * (1.0 + math.erf(edge / math.sqrt(2.0))) for edge in edges])
    finite = np.where(np.isfinite(edges), edges, 0.0)
    return mass, -density, mass - finite * density


def mean_squared_error(values: FloatArray) -> float:
    """Error of nearest-value coding of the unit Gaussian with ascending `values`."""
    inner = 0.5 * (values[1:] + values[:-1])
    mass, first, second = (np.diff(m) for m in moments(np.concatenate([[-np.inf], inner, [np.inf]])))
    return float(np.sum(second - 2.0 * values * first + values * values * mass))


def _optimal_tree(weights: FloatArray) -> FloatArray:
    """Edges (2^max_bits + 1) of the leaves of the best symmetric tree on a grid."""
    max_bits = len(weights) - 1
    grid = _grid()
    mass, first, second = moments(grid)
    m0 = mass[None, :] - mass[:, None]
    m1 = first[None, :] - first[:, None]
    m2 = second[None, :] - second[:, None]
    upper = np.triu(np.ones(m0.shape, dtype=bool), 1)
    cost = np.full(m0.shape, np.inf)
    cost[upper] = m2[upper] - m1[upper] ** 2 / m0[upper]
    best, splits = weights[max_bits] * cost, []
    for bits in range(max_bits - 1, 0, -1):
        best, split = _merge(best)
        best = np.where(upper, weights[bits] * np.where(upper, cost, 0.0) + best, np.inf)
        splits.append(split)
    # Level 1 splits at zero by symmetry: the half line is its right child, and the left child mirrors it.
    right = [0, len(grid) - 1]
    for split in reversed(splits):
        cuts = [int(split[i, j]) for i, j in itertools.pairwise(right)]
        right = sorted(right + cuts)
    half = grid[np.array(right)]
    return np.concatenate([-half[:0:-1], half])


def _grid() -> FloatArray:
    """Cell edges of the half line, spaced by the cube root of the density (Panter and Dite, 1951)."""
    fine = np.linspace(0.0, 7.0, 20001)
    cdf = np.cumsum(np.exp(-fine * fine / 6.0))
    grid = np.interp(np.linspace(cdf[0], cdf[-1], _NUM_CELLS + 1), cdf, fine)
    grid[0], grid[-1] = 0.0, np.inf
    return grid


def _merge(best: FloatArray) -> tuple[FloatArray, NDArray[np.int32]]:
    """min_k best[i, k] + best[k, j] and its k, for all i < j."""
    size = len(best)
    merged = np.full((size, size), np.inf)
    split = np.zeros((size, size), dtype=np.int32)
    columns = np.arange(size)
    buffer = np.empty_like(best)  # one for all rows: fresh pages for each would cost more than the sums
    for i in range(size - 1):
        sums = np.add(best[i, i + 1 :, None], best[i + 1 :, :], out=buffer[i + 1 :])
        k = np.argmin(sums, axis=0)
        split[i] = k + i + 1
        merged[i] = sums[k, columns]
    return merged, split


def _refine(edges: FloatArray, weights: FloatArray) -> FloatArray:
    """Lloyd's two steps on the tree, in turn and off the grid: centroids of every level, then every edge.

    An edge that parts nodes at the levels b >= s lies where sum_b w_b [(t - left_b)^2 - (t - right_b)^2] = 0.
    """
    max_bits = len(weights) - 1
    edges = edges.copy()
    position = np.arange(1, len(edges) - 1)
    for _ in range(_REFINEMENT_SWEEPS):
        numerator, denominator = np.zeros(len(position)), np.zeros(len(position))
        for bits in range(1, max_bits + 1):
            width = 2 ** (max_bits - bits)
            centres = _centroids(edges[::width])
            parts = position % width == 0
            right = position[parts] // width
            lo, hi = centres[right - 1], centres[right]
            numerator[parts] += weights[bits] * (hi * hi - lo * lo)
            denominator[parts] += 2.0 * weights[bits] * (hi - lo)
        edges[1:-1] = numerator / denominator
    return edges


def _centroids(edges: FloatArray) -> FloatArray:
    mass, first, _ = (np.diff(m) for m in moments(edges))
    centres: FloatArray = first / mass
    return 0.5 * (centres - centres[::-1])  # symmetric to the last bit


def _level(edges: FloatArray, bits: int) -> CodebookLevel:
    """Round the centroids to integers with the scale that gives the least error."""
    centres = _centroids(edges)
    wide = bits >= LEAST_WIDE_BITS
    candidates = []
    for limit in (WIDE_VALUE,) if wide else _LIMITS_TRIED:
        scale = centres[-1] / limit
        values = np.rint(centres / scale)
        candidates.append((mean_squared_error(values * scale), scale, values))
    mse, scale, values = min(candidates, key=lambda candidate: candidate[0])
    integers = values.astype(np.int16) if wide else values.astype(np.int8)
    return CodebookLevel(bits, integers, float(np.float32(scale)), mse)
