"""Perplexity of one or more widths of a file, and of the float checkpoint, over the same blocks of a text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.evaluate.protocols import Blocks, cut
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.formats.text import read_text
from taper.kvcache import KvCache
from taper.models import Decoder
from taper.models.parts import FLOAT_BITS
from taper.tokenizer import Tokenizer

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]

# Logits held at a time, in elements: 64 MiB of float32, 512 tokens of a 32k vocabulary.
_MAX_LOGITS = 1 << 24


@dataclass(frozen=True, slots=True)
class WidthResult:
    """Figures of one width; natural logarithms inside, tokens weighed alike.

    Attributes:
        bits: the width; 32 is the float checkpoint.
        perplexity: exp of the mean negative log-likelihood of the scored tokens.
        standard_error: of the perplexity, from the spread between blocks; None with a single block.
        bits_per_byte: the same likelihood per byte of text, comparable between tokenizers.
        increase_frac: perplexity over the reference's, minus 1; None without a reference, as all below.
        increase_standard_error: of `increase_frac`, from block-by-block differences; None with a single
            block.
        top1_agreement: share of the scored positions whose likeliest token is the reference's.
        mean_kl: mean KL divergence from the reference's distribution, in nats.
    """

    bits: int
    perplexity: float
    standard_error: float | None
    bits_per_byte: float
    increase_frac: float | None = None
    increase_standard_error: float | None = None
    top1_agreement: float | None = None
    mean_kl: float | None = None


@dataclass(frozen=True, slots=True)
class PerplexityReport:
    """Results of all widths over one text.

    Attributes:
        label: the protocol with its true numbers.
        num_blocks: blocks of the text.
        num_scored: scored tokens.
        results: in the order asked for; the reference, where there is one, comes first.
    """

    label: str
    num_blocks: int
    num_scored: int
    results: tuple[WidthResult, ...]

    def width(self, bits: int) -> WidthResult:
        """The result of one width. Raises KeyError when it was not measured."""
        for result in self.results:
            if result.bits == bits:
                return result
        raise KeyError(bits)


def measure_perplexity(
    model: str | Path,
    text: str | Path,
    *,
    bits: Sequence[int] | None = None,
    protocol: str = "llama.cpp",
    against: str | Path | None = None,
    max_blocks: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> PerplexityReport:
    """Measure a `.taper` file at several widths, or a Hugging Face folder in float32.

    Args:
        model: the file or the folder.
        text: .txt or .txt.xz, read as one text.
        bits: widths of the file; None means all of them. A folder has one, 32.
        protocol: `llama.cpp` or `blocks`.
        against: the float checkpoint's folder: adds its own result, and KL and top-1 agreement with it.
        max_blocks: measure the first blocks only.
        progress: called as progress(blocks done, blocks in all, seconds left).

    Raises:
        UsageError: a width outside the file, a model without a tokenizer, or less text than one block.
        ModelNotFoundError, CorruptFileError: as opening the model does.
    """
    opened, tokenizer_json = _open(Path(model))
    if tokenizer_json is None:
        raise UsageError(f"{model} holds no tokenizer, so text cannot be read", hint="add its tokenizer.json")
    readers = [Reader(opened, width) for width in _widths(opened, bits)]
    if against is not None:
        reference = Decoder.from_hf(HfCheckpoint.open(against))
        _check_vocabularies(reference, opened)
        readers.insert(0, Reader(reference, FLOAT_BITS))
    context = min(reader.decoder.context_length for reader in readers)
    blocks = cut(read_text(text), Tokenizer(tokenizer_json), context, protocol, max_blocks)
    return measure_blocks(readers, blocks, against is not None, progress)


def measure_blocks(
    readers: Sequence[Reader],
    blocks: Blocks,
    has_reference: bool,
    progress: Callable[[int, int, float], None] | None = None,
) -> PerplexityReport:
    """Read every block with every reader; the first is the reference where `has_reference` says so.

    Args:
        readers: fresh ones, of models with one vocabulary.
        blocks: from `cut`.
        has_reference: compare all others with the first.
        progress: as in `measure_perplexity`.
    """
    begin = time.perf_counter()
    for done, block in enumerate(blocks.tokens, 1):
        _read_block(readers, block, blocks.first_scored, has_reference)
        if progress is not None:
            left = len(blocks.tokens) - done
            progress(done, len(blocks.tokens), (time.perf_counter() - begin) / done * left)
    reference = readers[0] if has_reference else None
    results = tuple(reader.result(blocks, reference) for reader in readers)
    return PerplexityReport(blocks.label, len(blocks.tokens), blocks.num_scored, results)


@dataclass(slots=True)
class Reader:
    """One decoder at one width with its running sums over the blocks read.

    Attributes:
        decoder: over planes or over float32.
        bits: the width to read.
        block_nll: negative log-likelihood of each block's scored tokens, summed.
        agreements: scored positions whose likeliest token is the reference's.
        divergence: sum of KL divergences from the reference over the scored positions, in nats.
    """

    decoder: Decoder
    bits: int
    block_nll: list[float] = field(default_factory=list)
    agreements: int = 0
    divergence: float = 0.0
    _cache: KvCache | None = None

    def start(self, block_tokens: int) -> None:
        """Begin a block with an empty cache."""
        if self._cache is None or self._cache.capacity != block_tokens:
            self._cache = self.decoder.new_cache(block_tokens)
        self._cache.truncate(0)
        self.block_nll.append(0.0)

    def log_probabilities(self, tokens: Int32) -> Float32:
        """Natural logarithms, float32 (tokens, vocab), for the token after each of `tokens`."""
        assert self._cache is not None
        logits = self.decoder.forward(tokens, self._cache, self.bits, logits="all")
        assert logits is not None
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
        return logits

    def skip(self, tokens: Int32) -> None:
        """Read tokens whose successors are not scored."""
        assert self._cache is not None
        self.decoder.forward(tokens, self._cache, self.bits, logits="none")

    def result(self, blocks: Blocks, reference: Reader | None) -> WidthResult:
        """The figures over all blocks read so far."""
        per_block = blocks.tokens.shape[1] - blocks.first_scored
        nll = np.array(self.block_nll) / per_block
        perplexity, error = math.exp(nll.mean()), _standard_error(nll)
        base = WidthResult(
            bits=self.bits,
            perplexity=perplexity,
            standard_error=None if error is None else perplexity * error,
            bits_per_byte=float(nll.mean()) / math.log(2.0) * blocks.tokens_per_byte,
        )
        if reference is None or reference is self:
            return base
        rise = nll - np.array(reference.block_nll) / per_block
        ratio, error = math.exp(rise.mean()), _standard_error(rise)
        return WidthResult(
            base.bits,
            base.perplexity,
            base.standard_error,
            base.bits_per_byte,
            increase_frac=ratio - 1.0,
            increase_standard_error=None if error is None else ratio * error,
            top1_agreement=self.agreements / blocks.num_scored,
            mean_kl=self.divergence / blocks.num_scored,
        )


def _read_block(readers: Sequence[Reader], block: Int32, first_scored: int, has_reference: bool) -> None:
    """Score the tokens from `first_scored` on; their logits come from the positions before them."""
    for reader in readers:
        reader.start(len(block))
        if first_scored > 1:
            reader.skip(block[: first_scored - 1])
    piece = max(1, _MAX_LOGITS // readers[0].decoder.config.vocab_size)
    for begin in range(first_scored - 1, len(block) - 1, piece):
        end = min(begin + piece, len(block) - 1)
        targets = block[begin + 1 : end + 1]
        rows = np.arange(len(targets))
        reference: _Reference | None = None
        for index, reader in enumerate(readers):
            scores = reader.log_probabilities(block[begin:end])
            reader.block_nll[-1] -= float(scores[rows, targets].sum(dtype=np.float64))
            if reference is not None:
                reference.compare(reader, scores)
            elif has_reference and index == 0:
                reference = _Reference(scores)


class _Reference:
    """The reference's distributions at some positions, from float32 (tokens, vocab) log-probabilities."""

    def __init__(self, scores: Float32) -> None:
        self._scores = scores
        self._probabilities = np.exp(scores)
        self._likeliest = scores.argmax(axis=1)

    def compare(self, reader: Reader, scores: Float32) -> None:
        """Add agreements and divergence to the reader's sums."""
        reader.agreements += int(np.count_nonzero(scores.argmax(axis=1) == self._likeliest))
        products = np.einsum("ij,ij->i", self._probabilities, self._scores - scores)
        reader.divergence += float(products.sum(dtype=np.float64))


