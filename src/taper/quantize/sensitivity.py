"""What each matrix costs at each width: KL divergence when it alone is read at fewer planes.

The reference is the file itself at its full reading (`full_reading`), or the float checkpoint; then what the
file loses at that reading is taken off. A change in one layer leaves the layers before it as they were, so
their results are kept and only what follows is run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.formats.container import TaperFile
from taper.formats.sensitivity import Sensitivity
from taper.formats.spec import MatrixSpec
from taper.kvcache import KvCache
from taper.layers.rope import Rope, context_length
from taper.models import Decoder
from taper.models.block import Step
from taper.models.parts import FLOAT_BITS, Parts, planed_parts
from taper.quantize.calibrate import CHARACTERS_PER_TOKEN
from taper.tokenizer import Tokenizer

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Rows = dict[str, dict[int, float]]

PASSAGE_TOKENS = 256
MAX_TOKENS = 1024
_MIN_TOKENS = 128
# Multiply-adds that the measurement may take, about a minute on two cores. The embedded model, three widths
# over 1024 tokens, takes a fifth of it; a model of 1.1 B weights, one width over 128 tokens, five times as
# much.
_MAX_WORK = 2e12
# The widest reading whose values and activations are single int8 parts: at 6 bits a product is two, at 7 and
# 8 four. Where only fewer bits are measured the last planes change the figures by 2 to 3 % and take 3.4 times
# the time (1.1 B shape, 2 bits, rest at 8 and at 5).
_SINGLE_PRODUCT_BITS = 5
# Logits of the reference that are held, in elements: 256 MiB of float32.
_MAX_LOGITS = 1 << 26


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        num_tokens: about how many tokens are read for each figure.
        bits: widths that are measured of every matrix; the others follow the relative errors.
    """

    num_tokens: int
    bits: tuple[int, ...]


