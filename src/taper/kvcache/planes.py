"""Keys and values of one sequence as planes in paged blocks, read at any of their bits (docs/kv.md)."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from taper.errors import DoesNotFitError, UsageError
from taper.kernels import PlanesBlocks, PlanesLayout, kv_planes, planes_attention, planes_rope_store
from taper.kvcache.format import MAX_KV_BITS, KvPlanes
from taper.kvcache.pool import KvPool

BLOCK_ENTRIES = kv_planes.BLOCK_ENTRIES

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

# Lower planes are kept for a block more than the window, so that drafts may be taken back.
_MARGIN = BLOCK_ENTRIES
# Tokens of a pass, over whose span lower planes are held: what the engine's prefill takes at a time.
_PASS_ENTRIES = 256
_NONE = -1
_FAR = 1 << 60


@dataclass(frozen=True, slots=True)
class PlanesLayer:
    """One layer of a cache of planes."""

    blocks: PlanesBlocks
    index: int

    def store(self, qkv: F32, num_heads: int, position: int, cos: F32, sin: F32) -> None:
        """As `KvLayer.store`; queries and keys are rotated by a Hadamard matrix, too."""
        planes_rope_store(qkv, num_heads, self.blocks, self.index, position, cos, sin)

    def attention(self, qkv: F32, num_heads: int, position: int, scale: float) -> F32:
        """As `KvLayer.attention`."""
        return planes_attention(qkv, num_heads, self.blocks, self.index, position, scale)


def planes_layout(kv: KvPlanes, num_layers: int, num_kv_heads: int, head_dim: int) -> PlanesLayout:
    """What a block of such a cache holds.

    Raises:
        UsageError: bits for another number of layers, or a head_dim that planes cannot hold.
    """
    if kv.num_layers not in (None, num_layers):
        raise UsageError(
            f"a KV format has bits for {kv.num_layers} layers, the model has {num_layers}", "give as many"
        )
    if head_dim % 16 or head_dim > 256:
        raise UsageError(
            f"head_dim is {head_dim}; a KV cache of planes needs a multiple of 16 up to 256", "use float16"
        )
    return PlanesLayout(num_kv_heads, head_dim, stored_bits(kv, num_layers))


def stored_bits(kv: KvPlanes, num_layers: int) -> list[tuple[int, int, int, int]]:
    """By layer: bits of keys, those in the upper part, bits of values, those in the upper part."""
    layers = map(kv.layer, range(num_layers))
    return [(key, old_key, value, old_value) for key, value, old_key, old_value in layers]


class PlanesCache:
    """A sequence's cache of fixed capacity over the blocks of a pool.

    Args:
        kv: bits that are stored, and what is kept of old entries.
        num_layers, num_kv_heads, head_dim: of the model.
        capacity: tokens that fit, at least 1.
        pool: where blocks come from; None makes one for this cache alone.
        reading: bits that are read; None reads all that is stored.

    Attributes:
        native: the cache as the native decoder takes it.
        layers: the same by layer.

    Raises:
        UsageError: when the capacity is below 1, or the reading wants more than is stored.
        DoesNotFitError: when the system refuses the address space.
    """

    def __init__(
        self,
        kv: KvPlanes,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        pool: KvPool | None = None,
        reading: KvPlanes | None = None,
    ) -> None:
        if capacity < 1:
            raise UsageError(
                f"a KV cache of {capacity} tokens holds nothing", hint="ask for at least 1 token"
            )
        self.capacity = capacity
        self.kv = kv
        self._shape = (num_layers, num_kv_heads, head_dim)
        num_blocks = -(-capacity // BLOCK_ENTRIES)
        if pool is None:
            pool = KvPool(planes_layout(kv, num_layers, num_kv_heads, head_dim), num_blocks)
        self.pool = pool
        self._stored = stored_bits(kv, num_layers)
        self._num_tokens = 0
        self._table: I32 = np.full((2, num_blocks), _NONE, np.int32)
        self._num_released = 0  # blocks that have given up their lower parts, all at the beginning
        reading = kv if reading is None else reading
        self._bits, self._window = _read_bits(kv, reading, num_layers)
        self._reads_lower = _exceeds_kept(kv, reading, num_layers)
        lower = None if pool.lower is None else pool.lower.memory
        self.native = PlanesBlocks(
            pool.layout, pool.upper.memory, lower, self._table, self._bits, self._window
        )
        self.layers = tuple(PlanesLayer(self.native, index) for index in range(num_layers))
        weakref.finalize(self, _give_back_all, pool, self._table)

    @property
    def num_tokens(self) -> int:
        """Entries that are filled: the position of the next token."""
        return self._num_tokens

    @property
    def bytes_used(self) -> int:
        """Bytes of the blocks that the sequence holds, shared ones counted in full."""
        parts = (self._table >= 0).sum(axis=1)
        return int(parts[0] * self.pool.layout.upper_bytes + parts[1] * self.pool.layout.lower_bytes)

    def bytes_at(self, num_tokens: int) -> int:
        """Bytes of the blocks that so many entries take at most, written in passes of `_PASS_ENTRIES`."""
        layout = self.pool.layout
        blocks = recent = -(-num_tokens // BLOCK_ENTRIES)
        if self.kv.window is not None:
            recent = -(-(self.kv.window + _MARGIN + _PASS_ENTRIES) // BLOCK_ENTRIES) + 1
        return blocks * layout.upper_bytes + min(blocks, recent) * layout.lower_bytes

    def bytes_read(self, num_tokens: int) -> int:
        """Bytes that attention of one new token reads when it sees `num_tokens` entries."""
        old = self._num_old(num_tokens - 1) * BLOCK_ENTRIES
        entries = np.array([num_tokens - old, num_tokens - old, old, old])
        num_layers, num_kv_heads, head_dim = self._shape
        group = kv_planes.group_size(head_dim)
        bits = int((self._bits.astype(int) + 1).sum(axis=0) @ entries) * head_dim
        bits += 2 * num_layers * num_tokens * kv_planes.EXPONENT_BITS * (head_dim // group)
        return bits * num_kv_heads // 8

    def entries(self, layer: int) -> tuple[F32, F32]:
        """Copies of a layer's filled keys (after RoPE, the Hadamard rotation taken back) and values as the
        next token would read them, float32 (kv_heads, num_tokens, head_dim)."""
        layer = range(self._shape[0])[layer]
        parts = []
        for block in range(-(-self._num_tokens // BLOCK_ENTRIES)):
            read = self._bits[layer, 2:] if block < self._num_old(self._num_tokens) else self._bits[layer, :2]
            upper = self.pool.upper.memory[self._table[0, block]]
            lower = None
            if self.pool.lower is not None and self._table[1, block] >= 0:
                lower = self.pool.lower.memory[self._table[1, block]]
            bits = (int(read[0]), int(read[1]))
            parts.append(kv_planes.read_block(self._stored, self._shape, layer, upper, lower, bits))
        if not parts:
            none = np.zeros((self._shape[1], 0, self._shape[2]), np.float32)
            return none, none
        keys, values = (
            np.concatenate(side, axis=1)[:, : self._num_tokens] for side in zip(*parts, strict=True)
        )
        return kv_planes.rotate_back(keys), values

    def require(self, num_tokens: int) -> int:
        """Number of entries after `num_tokens` more, for which the cache then holds blocks.

        Raises DoesNotFitError beyond the capacity, or when the pool is exhausted.
        """
        end = self._num_tokens + num_tokens
        if end > self.capacity:
            raise DoesNotFitError(
                f"{num_tokens} tokens after {self._num_tokens} are {end}, the context holds {self.capacity}",
                hint="shorten the prompt, generate fewer tokens, or ask for a larger context",
            )
        first, last = self._num_tokens // BLOCK_ENTRIES, -(-end // BLOCK_ENTRIES)
        for block in range(first, last):
            for row, parts in enumerate((self.pool.upper, self.pool.lower)):
                if parts is not None:
                    self._own(row, block)
        return end

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` entries, written by now in every layer, as filled."""
        self._num_tokens = self.require(num_tokens)

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` entries, to replay or to drop rejected drafts.

        Raises:
            UsageError: when it is negative, beyond the filled entries, or where the next token would read
                planes that were given up (`keeps` says where).
        """
        if not 0 <= num_tokens <= self._num_tokens:
            raise UsageError(
                f"cannot truncate to {num_tokens} tokens: the cache holds {self._num_tokens}",
                hint=f"choose 0..{self._num_tokens}",
            )
        kept = self.keeps(num_tokens)
        if kept != num_tokens:
            raise UsageError(
                f"cannot truncate to {num_tokens} tokens: planes that the next token reads were given up",
                hint=f"truncate to {kept} and run the tokens again, or use a KV format without a window",
            )
        for block in range(-(-num_tokens // BLOCK_ENTRIES), self._table.shape[1]):
            self._give_back(0, block)
            self._give_back(1, block)
        self._num_released = min(self._num_released, num_tokens // BLOCK_ENTRIES)
        self._num_tokens = num_tokens

    def keeps(self, num_tokens: int) -> int:
        """The largest number of entries up to `num_tokens` that it can be truncated to: this many, or none
        where the next token would read planes that were given up."""
        spared = self._num_old(num_tokens) if self._reads_lower else num_tokens // BLOCK_ENTRIES
        return num_tokens if self._num_released <= spared else 0

    def fork(self, num_tokens: int, capacity: int, reading: KvPlanes | None = None) -> PlanesCache:
        """Another sequence that begins with the first entries of this one. Blocks are shared until one of the
        two writes into them.

        Raises:
            UsageError, DoesNotFitError: as `truncate` and the constructor; the pool is exhausted.
        """
        other = PlanesCache(self.kv, *self._shape, capacity, self.pool, reading)
        other._num_released = self._num_released
        if not 0 <= num_tokens <= min(self._num_tokens, capacity) or other.keeps(num_tokens) != num_tokens:
            raise UsageError(
                f"{num_tokens} entries cannot be shared: the cache holds {self._num_tokens}, the other one "
                f"{capacity}",
                "choose fewer, outside what a window has given up",
            )
        for block in range(-(-num_tokens // BLOCK_ENTRIES)):
            for row, parts in enumerate((self.pool.upper, self.pool.lower)):
                index = int(self._table[row, block])
                if parts is None or index < 0:
                    continue
                parts.share(index)
                other._table[row, block] = index
        other._num_tokens = num_tokens
        return other

    def _num_old(self, position: int) -> int:
        """Blocks that are old for a token at `position`; the rule of docs/numerics.md."""
        return max(0, position - self._window + 1) // BLOCK_ENTRIES

    def _own(self, row: int, block: int) -> None:
        """Hold a part that may be written: a new one, or a copy of one that others hold too."""
        parts = self.pool.upper if row == 0 else self.pool.lower
        assert parts is not None
        index = int(self._table[row, block])
        if index >= 0 and not parts.is_shared(index):
            return
        self._table[row, block] = parts.take()
        if index >= 0:
            parts.memory[self._table[row, block]] = parts.memory[index]
            parts.give_back(index)

    def _give_back(self, row: int, block: int) -> None:
        parts = self.pool.upper if row == 0 else self.pool.lower
        if parts is not None and self._table[row, block] >= 0:
            parts.give_back(int(self._table[row, block]))
            self._table[row, block] = _NONE

    def release_old(self) -> None:
        """Give up what no token from here on reads: the lower planes behind the window and a block more, so
        that drafts can be taken back. Tokens read the same with or without; `truncate` reaches less far."""
        if self.pool.lower is None or self.kv.window is None:
            return
        # By the stored window: a reading's own may be shorter.
        released = max(0, self._num_tokens - _MARGIN - self.kv.window + 1) // BLOCK_ENTRIES
        for block in range(self._num_released, released):
            self._give_back(1, block)
        self._num_released = max(self._num_released, released)


def _read_bits(kv: KvPlanes, reading: KvPlanes, num_layers: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Bits read, uint8 (layers, 4), and the window. Raises UsageError where it is more than is kept."""
    window = _FAR if reading.window is None else reading.window
    if kv.window is not None and window > kv.window and _exceeds_kept(kv, reading, num_layers):
        raise UsageError(
            f"a KV cache {kv} keeps all bits for {kv.window} entries; {reading} reads them longer",
            f"read at a window of at most {kv.window}",
        )
    bits = np.array([reading.layer(layer) for layer in range(num_layers)], np.uint8)
    for layer, read in enumerate(bits.tolist()):
        if any(wanted > stored for wanted, stored in zip(read, kv.layer(layer), strict=True)):
            raise UsageError(
                f"a KV cache {kv} cannot be read at {reading}",
                f"read at most what is stored, up to {MAX_KV_BITS} bits",
            )
    return bits, window


def _exceeds_kept(kv: KvPlanes, reading: KvPlanes, num_layers: int) -> bool:
    """Whether a reading takes more bits of recent entries than are kept of old ones."""
    pairs = [(reading.layer(layer), kv.layer(layer)) for layer in range(num_layers)]
    return any(read[0] > kept[2] or read[1] > kept[3] for read, kept in pairs)


def _give_back_all(pool: KvPool, table: I32) -> None:
    for parts, row in ((pool.upper, table[0]), (pool.lower, table[1])):
        if parts is not None:
            for index in row[row >= 0].tolist():
                parts.give_back(index)
