"""Perplexity of one or more widths of a file, and of the float checkpoint, over the same blocks of a text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.evaluate.divergence import agreements, kl_divergences, log_likelihoods, log_normalisers
from taper.evaluate.protocols import Blocks, cut
from taper.evaluate.statistics import mean_of_blocks, quantiles_of_blocks
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.formats.text import read_text
from taper.kvcache import AnyCache
from taper.models import Decoder
from taper.models.parts import FLOAT_BITS
from taper.tokenizer import Tokenizer

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]

# Logits held at a time, in elements: 64 MiB of float32, 512 tokens of a 32k vocabulary.
_MAX_LOGITS = 1 << 24


@dataclass(frozen=True, slots=True)
class WidthResult:
    """Figures of one width; natural logarithms inside, tokens weighed alike.

    Standard errors come from the spread between blocks and are None with a single block. Everything after
    `bits_per_byte` compares with a reference and is None without one.

    Attributes:
        bits: the width; a fraction is a budget in bits per weight; 32 is the float checkpoint.
        perplexity: exp of the mean negative log-likelihood of the scored tokens.
        standard_error: of the perplexity.
        bits_per_byte: the same likelihood per byte of text, comparable between tokenizers.
        increase_frac: perplexity over the reference's, minus 1.
        increase_standard_error: of `increase_frac`, from block-by-block differences.
        top1_agreement: share of the scored positions whose likeliest token is the reference's.
        mean_kl, median_kl, p999_kl: of the KL divergences from the reference's distributions, in nats: mean,
            median and 99.9th percentile over the scored positions.
        top1_standard_error, mean_kl_standard_error: from block means.
        median_kl_standard_error, p999_kl_standard_error: from a bootstrap over blocks with a fixed seed.
    """

    bits: float
    perplexity: float
    standard_error: float | None
    bits_per_byte: float
    increase_frac: float | None = None
    increase_standard_error: float | None = None
    top1_agreement: float | None = None
    mean_kl: float | None = None
    top1_standard_error: float | None = None
    mean_kl_standard_error: float | None = None
    median_kl: float | None = None
    median_kl_standard_error: float | None = None
    p999_kl: float | None = None
    p999_kl_standard_error: float | None = None


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

    def width(self, bits: float) -> WidthResult:
        """The result of one width. Raises KeyError when it was not measured."""
        for result in self.results:
            if result.bits == bits:
                return result
        raise KeyError(bits)


def measure_perplexity(
    model: str | Path,
    text: str | Path,
    *,
    bits: Sequence[float] | None = None,
    protocol: str = "llama.cpp",
    against: str | Path | None = None,
    max_blocks: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    kv: str | None = None,
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
        kv: as `open_model` takes it.

    Raises:
        UsageError: a width outside the file, a model without a tokenizer, or less text than one block.
        ModelNotFoundError, CorruptFileError: as opening the model does.
    """
    opened, tokenizer = open_model(model, kv)
    readers = [Reader(opened, width) for width in checked_widths(opened, bits)]
    if against is not None:
        reference = Decoder.from_hf(HfCheckpoint.open(against))
        check_vocabularies(reference, opened)
        readers.insert(0, Reader(reference, FLOAT_BITS))
    context = min(reader.decoder.context_length for reader in readers)
    blocks = cut(read_text(text), tokenizer, context, protocol, max_blocks)
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
    """One decoder at one width with what it found in the blocks read.

    Attributes:
        decoder: over planes or over float32.
        bits: the width to read.
        block_nll: negative log-likelihood of each block's scored tokens, summed.
        divergences: float32 KL divergences from the reference at the scored positions, in pieces.
        agreements: whether the likeliest token there is the reference's, in the same pieces.
    """

    decoder: Decoder
    bits: float
    block_nll: list[float] = field(default_factory=list)
    divergences: list[Float32] = field(default_factory=list)
    agreements: list[Bool] = field(default_factory=list)
    _cache: AnyCache | None = None

    def start(self, block_tokens: int) -> None:
        """Begin a block with an empty cache."""
        if self._cache is None or self._cache.capacity != block_tokens:
            self._cache = self.decoder.new_cache(block_tokens)
        self._cache.truncate(0)
        self.block_nll.append(0.0)

    def logits(self, tokens: Int32) -> Float32:
        """Float32 (tokens, vocab) for the token after each of `tokens`."""
        assert self._cache is not None
        logits = self.decoder.forward(tokens, self._cache, self.bits, logits="all")
        assert logits is not None
        return logits

    def skip(self, tokens: Int32) -> None:
        """Read tokens whose successors are not scored."""
        assert self._cache is not None
        self.decoder.forward(tokens, self._cache, self.bits, logits="none")

    def result(self, blocks: Blocks, reference: Reader | None) -> WidthResult:
        """The figures over all blocks read so far."""
        per_block = blocks.tokens.shape[1] - blocks.first_scored
        nll = np.array(self.block_nll) / per_block
        perplexity, error = _exponential(nll)
        base = WidthResult(
            self.bits, perplexity, error, float(nll.mean()) / math.log(2.0) * blocks.tokens_per_byte
        )
        if reference is None or reference is self:
            return base
        ratio, error = _exponential(nll - np.array(reference.block_nll) / per_block)
        top1 = mean_of_blocks(np.concatenate(self.agreements).reshape(len(nll), per_block))
        divergences = np.concatenate(self.divergences).reshape(len(nll), per_block)
        mean = mean_of_blocks(divergences)
        median, p999 = quantiles_of_blocks(divergences, (0.5, 0.999))
        return replace(
            base,
            increase_frac=ratio - 1.0,
            increase_standard_error=error,
            top1_agreement=top1.value,
            top1_standard_error=top1.standard_error,
            mean_kl=mean.value,
            mean_kl_standard_error=mean.standard_error,
            median_kl=median.value,
            median_kl_standard_error=median.standard_error,
            p999_kl=p999.value,
            p999_kl_standard_error=p999.standard_error,
        )