def default_plan(file: TaperFile) -> Plan:
    """The two least widths and the largest one below all planes; of a large model fewer, over fewer tokens.

    The largest one shows what any change costs, however small (`_floor`).
    """
    # Half the layers, on average, follow the one that is changed.
    work_per_token = len(file.matrices) * file.num_weights / 2
    most = min(MAX_TOKENS, _MAX_LOGITS // file.config.vocab_size)
    low, high = file.min_bits, file.max_bits - 1
    for widths, least in (({low, low + 1, high}, 2 * _MIN_TOKENS), ({low, high}, _MIN_TOKENS), ({low}, 0)):
        bits = tuple(sorted(width for width in widths if low <= width <= high))
        num_tokens = min(most, int(_MAX_WORK / (work_per_token * max(1, len(bits)))))
        if num_tokens >= least:
            break
    return Plan(max(num_tokens, _MIN_TOKENS), bits)


def full_reading(file: TaperFile, bits: tuple[int, ...]) -> int:
    """Planes of every matrix but the one that is measured at `bits`: all, or 5 where fewer are measured."""
    return file.max_bits if max(bits) >= _SINGLE_PRODUCT_BITS else min(file.max_bits, _SINGLE_PRODUCT_BITS)


def passages(file: TaperFile, text: str, num_tokens: int) -> Int32:
    """Evenly spaced passages of a text as int32 (passages, tokens), about `num_tokens` in all.

    Raises:
        UsageError: a file without tokenizer, or a text shorter than one passage.
    """
    if file.tokenizer_json is None:
        raise UsageError(
            f"{file.path} holds no tokenizer, so text cannot be read", hint="quantise with its tokenizer.json"
        )
    tokenizer = Tokenizer(file.tokenizer_json)
    length = min(PASSAGE_TOKENS, num_tokens, context_length(file.config))
    count = max(1, num_tokens // length)
    found = []
    for start in np.linspace(0, len(text), count, endpoint=False).astype(int):
        ids = tokenizer.encode(text[start : start + length * CHARACTERS_PER_TOKEN])[:length]
        if len(ids) == length:
            found.append(ids)
    if not found:
        raise UsageError(f"the text is shorter than a passage of {length} tokens", hint="give a longer text")
    return np.array(found, dtype=np.int32)


def cut_passages(tokens: Int32, num_tokens: int) -> Int32:
    """Evenly spaced beginnings of calibration sequences, int32 (passages, tokens), about `num_tokens` in
    all.
    """
    length = min(PASSAGE_TOKENS, num_tokens, tokens.shape[1])
    count = min(len(tokens), max(1, num_tokens // length))
    return np.ascontiguousarray(
        tokens[np.linspace(0, len(tokens), count, endpoint=False).astype(int), :length]
    )


def measure_sensitivity(
    file: TaperFile,
    tokens: Int32,
    bits: tuple[int, ...],
    text: str,
    *,
    reference: tuple[Decoder, str] | None = None,
    found: Mapping[str, Mapping[int, float]] | None = None,
    on_matrix: Callable[[Rows], None] | None = None,
    progress: Callable[[str, float, float | None], None] | None = None,
) -> Sensitivity:
    """Measure every matrix at some widths and fill in the others.

    Args:
        file: whole.
        tokens: int32 (passages, tokens).
        bits: widths to measure of every matrix that holds more planes; at least the least width.
        text: name of the text.
        reference: float decoder and its name; None compares with the file at all its planes.
        found: figures of an earlier run over the same tokens.
        on_matrix: called with all figures so far after each matrix.
        progress: called as progress(matrix, done fraction, seconds left).
    """
    most = full_reading(file, bits)
    walk = _Walk(file, tokens, most, None if reference is None else reference[0])
    rows: Rows = {name: dict(row) for name, row in (found or {}).items()}
    missing = [spec for spec in file.matrices if spec.name not in rows]
    begin = time.perf_counter()
    for done, spec in enumerate(missing):
        if progress is not None:
            elapsed = time.perf_counter() - begin
            left_s = elapsed / done * (len(missing) - done) if done else None
            progress(spec.name, (len(file.matrices) - len(missing) + done) / len(file.matrices), left_s)
        rows[spec.name] = {
            width: walk.divergence(spec.name, width) for width in bits if width < spec.width_at(most)
        }
        if on_matrix is not None:
            on_matrix(rows)
    shapes = file.header.relative_errors or {spec.name: _gaussian_errors(file) for spec in file.matrices}
    kl = {spec.name: _filled(rows[spec.name], shapes[spec.name], spec, file) for spec in file.matrices}
    name = f"{most} bits" if reference is None else reference[1]
    return Sensitivity(kl, tuple(bits), name, text, int(tokens.size))


class _Walk:
    """The file's run over the passages at `most` planes, with the input of every layer kept."""

    def __init__(self, file: TaperFile, tokens: Int32, most: int, reference: Decoder | None) -> None:
        self._file = file
        self._most = most
        self._tokens = tokens
        config, length = file.config, tokens.shape[1]
        parts = planed_parts(file)
        cos, sin = Rope(config).tables(length, length)
        self._step = Step(0, cos, sin, most, None)
        # One layer's entries suffice: every passage begins at position 0, and a layer reads only its own.
        self._kv = KvCache(1, config.num_kv_heads, length, config.head_dim, parts.kv_dtype).layers[0]
        # inputs[passage][layer]; the last is the head's.
        self._inputs = [self._layer_inputs(parts, passage) for passage in tokens]
        own = [_log_softmax(parts.head(inputs[-1], self._width(parts.head_name))) for inputs in self._inputs]
        self._reference, self._base = own, 0.0
        if reference is not None:
            self._reference = [_float_scores(reference, passage) for passage in tokens]
            self._base = self._mean_divergence(own)

    def divergence(self, name: str, bits: int) -> float:
        """Mean KL divergence, in nats, that reading this matrix alone at `bits` adds; at least 0."""
        parts = planed_parts(self._file, {name: bits})
        scores = [self._scores(parts, name, bits, index) for index in range(len(self._tokens))]
        # Below the noise of the sums a difference may be negative.
        return max(0.0, self._mean_divergence(scores) - self._base)

    def _scores(self, parts: Parts, name: str, bits: int, index: int) -> Float32:
        first = _first_layer(name, len(parts.blocks))
        x = parts.embedding(self._tokens[index]) if name == "embed" else self._inputs[index][first]
        step = Step(0, self._step.cos, self._step.sin, self._most, None, self._widths(name, bits))
        for block in parts.blocks[first:]:
            x = block(x, self._kv, step)
        return _log_softmax(parts.head(x, step.width(parts.head_name)))

    def _layer_inputs(self, parts: Parts, passage: Int32) -> list[Float32]:
        step = Step(0, self._step.cos, self._step.sin, self._most, None, self._widths())
        inputs = [parts.embedding(passage)]
        for block in parts.blocks:
            inputs.append(block(inputs[-1], self._kv, step))
        return inputs

    def _width(self, name: str) -> int:
        return self._widths()[name]

    def _widths(self, name: str = "", bits: int = 0) -> dict[str, int]:
        """The full reading of every matrix but one."""
        return {
            spec.name: bits if spec.name == name else spec.width_at(self._most)
            for spec in self._file.matrices
        }

    def _mean_divergence(self, scores: list[Float32]) -> float:
        total = 0.0
        for theirs, ours in zip(self._reference, scores, strict=True):
            per_token = np.einsum("ij,ij->i", np.exp(theirs), theirs - ours)
            total += float(per_token.sum(dtype=np.float64))
        return total / self._tokens.size


def _first_layer(name: str, num_layers: int) -> int:
    """The first layer whose results change with this matrix."""
    if name == "head":
        return num_layers
    return 0 if name == "embed" else int(name.split(".")[1])


def _log_softmax(logits: Float32) -> Float32:
    """Natural logarithms, float32 (tokens, vocab)."""
    logits = logits - logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits


def _float_scores(decoder: Decoder, passage: Int32) -> Float32:
    logits = decoder.forward(passage, decoder.new_cache(len(passage)), FLOAT_BITS, logits="all")
    assert logits is not None
    return _log_softmax(logits)


def _filled(
    measured: Mapping[int, float], errors: list[float], spec: MatrixSpec, file: TaperFile
) -> list[float]:
    """Figures of all widths: 0 at all planes, below that the measured ones without the floor, and in between
    the nearest measured one scaled by the relative errors beyond those at all planes.

    KL divergence is quadratic in a small error of the output, so it follows the squared errors that the
    solver reports.
    """
    widths = range(file.min_bits, spec.width_at(file.max_bits) + 1)
    rest = {bits: max(0.0, errors[bits - widths[0]] - errors[widths[-1] - widths[0]]) for bits in widths}
    floor = _floor(measured, rest)
    row = []
    for bits in widths[:-1]:
        near = min(measured, key=lambda width: (abs(width - bits), width))
        scale = rest[bits] / rest[near] if rest[near] > 0 else 1.0
        row.append(max(0.0, measured[near] - floor) * scale)
    return [*row, 0.0]


def _floor(measured: Mapping[int, float], rest: Mapping[int, float]) -> float:
    """The divergence that remains however small the change: other roundings of the activations that follow.

    Where a matrix is measured at its least and largest widths, KL = c * error + floor has one solution. In
    the embedded model it is 0.0005 in the first layer and 0.0002 in the last, against 0.0005 to 0.2 at 2
    bits; it does not add up over matrices, since the activations are rounded in every reading, so it is taken
    off.
    """
    if not measured:
        return 0.0
    low, high = min(measured), max(measured)
    if rest[low] <= rest[high]:
        return 0.0
    slope = (measured[low] - measured[high]) / (rest[low] - rest[high])
    return max(0.0, measured[high] - max(0.0, slope) * rest[high])


def _gaussian_errors(file: TaperFile) -> list[float]:
    """Squared error of each width's values on the unit Gaussian, for a file without the solver's figures."""
    sample = np.random.default_rng(0).standard_normal(1 << 14).astype(np.float32)
    errors = []
    for bits in range(file.min_bits, file.max_bits + 1):
        values = np.sort(
            file.codebook.values[bits].astype(np.float32) * np.float32(file.codebook.level_scales[bits])
        )
        nearest = values[np.searchsorted((values[1:] + values[:-1]) / 2, sample)]
        errors.append(float(np.mean((sample - nearest) ** 2)))
    return errors
