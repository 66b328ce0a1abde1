"""The decoder: token ids and a KV cache in, logits out, at any width that the weights hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from taper.config import ModelConfig
from taper.errors import DoesNotFitError, TaperError, UsageError
from taper.formats.activations import ActivationBits
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.formats.spec import expected_matrices, planes_bytes
from taper.kernels import Decoder as NativeDecoder
from taper.kernels import PlanesBlocks
from taper.kvcache import AnyCache, KvCache, KvPlanes, KvPool, PlanesCache, parse_kv, planes_layout
from taper.layers.attention import CacheLayer
from taper.layers.rope import Rope, context_length
from taper.models.block import Observer, Step
from taper.models.families import family_of
from taper.models.parts import LAYER_MATRICES, Parts, float_parts, planed_parts
from taper.models.readings import Readings
from taper.precision.policy import Bits

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
Logits = Literal["last", "all", "none"]

# Readings whose widths are kept as the native decoder takes them, 4 bytes a layer each.
_MAX_KEPT_WIDTHS = 64


class Decoder:
    """A decoder-only transformer over planes or over float32 weights.

    Over planes, results are the same bytes however a sequence is split into `forward` calls and whatever the
    number of threads (docs/numerics.md). It holds no state of a sequence; that is all in the cache.

    Attributes:
        kv: how keys and values are stored; None: as floats.
        times: of planes, ns by stage of the steps, added up where this is a dictionary and not None.
    """

    def __init__(self, parts: Parts, kv: KvPlanes | None = None) -> None:
        family_of(parts.config)
        self.config: ModelConfig = parts.config
        self.min_bits = parts.min_bits
        self.max_bits = parts.max_bits
        self.context_length = context_length(parts.config)
        self._parts = parts
        self.kv = kv
        shape = (parts.config.num_layers, parts.config.num_kv_heads, parts.config.head_dim)
        self._kv_layout = None if kv is None else planes_layout(kv, *shape)
        self._rope = Rope(parts.config)
        self._matrices = parts.matrices or tuple(expected_matrices(parts.config))
        self._readings = Readings(self._matrices, parts.min_bits, parts.max_bits, parts.sensitivity)
        self._native_widths = lru_cache(maxsize=_MAX_KEPT_WIDTHS)(self._widths_of)
        self.times: dict[str, int] | None = None

    @classmethod
    def from_taper(
        cls,
        file: TaperFile,
        ceilings: Mapping[str, int] | None = None,
        kv: str | None = None,
        activations: ActivationBits | None = None,
    ) -> Decoder:
        """Run an open `.taper` file; its planes stay in the memory map.

        Args:
            file: an open file.
            ceilings: matrix name to the planes that are used of it at most, as if the file held no more.
            kv: format of the KV cache as `parse_kv` reads it; None takes that of the activations.
            activations: bits of activations and KV cache; None takes the file's own.

        Raises:
            UsageError: when the architecture, its position embedding or the KV format is not supported.
        """
        chosen = file.header.activations if activations is None else activations
        return cls(planed_parts(file, ceilings, chosen), parse_kv(chosen.kv if kv is None else kv))

    @classmethod
    def from_hf(cls, checkpoint: HfCheckpoint) -> Decoder:
        """Run a Hugging Face checkpoint in float32; `min_bits` and `max_bits` are 32.

        Raises:
            CorruptFileError: when a tensor has another shape than the configuration or values that are not
                finite.
            UsageError: when the architecture or its position embedding is not supported.
        """
        return cls(float_parts(checkpoint))

    def new_cache(
        self, max_tokens: int, reading: KvPlanes | None = None, pool: KvPool | None = None
    ) -> AnyCache:
        """An empty cache for a sequence of at most `max_tokens`.

        Args:
            max_tokens: prompt and answer together.
            reading: of a cache of planes, the bits that are read; None reads all that is stored.
            pool: of a cache of planes, where its blocks come from; None makes a pool for it alone.

        Raises:
            DoesNotFitError: when that is beyond the model's context length or the address space.
            UsageError: a reading of more bits than are stored, or of a cache of floats.
        """
        config = self.config
        if max_tokens > self.context_length:
            raise DoesNotFitError(
                f"a context of {max_tokens} tokens is longer than the model's {self.context_length}",
                hint=f"ask for at most {self.context_length}",
            )
        if self.kv is not None:
            shape = (config.num_layers, config.num_kv_heads, config.head_dim)
            return PlanesCache(self.kv, *shape, max_tokens, pool, reading)
        if reading is not None or pool is not None:
            raise UsageError(
                "a KV cache of floats has no planes to read", "load the model with a KV format such as kv=7"
            )
        dtype = self._parts.kv_dtype
        return KvCache(config.num_layers, config.num_kv_heads, max_tokens, config.head_dim, dtype)

    def new_pool(self, num_blocks: int, num_lower: int | None = None) -> KvPool:
        """Blocks of 64 entries for the caches of several sequences; of a decoder with planes.

        Raises:
            DoesNotFitError: when the system refuses the address space.
            UsageError: a decoder whose KV cache is of floats.
        """
        if self._kv_layout is None:
            raise UsageError(
                "a KV cache of floats has no blocks", "load the model with a KV format such as kv=7"
            )
        return KvPool(self._kv_layout, num_blocks, num_lower)

    def forward(
        self,
        tokens: I32 | Sequence[int],
        cache: AnyCache,
        bits: Bits,
        logits: Logits = "last",
        observe: Observer | None = None,
    ) -> F32 | None:
        """Run tokens that follow the cache's entries; the cache then holds them too.

        Args:
            tokens: (tokens,) ids, at least one, each within the vocabulary.
            cache: from `new_cache`; unchanged when an error is raised.
            bits: min_bits..max_bits. A whole number is the planes to read in every matrix (all of a matrix
                that has fewer); a fraction is a budget in bits per weight, and `LayerBits` has bits for each
                layer, see `widths`. The embedding look-up reads all planes.
            logits: of which tokens: the last, all, or none of them.
            observe: called as observe(name, x) for each matrix of each layer and, as `embed` or `head`, for
                the matrix of the head, whatever `logits` says. x is float32 (tokens, in_features): exactly
                the vector that the matrix of a file meets before its rotation. So it is normalised without
                the norm's gain before `qkv` and `gate_up`, whose columns carry it, and with the final norm's
                gain before the head; where a matrix of a file has a gain of its own, times that.

        Returns:
            Float32 (1 or tokens, vocab_size), or None for `logits="none"`.

        Raises:
            UsageError: for an empty input, a token outside the vocabulary, or bits outside the weights.
            DoesNotFitError: when the tokens do not fit into the cache.
            TaperError: when the result is not finite.
        """
        ids = self._checked_tokens(tokens)
        widths = self._checked_widths(bits, logits)
        if observe is None and self._parts.native is not None:
            return self._step(self._parts.native, ids, [(len(ids), cache)], bits, logits)
        end = cache.require(len(ids))
        cos, sin = self._rope.tables(end, cache.capacity)
        step = Step(cache.num_tokens, cos, sin, self.max_bits, observe, widths)
        x = self._parts.embedding(ids)
        layers: Sequence[CacheLayer] = cache.layers
        for block, kv in zip(self._parts.blocks[:-1], layers[:-1], strict=True):
            x = block(x, kv, step)
        num_wanted = len(ids) if logits == "all" or observe is not None else int(logits == "last")
        last = self._parts.blocks[-1](x, layers[-1], step, num_wanted)
        if observe is not None:
            observe(self._parts.head_name, self._parts.head.product_input(last))
        out = None
        if logits != "none":
            out = self._parts.head(last if logits == "all" else last[-1:], widths[self._parts.head_name])
        # A sum is finite only when every term is: one pass without a temporary the size of the logits.
        if not np.isfinite(np.add.reduce(x if out is None else out, axis=None)):
            raise _not_finite(step.position, bits)
        cache.advance(len(ids))
        return out

    def decode_batch(self, tokens: I32 | Sequence[int], caches: Sequence[AnyCache], bits: Bits) -> F32:
        """Run the next token of several sequences in one pass over the weights.

        Each sequence gets the bytes that a pass of its own would give it.

        Args:
            tokens: (sequences,) ids, at least one.
            caches: of these sequences, each another; each then holds its token too. All are unchanged when an
                error is raised.
            bits: as in `forward`.

        Returns:
            Float32 (sequences, vocab_size).

        Raises:
            UsageError: as `forward`, and for other than one cache a token, a cache that comes twice, or a
                float model.
            DoesNotFitError, TaperError: as `forward`.
        """
        ids = self._checked_tokens(tokens)
        self._checked_widths(bits, "last")
        if len(caches) != len(ids) or len({id(cache) for cache in caches}) != len(ids):
            raise UsageError(
                f"{len(ids)} tokens come with {len({id(cache) for cache in caches})} caches",
                hint="give each sequence a cache of its own",
            )
        if self._parts.native is None:
            raise UsageError("a float model decodes one sequence at a time", hint="use a .taper file")
        out = self._step(self._parts.native, ids, [(1, cache) for cache in caches], bits, "last")
        assert out is not None
        return out

    def forward_batch(
        self, tokens: I32 | Sequence[int], sequences: Sequence[tuple[int, AnyCache]], bits: Bits
    ) -> F32:
        """Run the next tokens of several sequences, of one or of many each, in one pass over the weights.

        Args:
            tokens: (tokens,) ids, those of the first sequence first.
            sequences: how many of them are whose; each another cache. All are unchanged when an error is
                raised.
            bits: as in `forward`.

        Returns:
            Float32 (sequences, vocab_size), from the last token of each.

        Raises:
            UsageError, DoesNotFitError, TaperError: as `decode_batch`.
        """
        ids = self._checked_tokens(tokens)
        self._checked_widths(bits, "last")
        counts = [count for count, _ in sequences]
        if min(counts, default=0) < 1 or sum(counts) != len(ids):
            raise UsageError(f"{len(ids)} tokens come for sequences of {counts}", hint="count each once")
        if len({id(cache) for _, cache in sequences}) != len(counts):
            raise UsageError("a cache comes twice", hint="give each sequence a cache of its own")
        if self._parts.native is None:
            raise UsageError("a float model runs one sequence at a time", hint="use a .taper file")
        out = self._step(self._parts.native, ids, sequences, bits, "last")
        assert out is not None
        return out

    def _step(
        self,
        native: NativeDecoder,
        ids: I32,
        sequences: Sequence[tuple[int, AnyCache]],
        bits: Bits,
        logits: Logits,
    ) -> F32 | None:
        """One native call for the next tokens of some sequences, whose caches then hold them."""
        given: list[tuple[int, int, npt.NDArray[Any] | PlanesBlocks, F32, F32]] = []
        for count, cache in sequences:
            cos, sin = self._rope.tables(cache.require(count), cache.capacity)
            given.append((count, cache.num_tokens, cache.native, cos, sin))
        out, finite = native.step(ids, given, self._native_widths(bits), logits, self.times)
        if not finite:
            raise _not_finite(given[0][1], bits)
        for count, cache in sequences:
            cache.advance(count)
        return out

    def bytes_per_pass(self, bits: Bits) -> int:
        """Bytes of weights that one decode step reads: layers and head at `bits`, one embedding row."""
        widths = self.widths(bits)
        matrices = sum(block.bytes_read(widths) for block in self._parts.blocks)
        head = self._parts.head.bytes_read(widths[self._parts.head_name])
        return matrices + head + self._parts.embedding.row_bytes()

    @property
    def has_sensitivity(self) -> bool:
        """Whether it can be read at a fraction of bits."""
        return self._parts.sensitivity is not None

    def widths(self, bits: Bits) -> Mapping[str, int]:
        """Matrix name to the planes that a reading takes of it.

        A fraction of bits is a budget in bits per weight (planes read over weights, embedding and head
        included), spent where the file's sensitivity says that it helps most (`taper.precision.allocation`).
        `LayerBits` reads each layer's matrices as the model at the layer's bits.

        Raises:
            UsageError: bits outside the weights, a fraction without sensitivity, or bits of another number of
                layers.
        """
        return self._readings.widths(bits)

    def bits_per_weight(self, bits: Bits) -> float:
        """Planes that a reading takes over weights, embedding and head included. Raises as `widths`."""
        return self._readings.bits_per_weight(bits)

    def reading_bytes(self, bits: Bits) -> int:
        """Bytes of a file that a reading needs: header, tokenizer, scales and other small tensors, its
        planes.

        For a whole number of bits that is the prefix of the file (`TaperFile.bytes_at`); a float model counts
        its matrices. Raises as `widths`.
        """
        widths = self.widths(bits)
        if not self._parts.unplaned_bytes:
            return sum(spec.num_weights for spec in self._matrices) * np.dtype(np.float32).itemsize
        return self._parts.unplaned_bytes + planes_bytes(self._matrices, widths)

    def _checked_tokens(self, tokens: I32 | Sequence[int]) -> I32:
        ids = np.asarray(tokens, dtype=np.int32)
        if ids.ndim != 1 or ids.size == 0:
            raise UsageError(
                f"tokens have shape {ids.shape}: a row of at least one is needed", hint="give a prompt"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise UsageError(
                f"token {low if low < 0 else high} is outside the vocabulary 0..{self.config.vocab_size - 1}",
                hint="encode the text with this model's own tokenizer",
            )
        return ids

    def _checked_widths(self, bits: Bits, logits: str) -> Mapping[str, int]:
        if logits not in get_args(Logits):
            raise UsageError(f"logits {logits!r} is none of {', '.join(get_args(Logits))}")
        return self.widths(bits)

    def _widths_of(self, bits: Bits) -> U8:
        """The reading's widths in the order of the native decoder."""
        widths = self.widths(bits)
        layers = (f"layers.{index}" for index in range(self.config.num_layers))
        names = [f"{layer}.{part}" for layer in layers for part in LAYER_MATRICES]
        return np.array([widths[name] for name in [*names, self._parts.head_name]], dtype=np.uint8)


def _not_finite(position: int, bits: Bits) -> TaperError:
    return TaperError(
        f"the result after position {position} at {bits} bits is not finite",
        hint="the weights are damaged or too large for float16 keys; try taper inspect --verify",
    )
