"""Keys and values of one sequence, in memory that the system hands out as it fills."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from taper.errors import DoesNotFitError, UsageError
from taper.kernels import attention, rope_store
from taper.kvcache.memory import anonymous

F32 = npt.NDArray[np.float32]
KvArray = npt.NDArray[np.float16] | npt.NDArray[np.float32]


# Entries of a block of keys, which lie side by side: docs/numerics.md, "KV cache and attention".
KEY_BLOCK = 16


class KvLayer(NamedTuple):
    """One layer's keys (after RoPE), (kv_heads, rows / 16, head_dim, 16), and values, (kv_heads, rows,
    head_dim); rows is the capacity rounded up to a multiple of 16."""

    keys: KvArray
    values: KvArray

    def store(self, qkv: F32, num_heads: int, position: int, cos: F32, sin: F32) -> None:
        """Rotate queries and keys of consecutive tokens; write keys and values.

        Args:
            qkv: (tokens, (num_heads + 2 kv_heads) * head_dim), queries, keys, values; overwritten.
            num_heads: query heads.
            position: of the first token.
            cos: (rows >= position + tokens, head_dim / 2).
            sin: as `cos`.
        """
        rope_store(qkv, num_heads, self.keys, self.values, position, cos, sin)

    def attention(self, qkv: F32, num_heads: int, position: int, scale: float) -> F32:
        """Float32 (tokens, num_heads * head_dim): each token sees the entries up to its own.

        Args:
            qkv: rows that `store` has rotated.
            num_heads: query heads.
            position: of the first of these rows.
            scale: multiplies the scores.
        """
        return attention(qkv, num_heads, self.keys, self.values, position, scale)


class KvCache:
    """A sequence's cache of fixed capacity.

    All layers lie in one anonymous map: pages become resident when they are first written, so a large
    capacity costs address space only. The map dies with the cache.

    Args:
        num_layers: layers of the model.
        num_kv_heads: KV heads of a layer.
        capacity: tokens that fit, at least 1.
        head_dim: features of a head.
        dtype: float16 or float32.

    Attributes:
        array: everything, (num_layers, 2, num_kv_heads, rows, head_dim), keys and values of a layer.
        layers: the same by layer, the keys in their blocks.

    Raises:
        UsageError: when the capacity is below 1.
        DoesNotFitError: when the system refuses the address space.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, capacity: int, head_dim: int, dtype: npt.DTypeLike
    ) -> None:
        if capacity < 1:
            raise UsageError(
                f"a KV cache of {capacity} tokens holds nothing", hint="ask for at least 1 token"
            )
        self.capacity = capacity
        self.token_bytes = 2 * num_layers * num_kv_heads * head_dim * np.dtype(dtype).itemsize
        self._num_tokens = 0
        blocks = -(-capacity // KEY_BLOCK)
        memory = anonymous(blocks * KEY_BLOCK * self.token_bytes).view(dtype)
        self.array: KvArray = memory.reshape(num_layers, 2, num_kv_heads, blocks * KEY_BLOCK, head_dim)
        keys = (num_kv_heads, blocks, head_dim, KEY_BLOCK)
        self.layers = tuple(KvLayer(layer[0].reshape(keys), layer[1]) for layer in self.array)

    @property
    def num_tokens(self) -> int:
        """Entries that are filled: the position of the next token."""
        return self._num_tokens

    @property
    def bytes_used(self) -> int:
        """Bytes that the filled entries take."""
        return self._num_tokens * self.token_bytes

    @property
    def native(self) -> KvArray:
        """The cache as the native decoder takes it."""
        return self.array

    def bytes_at(self, num_tokens: int) -> int:
        """Bytes that so many entries take."""
        return num_tokens * self.token_bytes

    def release_old(self) -> None:
        """Give up what no later token reads: nothing here."""

    def keeps(self, num_tokens: int) -> int:
        """The largest number of entries up to `num_tokens` that it can be truncated to: this many."""
        return num_tokens

    def bytes_read(self, num_tokens: int) -> int:
        """Bytes that attention of one new token reads when it sees `num_tokens` entries."""
        return num_tokens * self.token_bytes

    def entries(self, layer: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Copies of a layer's filled keys (after RoPE) and values, float32 (kv_heads, num_tokens,
        head_dim)."""
        keys, values = self.layers[layer]
        blocks = keys[:, : -(-self._num_tokens // KEY_BLOCK)].swapaxes(2, 3)
        rows = blocks.reshape(len(keys), -1, keys.shape[2])
        return (
            rows[:, : self._num_tokens].astype(np.float32),
            values[:, : self._num_tokens].astype(np.float32),
        )

    def require(self, num_tokens: int) -> int:
        """Number of entries after `num_tokens` more. Raises DoesNotFitError beyond the capacity."""
        end = self._num_tokens + num_tokens
        if end > self.capacity:
            raise DoesNotFitError(
                f"{num_tokens} tokens after {self._num_tokens} are {end}, the context holds {self.capacity}",
                hint="shorten the prompt, generate fewer tokens, or ask for a larger context",
            )
        return end

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` entries, written by now in every layer, as filled."""
        self._num_tokens = self.require(num_tokens)

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` entries, to replay or to drop rejected drafts.

        Raises:
            UsageError: when it is negative or beyond the filled entries.
        """
        if not 0 <= num_tokens <= self._num_tokens:
            raise UsageError(
                f"cannot truncate to {num_tokens} tokens: the cache holds {self._num_tokens}",
                hint=f"choose 0..{self._num_tokens}",
            )
        self._num_tokens = num_tokens
