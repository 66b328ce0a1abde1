"""docs/numerics.md and docs/format.md a second time, in NumPy: bit exact, slow, used by tests only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

KEY_BLOCK = 16
ATTENTION_CHUNK = 256

_LANES = 16
_LEAST_EXPONENT = -100


@dataclass(frozen=True, slots=True)
class OracleActivations:
    """What `taper.kernels.Activations` holds: q int8 (T, cols), scale float32 (T,), sum int32 (T,), and the
    same of the low parts, which are None for at most 7 magnitude bits."""

    q: NDArray[np.int8]
    scale: Float32
    sum: NDArray[np.int32]
    low: NDArray[np.int8] | None = None
    low_sum: NDArray[np.int32] | None = None


def fma(x: Any, y: Any, z: Any) -> Float32:
    """x * y + z with one rounding to float32.

    The product of two float32 is exact in float64. The sum is rounded to odd there (Boldo and Melquiond,
    2008): 53 bits are more than 24 + 2, so rounding once more to float32 gives the nearest of the exact sum.
    """
    product = np.float64(x) * np.float64(y)
    addend = np.float64(z)
    total = np.asarray(product + addend)
    with np.errstate(invalid="ignore"):
        part = total - product
        error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    outward = (error > 0) == (total > 0)
    odd = np.where(inexact, bits + np.where(outward, 1, -1), bits)
    return odd.view(np.float64).astype(np.float32)


def _tree(lanes: Float32) -> Float32:
    """Sum the last axis of sixteen lanes in the order of `sum16`."""
    half = _LANES // 2
    while half >= 1:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0]


def _groups(x: Float32) -> Float32:
    """Cut the last axis into rows of sixteen; lanes past the end are zeros, which add nothing."""
    n = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-n // _LANES) * _LANES), np.float32)
    padded[..., :n] = x
    return padded.reshape(*x.shape[:-1], -1, _LANES)


def sum16(x: Float32) -> Float32:
    """Sum of the last axis."""
    groups = _groups(x)
    lanes = np.zeros((*x.shape[:-1], _LANES), np.float32)
    for i in range(groups.shape[-2]):
        lanes = lanes + groups[..., i, :]
    return _tree(lanes)


def dot16(x: Float32, y: Float32) -> Float32:
    """Dot products over the last axis."""
    x, y = np.broadcast_arrays(x, y)
    left, right = _groups(x), _groups(y)
    lanes = np.zeros((*x.shape[:-1], _LANES), np.float32)
    for i in range(left.shape[-2]):
        lanes = fma(left[..., i, :], right[..., i, :], lanes)
    return _tree(lanes)


def exp(x: Float32) -> Float32:
    """Elementwise exp32."""
    bounded = np.clip(x, np.float32(-87), np.float32(88))
    n = np.rint(bounded * np.float32(1.44269504))
    r = fma(n, np.float32(-0.693145752), bounded)
    r = fma(n, np.float32(-1.42860677e-6), r)
    p = np.full_like(x, np.float32(1 / 720))
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1, 1):
        p = fma(p, r, np.float32(coefficient))
    exponent = np.where(np.isnan(x), 0, n).astype(np.int32)
    y: Float32 = p * ((exponent + 127) << 23).view(np.float32)
    y[x < -87] = 0
    return y


def weight32(x: Float32) -> Float32:
    """A softmax's weights, elementwise, of what is at most 0 or NaN."""
    t = np.maximum(x * np.float32(1.44269504), np.float32(-100))
    n = np.rint(t)
    r = t - n
    p = np.full_like(x, np.float32(0.00132647273))
    for coefficient in (0.00967151299, 0.0555073358, 0.240222424, 0.693147004, 1):
        p = fma(p, r, np.float32(coefficient))
    exponent = np.where(np.isnan(x), 0, n).astype(np.int32)
    y: Float32 = p * ((exponent + 127) << 23).view(np.float32)
    return y


def rms_norm(x: Float32, gain: Float32 | None, eps: float) -> Float32:
    """Norm of each row of (T, n)."""
    mean = dot16(x, x) / np.float32(x.shape[-1])
    inv = np.float32(1) / np.sqrt(mean + np.float32(eps))
    y: Float32 = x * inv[:, None]
    return y if gain is None else y * gain


def rotate(x: Float32, signs: Float32, block: int, inverse: bool = False) -> Float32:
    """Rotate each row of (T, n), or back."""
    y = x.copy() if inverse else x * signs
    s = 1
    while s < block:
        pairs = y.reshape(x.shape[0], -1, 2, s)
        a, b = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
        pairs[:, :, 0], pairs[:, :, 1] = a + b, a - b
        s *= 2
    y = y * np.float32(1 / np.sqrt(np.float64(block)))
    return y * signs if inverse else y


