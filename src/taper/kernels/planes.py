"""Bit planes (docs/format.md, "A plane"): matrices that are read at any width, packing, unpacking."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from taper.kernels import _native

# Native classes, used directly: a Python shell around them would cost a call per layer and add nothing.
#
# Planes(planes, values, level_scales, row_scales, bias, in_features): a weight matrix. planes: uint8
# (N, cols / 8) each, most significant first, kept alive, read-only memory maps welcome. values: bits -> int8
# (2**bits,), or int8 (N, 2**bits) where every row has its own (kept alive, rows may lie apart), or at 7 and 8
# bits int16 (2**bits,) within +-16319, for consecutive widths; widths above len(planes) may be there (a
# truncated file) and cannot be read. row_scales: float32, (1, N) or one row per width in `values`. bias:
# float32 (N,) or None. Raises TypeError or ValueError for anything else.
#
# Activations(q, scale, sum, low=None, low_sum=None): int8 rows (T, cols) with a scale and a sum each; with
# `low`, an activation is 256 * q + low. Copies what it is given.
Planes = _native.Planes
Activations = _native.Activations
# Outliers(starts, columns, values, in_features): weights beside the planes in compressed rows. starts: int32
# (N + 1); columns: uint16, rising in each row; values: float16. add_product(activations, out) adds their
# product to float32 (T, N), add_rows(indices, out) the named rows to float32 (len(indices), in_features).
Outliers = _native.Outliers
# Decoder(heads=, kv_heads=, head_dim=, score_scale=, embedding=, layers=, head=): a whole decoder step as one
# call. embedding: (planes, outliers or None, signs or None, block, gain or None). A layer: qkv, o, gate_up,
# down, each, as the head, (planes, outliers or None, signs or None, block, eps or None, gain or None, {bits:
# magnitude bits of the activations}); eps None is no norm. step(tokens, sequences, widths, logits, times):
# tokens: int32, those of the sequences one after another; a sequence: (number of tokens, position, cache
# array or PlanesBlocks, cos, sin); widths: uint8, planes of qkv, o, gate_up, down of each layer and of the
# head; logits: "last", "all" or "none" of each sequence; times: a dict of ns by stage that is added to, or
# None. Returns float32 (rows, vocab) or None and whether the result is finite, and writes the caches.
Decoder = _native.Decoder
# PlanesLayout(kv_heads, head_dim, layers): what a block of a KV cache of planes holds; layers: (bits of keys,
# those in the upper part, bits of values, those in the upper part) each. upper_bytes, lower_bytes: of a
# block's parts.
# PlanesBlocks(layout, upper, lower, table, bits, window): the blocks of one sequence. upper, lower: uint8
# (parts, bytes), lower None where the layout has none; table: int32 (2, blocks), which parts, -1 for none,
# read at each call; bits: uint8 (layers, 4), read of keys, values, old keys, old values; window: blocks that
# lie this many entries back are old. All are kept alive.
PlanesLayout = _native.PlanesLayout
PlanesBlocks = _native.PlanesBlocks


def pack_planes(codes: NDArray[np.uint8], parent_bits: int) -> list[NDArray[np.uint8]]:
    """Cut codes (N, K) into `parent_bits` planes (N, padded_cols(K) / 8), most significant first.

    Raises:
        TypeError: codes are not uint8.
        ValueError: a code does not fit `parent_bits`, or `parent_bits` is outside 1..8.
    """
    return _native.pack_planes(codes, parent_bits)


def unpack_codes(planes: Sequence[NDArray[np.uint8]], bits: int, in_features: int) -> NDArray[np.uint8]:
    """The first `bits` bits of every code, (N, in_features); planes past `bits` are not read.

    Raises:
        ValueError: fewer than `bits` planes, or a plane of another shape.
    """
    return _native.unpack_codes(planes, bits, in_features)


def padded_cols(features: int) -> int:
    """Columns that `features` take up in a plane: the next multiple of 64."""
    return _native.padded_cols(features)


def hadamard_block(features: int) -> int:
    """Width of a rotation block: the largest power of two that divides `features`.

    Raises:
        ValueError: `features` is not positive.
    """
    if features < 1:
        raise ValueError(f"features is {features}, expected at least 1")
    return features & -features
