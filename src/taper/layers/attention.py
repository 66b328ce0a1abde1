"""Causal self-attention over a KV cache: RoPE, the cache write and the weighted sum."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def score_scale(head_dim: int) -> float:
    """What scores are multiplied with: 1 over the square root of the features of a head, as a float32."""
    return float(np.float32(head_dim**-0.5))


class CacheLayer(Protocol):
    """One layer of a KV cache (`taper.kvcache`)."""

    def store(self, qkv: F32, num_heads: int, position: int, cos: F32, sin: F32) -> None:
        """Rotate queries and keys of consecutive tokens; write keys and values."""
        ...

    def attention(self, qkv: F32, num_heads: int, position: int, scale: float) -> F32:
        """Float32 (tokens, num_heads * head_dim): each token sees the entries up to its own."""
        ...


class Attention:
    """Multi-head, grouped-query and multi-query attention; the cache's shape says which.

    Args:
        num_heads: query heads, a multiple of the KV heads.
        head_dim: features of a head; scores are divided by its square root.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        self._num_heads = num_heads
        self._scale = score_scale(head_dim)

    def store(self, qkv: F32, kv: CacheLayer, position: int, cos: F32, sin: F32) -> None:
        """Rotate queries and keys of consecutive tokens; write keys and values into the cache.

        Args:
            qkv: (tokens, (num_heads + 2 kv_heads) * head_dim), queries, keys, values; overwritten.
            kv: written at position .. position + tokens - 1.
            position: of the first token.
            cos: (rows >= position + tokens, head_dim / 2).
            sin: as `cos`.
        """
        kv.store(qkv, self._num_heads, position, cos, sin)

    def __call__(self, qkv: F32, kv: CacheLayer, position: int) -> F32:
        """Float32 (tokens, num_heads * head_dim): each stored token sees the entries up to its own.

        Args:
            qkv: rows that `store` has rotated.
            kv: the cache.
            position: of the first of these rows.
        """
        return kv.attention(qkv, self._num_heads, position, self._scale)
