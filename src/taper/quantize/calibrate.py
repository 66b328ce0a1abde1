"""Second moments of every layer's inputs: the float model reads calibration text, one layer at a time.

Hidden states of all calibration tokens are kept, and the weights and moments of one layer only, so memory is
bounded by tokens x hidden plus one layer however deep the model is.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taper.errors import TaperError, UsageError
from taper.formats.huggingface import HfCheckpoint
from taper.kernels import rms_norm, rotate
from taper.kvcache import KvCache
from taper.layers.attention import Attention, CacheLayer
from taper.layers.linear import Before, FloatLinear, Norm, Swiglu
from taper.layers.rope import Rope, context_length
from taper.models import Decoder
from taper.models.block import Block, Step
from taper.models.families import matrix_sources, read_final_norm, read_matrix
from taper.models.parts import FLOAT_BITS, LAYER_MATRICES
from taper.tokenizer import Tokenizer

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]

SEQUENCE_TOKENS = 512
# English gives 3 to 5 characters a token; a window of 12 fills a sequence in any usual tokenizer.
CHARACTERS_PER_TOKEN = 12
# Sequences that a layer reads at once. A product with 512 rows takes 1.08 times as long a row as one with
# 2048, and beside the products of moments their sum in float64 and the mirrored half take, at 5632 columns,
# as long as 500 rows. 8 sequences' inputs of gate, up and down are 276 MB at the 1.1 B shape.
_BATCH_SEQUENCES = 8
# Rows and columns of moments that are worked on at once: all of 5632 by 5632 take 254 MB in float64.
_PART = 256
_GENERATION_STREAM = 1 << 20  # beyond the number of any matrix, whose signs take the streams below


def sample_tokens(checkpoint: HfCheckpoint, text: str, num_tokens: int) -> Int32:
    """Evenly spaced passages of a text as int32 (sequences, tokens), about `num_tokens` in all.

    Each passage begins as the tokenizer begins a text (with its beginning-of-text token where it has one). A
    short text gives fewer tokens.

    Raises:
        UsageError: the checkpoint has no tokenizer, or the text less than two tokens.
    """
    if checkpoint.tokenizer_json is None:
        raise UsageError(
            f"{checkpoint.folder} has no tokenizer.json, so text cannot be read",
            hint="add the model's tokenizer.json",
        )
    tokenizer = Tokenizer(checkpoint.tokenizer_json)
    length = min(SEQUENCE_TOKENS, context_length(checkpoint.config))
    passages = max(1, num_tokens // length)
    starts = np.linspace(0, len(text), passages, endpoint=False).astype(int)
    window = length * CHARACTERS_PER_TOKEN
    ids = [token for start in starts for token in tokenizer.encode(text[start : start + window])[:length]]
    if len(ids) < 2:
        raise UsageError(
            f"calibration text has {len(ids)} tokens; at least 2 are needed", hint="give a longer text"
        )
    length = min(length, len(ids))
    return np.array(ids[: len(ids) // length * length], dtype=np.int32).reshape(-1, length)


def generate_tokens(checkpoint: HfCheckpoint, num_tokens: int, seed: int) -> Int32:
    """Text of the float model's own at temperature 1: calibration without data (LLM-QAT, arXiv 2305.17888).

    Each sequence begins with the tokenizer's beginning-of-text token, where it has one, and a random token.
    Costs a decode step a token, so a small model takes a minute and a large one hours.

    Args:
        checkpoint: the float model.
        num_tokens: about how many.
        seed: of the draws.

    Returns:
        int32 (sequences, tokens).
    """
    decoder = Decoder.from_hf(checkpoint)
    generator = np.random.default_rng([seed, _GENERATION_STREAM])
    begin = [] if checkpoint.tokenizer_json is None else Tokenizer(checkpoint.tokenizer_json).encode("")
    length = min(SEQUENCE_TOKENS, decoder.context_length, max(num_tokens, len(begin) + 2))
    tokens = np.empty((max(1, num_tokens // length), length), dtype=np.int32)
    cache = decoder.new_cache(length)
    for sequence in tokens:
        cache.truncate(0)
        first = len(begin) + 1
        sequence[:first] = [*begin, int(generator.integers(checkpoint.config.vocab_size))]
        logits = decoder.forward(sequence[:first], cache, FLOAT_BITS)
        for position in range(first, length):
            assert logits is not None
            # Adding Gumbel noise and taking the largest draws from the softmax.
            sequence[position] = np.argmax(logits[0] + generator.gumbel(size=logits.shape[1]))
            logits = decoder.forward(sequence[position : position + 1], cache, FLOAT_BITS)
    return tokens


@dataclass(slots=True)
class Moments:
    """Running moments of one matrix's inputs: the sums are float64, the products of one `add` float32.

    Attributes:
        total: sum of x x^T, (in_features, in_features).
        first: sum of x, (in_features).
    """

    total: Float64
    first: Float64
    num_tokens: int = 0

    @classmethod
    def empty(cls, in_features: int) -> Moments:
        """Of no token yet."""
        return cls(np.zeros((in_features, in_features)), np.zeros(in_features))

    def add(self, x: Float32) -> None:
        """Count rows of float32 (tokens, in_features)."""
        self.total += x.T @ x
        self.first += x.sum(axis=0, dtype=np.float64)
        self.num_tokens += len(x)

    def check(self, name: str) -> None:
        """Raise TaperError where an input was not finite: such moments weigh no column."""
        if not np.isfinite(np.trace(self.total)):
            raise TaperError(
                f"{name}: the float model's inputs are not finite on the calibration text",
                hint="the checkpoint is damaged or is no trained model",
            )

    def variances(self) -> Float64:
        """Variance of each input, (in_features)."""
        spread: Float64 = np.diag(self.total) / self.num_tokens - (self.first / self.num_tokens) ** 2
        return np.maximum(spread, 0.0)

    def rotated(
        self, signs: Float32, block: int, gain: Float32 | None = None, centred: bool = False
    ) -> tuple[Float64, Float32]:
        """Second moments and mean of R (gain x).

        Args:
            signs: float32 (in_features) of the rotation R.
            block: of the rotation.
            gain: float32 (in_features), or None.
            centred: take the moments about the mean; else the mean is given as zero.

        Returns:
            float64 (in_features, in_features) and float32 (in_features).
        """
        mean = self.first / self.num_tokens if centred else np.zeros(len(self.first))
        second = np.empty(self.total.shape, dtype=np.float32)
        for rows in _parts(len(mean)):
            part = self.total[rows] / self.num_tokens
            part -= np.outer(mean[rows], mean)
            if gain is not None:
                part *= np.outer(gain[rows], gain)
            second[rows] = part
        if gain is not None:
            mean = mean * gain
        half = rotate(second, signs, block)
        full = rotate(np.ascontiguousarray(half.T), signs, block)
        return _symmetric(full), rotate(mean.astype(np.float32)[None], signs, block)[0]


def _symmetric(square: Float32) -> Float64:
    """The mean of a square matrix and its transpose; by parts, as whole columns would miss the cache."""
    mean = np.empty(square.shape)

    def add(rows: slice) -> None:
        for columns in _parts(len(square)):
            part = mean[rows, columns]
            np.add(square[rows, columns], square[columns, rows].T, out=part, dtype=np.float64)
            part *= 0.5

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(add, _parts(len(square))))
    return mean


def _parts(size: int) -> list[slice]:
    return [slice(begin, begin + _PART) for begin in range(0, size, _PART)]


class LayerReader:
    """Reads matrices in float32, those of a layer once: calibration, balance and solver want them in turn.

    Args:
        checkpoint: the float model.
    """

    def __init__(self, checkpoint: HfCheckpoint) -> None:
        self.sources = {source.name: source for source in matrix_sources(checkpoint.config)}
        self._checkpoint = checkpoint
        self._layer = ""
        self._kept: dict[str, tuple[Float32, Float32 | None]] = {}

    def __call__(self, name: str) -> tuple[Float32, Float32 | None]:
        """A matrix and its bias, as `read_matrix`; not to be changed. The layer before is forgotten."""
        layer = name.rpartition(".")[0]
        if layer != self._layer:
            self._kept.clear()
            self._layer = layer
        if name in self._kept:
            return self._kept[name]
        found = read_matrix(self._checkpoint, self.sources[name])
        if layer:  # embedding and head are of no layer, large, and wanted once or twice
            self._kept[name] = found
        return found


class CalibrationRun:
    """The float model's walk over the calibration tokens, one layer a step.

    Args:
        checkpoint: the float model.
        tokens: int32 (sequences, tokens).
        read: of the same checkpoint, where others read its layers, too.
    """

    def __init__(self, checkpoint: HfCheckpoint, tokens: Int32, read: LayerReader | None = None) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._read = read or LayerReader(checkpoint)
        self._rope = Rope(self._config)
        self._tokens = tokens
        self._hidden: Float32 | None = None
        self._next = 0

    def layer(self, index: int, observe: bool = True) -> dict[str, Moments]:
        """Run layer `index`, the one after the last run. Moments by matrix name; none where not observed.

        Raises:
            TaperError: inputs that are not finite.
        """
        if index != self._next:
            raise ValueError(f"layer {index} asked for, layer {self._next} is next")
        hidden = self._hidden_states()
        length = hidden.shape[1]
        cos, sin = self._rope.tables(length, length)
        attention = _EachSequence(self._config.num_heads, self._config.head_dim, length)
        block, moments = self._block(index, attention), {}
        for name in (f"layers.{index}.{part}" for part in LAYER_MATRICES):
            if observe:
                moments[name] = Moments.empty(self._read.sources[name].in_features)
        step = Step(0, cos, sin, FLOAT_BITS, (lambda name, x: moments[name].add(x)) if observe else None)
        cache = KvCache(1, self._config.num_kv_heads, length, self._config.head_dim, np.float32)
        for begin in range(0, len(hidden), _BATCH_SEQUENCES):
            sequences = hidden[begin : begin + _BATCH_SEQUENCES]
            rows = sequences.reshape(-1, self._config.hidden_size)
            sequences[:] = block(rows, cache.layers[0], step).reshape(sequences.shape)
        for name, found in moments.items():
            found.check(name)
        self._next += 1
        return moments

    def head(self) -> Moments:
        """Moments of the head's input, after the last layer. Raises TaperError where it is not finite."""
        if self._next != self._config.num_layers:
            raise ValueError(f"layer {self._next} has not run")
        gain = read_final_norm(self._checkpoint)
        moments = Moments.empty(self._config.hidden_size)
        for sequence in self._hidden_states():
            moments.add(rms_norm(sequence, gain, self._config.rms_norm_eps))
        moments.check("head")
        return moments

    def _hidden_states(self) -> Float32:
        if self._hidden is None:
            embed, _ = self._read("embed")
            self._hidden = embed[self._tokens]
        return self._hidden

    def _block(self, index: int, attention: Attention) -> Block:
        norm = Norm(self._config.rms_norm_eps)
        name = f"layers.{index}"

        def linear(part: str, before: Before) -> FloatLinear:
            return FloatLinear(*self._read(f"{name}.{part}"), before)

        return Block(
            name=name,
            qkv=linear("qkv", norm),
            o=linear("o", None),
            gate_up=linear("gate_up", norm),
            down=linear("down", Swiglu()),
            attention=attention,
        )


class _EachSequence(Attention):
    """Attention of sequences in a row, each from position 0 on; they use one cache in turn.

    Args:
        num_heads, head_dim: as `Attention`.
        length: tokens of a sequence.
    """

    def __init__(self, num_heads: int, head_dim: int, length: int) -> None:
        super().__init__(num_heads, head_dim)
        self._length = length
        self._tables: tuple[Float32, Float32] | None = None

    def store(self, qkv: Float32, kv: CacheLayer, position: int, cos: Float32, sin: Float32) -> None:
        """Keep the tables: the next sequence's entries would overwrite these before they are read."""
        self._tables = cos, sin

    def __call__(self, qkv: Float32, kv: CacheLayer, position: int) -> Float32:
        """As `Attention`, of one sequence after the other."""
        assert self._tables is not None
        mixed = []
        for begin in range(0, len(qkv), self._length):
            rows = qkv[begin : begin + self._length]
            super().store(rows, kv, position, *self._tables)
            mixed.append(super().__call__(rows, kv, position))
        return np.concatenate(mixed)
