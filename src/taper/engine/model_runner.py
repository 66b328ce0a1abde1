"""Runs a model's passes for one sequence, and counts what they read."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from taper.config import ModelConfig
from taper.kvcache import KvPlanes
from taper.precision import Bits, KvEntries, LayerBits


class Cache(Protocol):
    """The KV cache of a sequence, as the engine sees it."""

    @property
    def num_tokens(self) -> int:
        """Entries stored."""
        ...

    def bytes_read(self, num_tokens: int) -> int:
        """Bytes that attention over `num_tokens` entries reads."""
        ...

    def bytes_at(self, num_tokens: int) -> int:
        """Bytes that so many entries take."""
        ...

    def keeps(self, num_tokens: int) -> int:
        """The largest number of entries up to `num_tokens` that `truncate` takes."""
        ...

    def release_old(self) -> None:
        """Give up what no later token reads."""
        ...

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` entries."""
        ...

    def entries(self, layer: int) -> KvEntries:
        """Copies of a layer's keys and values, float32 (kv_heads, num_tokens, head_dim)."""
        ...


class Model(Protocol):
    """A decoder, as the engine sees it (`taper.models.Decoder`)."""

    config: ModelConfig
    min_bits: int
    max_bits: int
    context_length: int

    @property
    def has_sensitivity(self) -> bool:
        """Whether it can be read at a fraction of bits."""
        ...

    def new_cache(self, max_tokens: int, reading: KvPlanes | None = None) -> Any:
        """An empty cache, of which so much is read."""
        ...

    def forward(
        self, tokens: NDArray[np.int32], cache: Any, bits: Bits, logits: Literal["last", "all", "none"]
    ) -> NDArray[np.float32] | None:
        """Run tokens that follow the cache's entries."""
        ...

    def bytes_per_pass(self, bits: Bits) -> int:
        """Bytes of weights that one pass reads."""
        ...

    def bits_per_weight(self, bits: Bits) -> float:
        """Planes that a reading takes over weights."""
        ...


class ModelRunner:
    """A model and the KV cache of one sequence.

    Args:
        model: shared between runners.
        num_tokens: that the cache must hold.
        reading: bits that are read of a cache of planes; None reads all that is stored.

    Raises:
        UsageError, DoesNotFitError: as `Decoder.new_cache`.
    """

    def __init__(self, model: Model, num_tokens: int, reading: KvPlanes | None = None) -> None:
        self._model = model
        self._num_tokens = num_tokens
        self._cache: Cache | None = (
            model.new_cache(num_tokens) if reading is None else model.new_cache(num_tokens, reading)
        )
        # Asked once a width: the sum over all matrices would cost more than a decode step of a small model's
        # layer.
        self._weight_bytes: dict[Bits, int] = {}

    @property
    def min_bits(self) -> int:
        """Least width that the model can be read at."""
        return self._model.min_bits

    @property
    def position(self) -> int:
        """Of the next token."""
        assert self._cache is not None
        return self._cache.num_tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache when it is full."""
        assert self._cache is not None
        return self._cache.bytes_at(self._num_tokens)

    def expect(self, num_tokens: int) -> None:
        """Count on so many tokens at most, of those that the cache was made for."""
        self._num_tokens = num_tokens

    def prefill(self, tokens: SequenceOf[int], bits: Bits, is_last: bool) -> NDArray[np.float32] | None:
        """Run a chunk of the prompt; logits, (vocab,), from its last token where it is the last chunk."""
        ids = np.asarray(tokens, np.int32)
        logits = self._forward(ids, bits, "last" if is_last else "none")
        return None if logits is None else logits[0]

    def decode(self, token_id: int, bits: Bits) -> NDArray[np.float32]:
        """Run one generated token; logits, (vocab,)."""
        logits = self._forward(np.array([token_id], np.int32), bits, "last")
        assert logits is not None
        row: NDArray[np.float32] = logits[0]
        return row

    def verify(self, tokens: SequenceOf[int], bits: float) -> NDArray[np.float32]:
        """Run given tokens, such as drafts; the logits after each of them, (tokens, vocab)."""
        logits = self._forward(np.asarray(tokens, np.int32), bits, "all")
        assert logits is not None
        return logits

    def _forward(
        self, ids: NDArray[np.int32], bits: Bits, logits: Literal["last", "all", "none"]
    ) -> NDArray[np.float32] | None:
        assert self._cache is not None
        found = self._model.forward(ids, self._cache, bits, logits)
        self._cache.release_old()
        return found

    def keeps(self, position: int) -> int:
        """The position up to `position` that `truncate` can go back to."""
        assert self._cache is not None
        return self._cache.keeps(position)

    def truncate(self, position: int) -> None:
        """Drop the KV entries from `position` on."""
        assert self._cache is not None
        self._cache.truncate(position)

    def recorded(self, bits: Bits) -> float:
        """What records say of a reading: the bits asked for, or the planes over weights of `LayerBits`."""
        return self._model.bits_per_weight(bits) if isinstance(bits, LayerBits) else bits

    def last_layer_kv(self) -> KvEntries:
        """Copies of the last layer's keys and values so far, float32 (kv_heads, position, head_dim)."""
        assert self._cache is not None
        return self._cache.entries(-1)

    def bytes_of_last_pass(self, bits: Bits) -> int:
        """Bytes that the pass before this call read: weights, and the KV entries up to its last token."""
        assert self._cache is not None
        if bits not in self._weight_bytes:
            self._weight_bytes[bits] = self._model.bytes_per_pass(bits)
        return self._weight_bytes[bits] + self._cache.bytes_read(self._cache.num_tokens)

    def release(self) -> None:
        """Free the KV cache."""
        self._cache = None