@dataclass(slots=True)
class StoredReader(Reader):
    """A reader whose logits were computed before; of its decoder only the vocabulary counts.

    Attributes:
        stored: float32 (blocks, scored, vocab), in the order of the blocks.
    """

    stored: Float32 = field(kw_only=True)
    _row: int = 0

    def start(self, block_tokens: int) -> None:
        """Begin the next block."""
        self.block_nll.append(0.0)
        self._row = 0

    def logits(self, tokens: Int32) -> Float32:
        """The next rows of the block."""
        block: Float32 = self.stored[len(self.block_nll) - 1]
        self._row += len(tokens)
        return block[self._row - len(tokens) : self._row]

    def skip(self, tokens: Int32) -> None:
        """Nothing is stored of what is not scored."""


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
        reference: tuple[Float32, Float64] | None = None
        for index, reader in enumerate(readers):
            logits = reader.logits(block[begin:end])
            norms = log_normalisers(logits)
            reader.block_nll[-1] -= float(log_likelihoods(logits, norms, targets).sum())
            if reference is not None:
                reader.divergences.append(kl_divergences(*reference, logits, norms).astype(np.float32))
                reader.agreements.append(agreements(reference[0], logits))
            elif has_reference and index == 0:
                reference = logits, norms


def _exponential(logarithms: Float64) -> tuple[float, float | None]:
    """exp of the mean, and its standard error to first order."""
    mean = mean_of_blocks(logarithms)
    value = math.exp(mean.value)
    return value, None if mean.standard_error is None else value * mean.standard_error


def open_model(model: str | Path, kv: str | None = None) -> tuple[Decoder, Tokenizer]:
    """The decoder and tokenizer of a `.taper` file or a Hugging Face folder (run in float32).

    Args:
        model: the file or the folder.
        kv: of a file, the format of the KV cache as `Decoder.from_taper` takes it.

    Raises:
        UsageError: a model without a tokenizer, a KV format for a folder.
        ModelNotFoundError, CorruptFileError: as opening the model does.
    """
    path = Path(model)
    source = HfCheckpoint.open(path) if path.is_dir() else TaperFile.open(path)
    if source.tokenizer_json is None:
        raise UsageError(f"{model} holds no tokenizer, so text cannot be read", hint="add its tokenizer.json")
    if isinstance(source, TaperFile):
        return Decoder.from_taper(source, kv=kv), Tokenizer(source.tokenizer_json)
    if kv is not None:
        raise UsageError(f"{path} is a folder: its KV cache is float32", "--kv needs a .taper file")
    decoder = Decoder.from_hf(source)
    return decoder, Tokenizer(source.tokenizer_json)


def checked_widths(decoder: Decoder, bits: Sequence[float] | None) -> list[float]:
    """The widths to measure; None means all whole ones. Raises UsageError for one that cannot be read."""
    low, high = decoder.min_bits, decoder.max_bits
    widths: list[float] = [*range(low, high + 1)] if bits is None else [*bits]
    for width in widths:
        decoder.widths(width)
    if not widths:
        raise UsageError("no widths to measure", hint=f"choose within {low}..{high}")
    return widths


def check_vocabularies(reference: Decoder, model: Decoder) -> None:
    """Raise UsageError unless both have the same number of tokens."""
    if reference.config.vocab_size != model.config.vocab_size:
        raise UsageError(
            f"the reference has {reference.config.vocab_size} tokens, the model {model.config.vocab_size}",
            hint="compare with the checkpoint that the file was made from",
        )