def quantize(x: Float32, cols: int, magnitude_bits: int = 7) -> OracleActivations:
    """Turn rows (T, n) into integers with one power-of-two scale each, in two int8 parts above 7 bits."""
    tokens, n = x.shape
    q = np.zeros((tokens, cols), np.int32)
    scale = np.ones(tokens, np.float32)
    limit = min(2**magnitude_bits - 1, 127 * 257)
    for t in range(tokens):
        a = np.abs(x[t]).max()
        if not np.isfinite(a):
            scale[t] = np.nan
        elif a != 0:
            e = _LEAST_EXPONENT
            while np.rint(np.ldexp(np.float64(a), -e)) > limit:
                e += 1
            q[t, :n] = np.rint(np.ldexp(x[t].astype(np.float64), -e))
            scale[t] = np.ldexp(np.float32(1), e)
    if magnitude_bits <= 7:
        return OracleActivations(q.astype(np.int8), scale, q.sum(axis=1, dtype=np.int32))
    high = (q + 128) // 256
    low = q - 256 * high
    sums = (part.sum(axis=1, dtype=np.int32) for part in (high, low))
    return OracleActivations(high.astype(np.int8), scale, next(sums), low.astype(np.int8), next(sums))


def prepare(
    x: Float32,
    *,
    cols: int,
    signs: Float32 | None,
    block: int,
    eps: float | None = None,
    gain: Float32 | None = None,
    magnitude_bits: int = 7,
) -> OracleActivations:
    """Norm, rotation, quantisation of rows (T, n)."""
    y = x if eps is None else rms_norm(x, gain, eps)
    if signs is not None:
        y = rotate(y, signs, block)
    return quantize(y, cols, magnitude_bits)


def swiglu(gate_up: Float32) -> Float32:
    """silu(gate) * up of rows (T, 2n)."""
    gate, up = np.split(gate_up, 2, axis=1)
    y: Float32 = gate / (np.float32(1) + exp(-gate)) * up
    return y


