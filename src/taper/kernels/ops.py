"""Operations on rows of activations, the KV cache, and the state of the native library.

Arrays are C-contiguous NumPy arrays of the stated dtype; another dtype raises TypeError, another shape or
layout ValueError. Nothing is converted. Results are new arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.kernels import _native
from taper.kernels.planes import PlanesBlocks

Float32 = NDArray[np.float32]

# TAPER_ISA and TAPER_NUM_THREADS are read here, so that a wrong value is one line and not a later traceback.
try:
    _native.isa()
except ValueError as error:
    _names = ", ".join(_native.available_isas())
    raise UsageError(f"TAPER_ISA: {error}", hint=f"unset it for the best of {_names}") from None
try:
    _native.num_threads()
except ValueError as error:
    raise UsageError(str(error), hint="unset it to use every core available to the process") from None


def isa() -> str:
    """Name of the instruction set in use, one of `available_isas()`."""
    return _native.isa()


def available_isas() -> list[str]:
    """Instruction sets that this build and this processor run, plainest first."""
    return _native.available_isas()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the block on the named instruction set; meant for tests, switches every thread.

    Raises:
        ValueError: the name is unknown, or the build or the processor lacks it.
    """
    before = _native.isa()
    _native.use_isa(name)
    try:
        yield
    finally:
        _native.use_isa(before)


def num_threads() -> int:
    """Threads that an operation may use, the caller's included."""
    return _native.num_threads()


def set_num_threads(count: int) -> None:
    """Let an operation use up to `count` threads; results do not depend on it.

    The first value is TAPER_NUM_THREADS, or the physical cores available to the process.

    Raises:
        ValueError: `count` is outside 1..1024.
    """
    _native.set_num_threads(count)


def prepare(
    x: Float32,
    *,
    cols: int,
    signs: Float32 | None,
    block: int,
    eps: float | None = None,
    gain: Float32 | None = None,
    magnitude_bits: int = 7,
) -> _native.Activations:
    """Turn rows into the integer activations of a linear layer: norm, rotation, rounding, row by row.

    Args:
        x: float32, (T, n).
        cols: `padded_cols(n)`.
        signs: float32, (n,) of +-1; None leaves the rotation out.
        block: width of a rotation block.
        eps: of the RMS norm; None leaves the norm out.
        gain: float32, (n,); None multiplies nothing.
        magnitude_bits: bits of magnitude of each value: 1..7 for int8, 8..15 for two int8 parts.
    """
    return _native.prepare(
        x, cols=cols, signs=signs, block=block, eps=eps, gain=gain, magnitude_bits=magnitude_bits
    )


def prepare_swiglu(
    gate_up: Float32, *, cols: int, signs: Float32 | None, block: int, magnitude_bits: int = 7
) -> _native.Activations:
    """SwiGLU of (T, 2n), gate first, then rotation, rounding as in `prepare`; `cols` is `padded_cols(n)`."""
    return _native.prepare_swiglu(gate_up, cols=cols, signs=signs, block=block, magnitude_bits=magnitude_bits)


def rms_norm(x: Float32, gain: Float32 | None, eps: float) -> Float32:
    """RMS norm of each row of (T, n), times `gain` (n,) where there is one."""
    return _native.rms_norm(x, gain, eps)


def rotate(x: Float32, signs: Float32, block: int, inverse: bool = False) -> Float32:
    """Multiply rows (T, n) by the Hadamard matrix of `signs` (n,) and `block`, or by its inverse."""
    return _native.rotate(x, signs, block, inverse)


def swiglu(gate_up: Float32) -> Float32:
    """silu(gate) * up of rows (T, 2n), gate first; (T, n)."""
    return _native.swiglu(gate_up)


def exp(x: Float32) -> Float32:
    """Elementwise e**x by the polynomial of docs/numerics.md; any shape."""
    return _native.exp(x)


def rope_tables(
    inv_freq: NDArray[np.float64], num_positions: int, attention_factor: float = 1.0
) -> tuple[Float32, Float32]:
    """Cosines and sines of position * inv_freq (D/2,) times the attention factor, (num_positions, D/2)."""
    return _native.rope_tables(inv_freq, num_positions, attention_factor)


def rope_store(
    qkv: Float32,
    heads: int,
    keys: NDArray[Any],
    values: NDArray[Any],
    position: int,
    cos: Float32,
    sin: Float32,
) -> None:
    """Rotate queries in place and store rotated keys, and values, of consecutive tokens.

    Args:
        qkv: (T, (heads + 2 KV) * D); queries and keys are rotated in place.
        heads: query heads.
        keys: float16 or float32, (KV, rows / 16, D, 16), written at position..position + T - 1.
        values: of the same dtype, (KV, rows, D), likewise.
        position: of the first token.
        cos: the whole table of `rope_tables`; rows position..position + T - 1 are used.
        sin: like cos.
    """
    _native.rope_store(qkv, heads, keys, values, position, cos, sin)


def attention(
    qkv: Float32, heads: int, keys: NDArray[Any], values: NDArray[Any], position: int, scale: float
) -> Float32:
    """Causal attention of T consecutive tokens, whose keys and values are in the cache; (T, heads * D).

    Token t reads the cache entries 0..position + t. Arguments as in `rope_store`; `scale` multiplies the
    scores.
    """
    return _native.attention(qkv, heads, keys, values, position, scale)


def planes_rope_store(
    qkv: Float32, heads: int, blocks: PlanesBlocks, layer: int, position: int, cos: Float32, sin: Float32
) -> None:
    """As `rope_store` into the blocks of a KV cache of planes, which hold the positions' parts; queries and
    keys are rotated by a Hadamard matrix, too (docs/numerics.md, "KV cache as planes").

    Args:
        qkv: (T, (heads + 2 KV) * D).
        heads: query heads.
        blocks: of the sequence.
        layer: which.
        position: of the first token.
        cos, sin: as in `rope_store`.
    """
    _native.planes_rope_store(qkv, heads, blocks, layer, position, cos, sin)


def planes_attention(
    qkv: Float32, heads: int, blocks: PlanesBlocks, layer: int, position: int, scale: float
) -> Float32:
    """As `attention` over the blocks of a KV cache of planes; arguments as in `planes_rope_store`."""
    return _native.planes_attention(qkv, heads, blocks, layer, position, scale)