def _standard_error(values: Float64) -> float | None:
    return None if len(values) < 2 else float(values.std(ddof=1)) / math.sqrt(len(values))


def _open(path: Path) -> tuple[Decoder, str | None]:
    if path.is_dir():
        checkpoint = HfCheckpoint.open(path)
        return Decoder.from_hf(checkpoint), checkpoint.tokenizer_json
    file = TaperFile.open(path)
    return Decoder.from_taper(file), file.tokenizer_json


def _widths(decoder: Decoder, bits: Sequence[int] | None) -> list[int]:
    low, high = decoder.min_bits, decoder.max_bits
    widths = list(range(low, high + 1)) if bits is None else list(bits)
    for width in widths:
        if not low <= width <= high:
            raise UsageError(
                f"{width} bits are outside the model's {low}..{high}", hint=f"choose within {low}..{high}"
            )
    if not widths:
        raise UsageError("no widths to measure", hint=f"choose within {low}..{high}")
    return widths


def _check_vocabularies(reference: Decoder, model: Decoder) -> None:
    if reference.config.vocab_size != model.config.vocab_size:
        raise UsageError(
            f"the reference has {reference.config.vocab_size} tokens, the model {model.config.vocab_size}",
            hint="compare with the checkpoint that the file was made from",
        )