def block_order(cols: int) -> NDArray[np.intp]:
    """For each bit of a row of a plane, byte by byte and lowest first, the column that it belongs to."""
    order, begin, width = [], 0, 512
    while begin < cols:
        if cols - begin < width:
            width //= 2
            continue
        columns = np.arange(begin, begin + width).reshape(8, width // 8)  # [g, j] is column V * g + j
        order.append(columns.T.ravel())
        begin += width
    return np.concatenate(order)


def pack_planes(codes: NDArray[np.uint8], parent_bits: int) -> list[NDArray[np.uint8]]:
    """Cut codes (N, K) into planes, most significant first."""
    rows, features = codes.shape
    cols = -(-features // 64) * 64
    padded = np.zeros((rows, cols), np.uint8)
    padded[:, :features] = codes
    shuffled = padded[:, block_order(cols)]
    return [
        np.packbits((shuffled >> (parent_bits - 1 - p)) & 1, axis=1, bitorder="little")
        for p in range(parent_bits)
    ]


def unpack_codes(planes: Sequence[NDArray[np.uint8]], bits: int, in_features: int) -> NDArray[np.uint8]:
    """The first `bits` bits of every code."""
    rows, stride = planes[0].shape
    shuffled = np.zeros((rows, 8 * stride), np.uint8)
    for plane in planes[:bits]:
        shuffled = shuffled << 1 | np.unpackbits(plane, axis=1, bitorder="little")
    codes = np.empty_like(shuffled)
    codes[:, block_order(8 * stride)] = shuffled
    return codes[:, :in_features]


def integers(activations: OracleActivations) -> NDArray[np.int64]:
    """The activations (T, cols), their parts put together."""
    high = activations.q.astype(np.int64)
    return high if activations.low is None else 256 * high + activations.low


def matmul(
    values: NDArray[np.int8] | NDArray[np.int16],
    activations: OracleActivations,
    *,
    level_scale: float,
    row_scale: Float32,
    bias: Float32 | None = None,
    residual: Float32 | None = None,
) -> Float32:
    """A linear layer over the integer values (N, K) of a level, K the width before padding."""
    q = integers(activations)[:, : values.shape[1]]
    acc = (q @ values.astype(np.int64).T).astype(np.float32)
    alpha = activations.scale * np.float32(level_scale)
    y = acc * (row_scale[None, :] * alpha[:, None])
    if bias is not None:
        y = y + bias
    return y if residual is None else residual + y


def add_outliers(
    out: Float32,
    activations: OracleActivations,
    starts: NDArray[np.int32],
    columns: NDArray[np.uint16],
    values: NDArray[np.float16],
) -> Float32:
    """out (T, N) plus the outliers' product: one term after another, then times the token's scale."""
    result, q = out.copy(), integers(activations).astype(np.float32)
    for row in range(out.shape[1]):
        span = slice(starts[row], starts[row + 1])
        total = np.zeros(len(out), np.float32)
        for column, value in zip(columns[span], values[span], strict=True):
            total = total + np.float32(value) * q[:, column]
        if span.start < span.stop:
            result[:, row] = result[:, row] + total * activations.scale
    return result


def dequantize_rows(
    values: NDArray[np.int8] | NDArray[np.int16], level_scale: float, row_scale: Float32
) -> Float32:
    """Rows of integer values as float32."""
    return values.astype(np.float32) * (row_scale * np.float32(level_scale))[:, None]


def rope_tables(
    inv_freq: NDArray[np.float64], num_positions: int, attention_factor: float = 1.0
) -> tuple[Float32, Float32]:
    """Cosines and sines, (num_positions, D/2)."""
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * inv_freq
    cos, sin = np.cos(angles) * attention_factor, np.sin(angles) * attention_factor
    return cos.astype(np.float32), sin.astype(np.float32)


def rope_store(
    qkv: Float32,
    heads: int,
    keys: NDArray[Any],
    values: NDArray[Any],
    position: int,
    cos: Float32,
    sin: Float32,
) -> None:
    """Rotate queries and keys of qkv in place and store keys and values."""
    tokens = qkv.shape[0]
    kv_heads, _, dim = values.shape
    half, rotated = dim // 2, heads + kv_heads
    rows = qkv.reshape(tokens, -1, dim)
    c, s = (table[position : position + tokens, None] for table in (cos, sin))
    x0, x1 = rows[:, :rotated, :half].copy(), rows[:, :rotated, half:].copy()
    rows[:, :rotated, :half] = fma(-x1, s, x0 * c)
    rows[:, :rotated, half:] = fma(x0, s, x1 * c)
    with np.errstate(over="ignore"):
        at = np.arange(position, position + tokens)
        keys[:, at // KEY_BLOCK, :, at % KEY_BLOCK] = rows[:, heads:rotated]
        values[:, position : position + tokens] = rows[:, rotated:].transpose(1, 0, 2)


def attention(
    qkv: Float32, heads: int, keys: NDArray[Any], values: NDArray[Any], position: int, scale: float
) -> Float32:
    """Causal attention; (T, heads * D)."""
    kv_heads, rows_kept, dim = values.shape
    in_rows = keys.transpose(0, 1, 3, 2).reshape(kv_heads, rows_kept, dim)
    rows = qkv.reshape(qkv.shape[0], -1, dim)
    out = np.zeros((qkv.shape[0], heads, dim), np.float32)
    for t in range(qkv.shape[0]):
        for h in range(heads):
            group, seen = h // (heads // kv_heads), position + t + 1
            k, v = (part[group, :seen].astype(np.float32) for part in (in_rows, values))
            state = _attend(rows[t, h], k[:ATTENTION_CHUNK], v[:ATTENTION_CHUNK], scale)
            for begin in range(ATTENTION_CHUNK, seen, ATTENTION_CHUNK):
                chunk = slice(begin, begin + ATTENTION_CHUNK)
                state = merged(state, _attend(rows[t, h], k[chunk], v[chunk], scale))
            out[t, h] = state[2] * (np.float32(1) / state[1])
    return out.reshape(qkv.shape[0], -1)


_State = tuple[Float32, Float32, Float32]  # largest score, sum of the weights, weighted sum of the values


def _attend(q: Float32, keys: Float32, values: Float32, scale: float) -> _State:
    """One head over one chunk."""
    scores = np.zeros(len(keys), np.float32)
    for i in range(len(q)):
        scores = fma(q[i], keys[:, i], scores)
    most, total, weights = softmax(scores * np.float32(scale))
    acc = np.zeros(len(q), np.float32)
    for weight, value in zip(weights, values, strict=True):
        acc = fma(weight, value, acc)
    return most, total, acc


def softmax(scores: Float32) -> tuple[Float32, Float32, Float32]:
    """Of one chunk: the largest score, the sum of the weights, and the weights."""
    most = np.fmax.reduce(scores, initial=np.float32(-np.inf))
    weights = weight32(scores - most)
    return most, sum16(weights), weights


def merged(into: _State, chunk: _State) -> _State:
    """The state after a later chunk."""
    most = chunk[0] if chunk[0] > into[0] else into[0]
    a, b = exp(np.array([into[0] - most, chunk[0] - most], np.float32))
    return most, fma(into[1], a, chunk[1] * b), fma(into[2], a, chunk[2] * b)
