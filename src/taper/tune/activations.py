"""Bits of activations and KV cache, found on calibration text and tested on held-out text (docs/anda.md)."""

from __future__ import annotations

import datetime
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taper.config import ModelConfig
from taper.errors import UsageError
from taper.evaluate.divergence import log_likelihoods, log_normalisers
from taper.evaluate.protocols import cut
from taper.formats.activations import TENSOR_TYPES, ActivationBits
from taper.formats.container import TaperFile
from taper.formats.text import read_text
from taper.kvcache import MAX_KV_BITS, KvPlanes, fill_with_random_entries
from taper.layers.rope import context_length
from taper.models import Decoder
from taper.tokenizer import Tokenizer
from taper.tune.anda_search import (
    MAX_EVALUATIONS,
    Combination,
    Evaluation,
    SearchResult,
    bops_saving,
    search_bits,
    search_combinations,
)
from taper.tune.bounds import CONFIDENCE, upper_bound

Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]

# What stands for float activations: an error of 2^-14 of the largest in a row, below that of float16 keys.
REFERENCE_BITS = 14
# The widest that runs as one int8 product.
NARROW_BITS = 7
# The joint search counts a decode step with this much behind it, where KV bytes and attention matter.
_COST_CONTEXT = 2048
# Dearer combinations than the path's that are tested, where its first best may not hold on other text.
_NUM_SAFER = 3
_COST_ROUNDS = 25
# Layers that share bits in the joint search: the first ones and the rest.
_NUM_BANDS = 2


@dataclass(frozen=True, slots=True)
class ActivationOptions:
    """What a search is asked for.

    Attributes:
        texts: of one domain each; calibration and held-out windows are taken from all of them.
        max_loss: limit of perplexity over the reference's, minus 1.
        bits: width of the weights; None takes 4 or the nearest that the file holds.
        search: `paper` chooses four tensor types by BOPs; `joint` bands of layers and the KV cache by
            measured time and bytes.
        calibration_windows, held_out_windows: of 512 tokens, from each text; the second half is scored.
        max_evaluations: combinations that are tried.
    """

    texts: tuple[Path, ...]
    max_loss: float = 0.01
    bits: int | None = None
    search: str = "paper"
    calibration_windows: int = 16
    held_out_windows: int = 48
    max_evaluations: int = MAX_EVALUATIONS


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A combination on held-out windows: loss, and its one-sided 95 % upper bound by the bootstrap-t."""

    bits: Combination
    loss: float
    bound: float


@dataclass(frozen=True, slots=True)
class ActivationReport:
    """What a search found.

    Attributes:
        names: of the variables, in the order of combinations.
        result: the path.
        tested: some dearer combinations, then the bests of the path, on held-out text, the dearest first,
            until one is not surely within the limit.
        winner: the cheapest that is; None where not even the dearest is.
        chosen: the winner for the file's header.
        saving: of BOPs (`paper`) or of cost (`joint`) against the reference.
        bits: width of the weights.
    """

    names: tuple[str, ...]
    result: SearchResult
    tested: tuple[HeldOut, ...]
    winner: HeldOut | None
    chosen: ActivationBits | None
    saving: float | None
    bits: int
    num_tokens: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "variables": list(self.names),
            "weight_bits": self.bits,
            "evaluations": [
                {"bits": list(tried.bits), "cost": tried.cost, "loss": tried.loss, "is_best": tried.is_best}
                for tried in self.result.evaluations
            ],
            "is_finished": self.result.is_finished,
            "held_out": [{"bits": list(t.bits), "loss": t.loss, "bound": t.bound} for t in self.tested],
            "winner": None if self.winner is None else list(self.winner.bits),
            "saving": self.saving,
            "calibration_tokens": self.num_tokens[0],
            "held_out_tokens": self.num_tokens[1],
            "stored": None if self.chosen is None else self.chosen.to_dict(),
        }


def multiplications(config: ModelConfig) -> tuple[int, ...]:
    """Multiply-accumulates of a token and layer by tensor type: qkv, o, up and gate, down."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return (
        hidden * config.qkv_features,
        hidden * config.num_heads * config.head_dim,
        2 * hidden * inner,
        hidden * inner,
    )


def tune_activations(
    model: str | Path,
    options: ActivationOptions,
    trace: Callable[[Evaluation], None] = lambda evaluation: None,
    progress: Callable[[str, float], None] = lambda what, done: None,
) -> ActivationReport:
    """Search, then test on held-out text what the search held for good.

    Combinations with up to three bits more than the first best, then the bests of the path are tested from
    the dearest on at 95 %, and the first that fails ends the test: a fixed sequence, so that the whole of it
    errs in at most 5 % of cases.

    Args:
        model: a `.taper` file.
        options: see there.
        trace: called with each evaluation of the search.
        progress: called as progress(what, share done).

    Raises:
        UsageError: a model without tokenizer, an unknown search, texts that are too short, a width that the
            file does not hold.
        ModelNotFoundError, CorruptFileError: as opening the model does.
    """
    file = TaperFile.open(model)
    if file.tokenizer_json is None:
        raise UsageError(f"{model} holds no tokenizer, so text cannot be read", "add its tokenizer.json")
    if options.search not in SEARCHES:
        raise UsageError(f"search {options.search!r} is none of {', '.join(SEARCHES)}")
    bits = _weight_bits(file, options.bits)
    calibration, held_out = _windows(Tokenizer(file.tokenizer_json), file.config, options)
    space = SEARCHES[options.search](file, bits, options)
    progress("reference", 0.0)
    losses = _Losses(file, bits, calibration)

    def follow(evaluation: Evaluation) -> None:
        trace(evaluation)
        counts[0] += 1
        progress("search", counts[0] / options.max_evaluations)

    counts = [0]
    result = space.search(lambda combination: losses.loss(space.chosen(combination)), follow)
    tested, winner = _test(file, bits, held_out, space, result, options.max_loss, progress)
    scored = calibration.shape[1] - calibration.shape[1] // 2 - 1
    chosen = None
    if winner is not None:
        chosen = space.chosen(winner.bits, _evidence(options, bits, result, winner))
    return ActivationReport(
        space.names,
        result,
        tuple(tested),
        winner,
        chosen,
        None if winner is None else space.saving(winner.bits),
        bits,
        (len(calibration) * scored, len(held_out) * scored),
    )


@dataclass(slots=True)
class _Losses:
    """Losses of choices on some windows; the reference is read once."""

    file: TaperFile
    bits: int
    windows: Int32
    _reference: Float64 = field(init=False)

    def __post_init__(self) -> None:
        reference = ActivationBits(dict.fromkeys(TENSOR_TYPES, REFERENCE_BITS))
        self._reference = self._per_window(reference)

    def differences(self, choice: ActivationBits) -> Float64:
        """Of mean negative log-likelihood from the reference's, by window."""
        return self._per_window(choice) - self._reference

    def loss(self, choice: ActivationBits) -> float:
        """Perplexity over the reference's, minus 1."""
        return float(np.expm1(self.differences(choice).mean()))

    def _per_window(self, choice: ActivationBits) -> Float64:
        decoder = Decoder.from_taper(self.file, activations=choice)
        length = self.windows.shape[1]
        cache, first = decoder.new_cache(length), length // 2
        found = []
        for window in self.windows:
            cache.truncate(0)
            decoder.forward(window[:first], cache, self.bits, logits="none")
            logits = decoder.forward(window[first:-1], cache, self.bits, logits="all")
            assert logits is not None
            likelihoods = log_likelihoods(logits, log_normalisers(logits), window[first + 1 :])
            found.append(-float(np.mean(likelihoods, dtype=np.float64)))
        return np.array(found)


class PaperSpace:
    """Anda's: four tensor types, the same in all layers, by bit operations."""

    names = TENSOR_TYPES

    def __init__(self, file: TaperFile, bits: int, options: ActivationOptions) -> None:
        self._macs = multiplications(file.config)
        self._options = options
        self._kv = file.header.activations.kv

    def search(
        self, loss: Callable[[Combination], float], trace: Callable[[Evaluation], None]
    ) -> SearchResult:
        """The paper's search. Seeds reach from 4 to 13 bits."""
        limit, count = self._options.max_loss, self._options.max_evaluations
        return search_bits(self._macs, loss, limit, max_evaluations=count, progress=trace)

    def chosen(self, bits: Combination, evidence: dict[str, Any] | None = None) -> ActivationBits:
        """The combination for a file's header."""
        return ActivationBits(dict(zip(TENSOR_TYPES, bits, strict=True)), self._kv, evidence or {})

    def dearer(self, bits: Combination) -> list[Combination]:
        """Safer combinations than the path's first best, dearest first."""
        return [tuple(min(b + more, REFERENCE_BITS) for b in bits) for more in range(_NUM_SAFER, 0, -1)]

    def saving(self, bits: Combination) -> float:
        """How many times fewer bit operations than float16 activations."""
        return bops_saving(self._macs, bits)


class JointSpace:
    """Ours: each tensor type in two bands of layers, keys and values; by what a step costs here.

    Activations are 7 bits wide, one int8 product, or 14, two of them: fewer than 7 save nothing on a
    processor that multiplies bytes. Cost is the measured time of a decode step behind 2,048 tokens, and the
    bytes of its KV cache, each over that of the reference.
    """

    def __init__(self, file: TaperFile, bits: int, options: ActivationOptions) -> None:
        layers = file.config.num_layers
        self._bands = [range(0, layers // 2), range(layers // 2, layers)][-min(_NUM_BANDS, layers) :]
        self._num_layers, self._options = layers, options
        of_bands = [f"{name} {band.start}-{band.stop - 1}" for name in TENSOR_TYPES for band in self._bands]
        self.names = (*of_bands, "keys", "values")
        self._costs = _StepCosts(file, bits)

    def search(
        self, loss: Callable[[Combination], float], trace: Callable[[Evaluation], None]
    ) -> SearchResult:
        """Best first, from equal bits for keys and values on; lower keys, values or a band of activations."""
        kinds = len(self.names) - 2
        seeds = [(NARROW_BITS,) * kinds + (kv, kv) for kv in range(2, MAX_KV_BITS + 1)]
        seeds.append((REFERENCE_BITS,) * kinds + (MAX_KV_BITS,) * 2)
        return search_combinations(
            seeds,
            self._cost,
            self._cheaper,
            loss,
            self._options.max_loss,
            max_evaluations=self._options.max_evaluations,
            progress=trace,
        )

    def chosen(self, bits: Combination, evidence: dict[str, Any] | None = None) -> ActivationBits:
        """The combination for a file's header."""
        found: dict[str, int | list[int]] = {}
        for index, name in enumerate(TENSOR_TYPES):
            of_bands = bits[index * len(self._bands) :][: len(self._bands)]
            by_layer = [b for b, band in zip(of_bands, self._bands, strict=True) for _ in band]
            found[name] = by_layer[0] if len(set(by_layer)) == 1 else by_layer
        return ActivationBits(found, str(KvPlanes(*bits[-2:])), evidence or {})

    def dearer(self, bits: Combination) -> list[Combination]:
        """Safer combinations than the path's first best, dearest first: more bits for keys and values."""
        raised = [
            (*bits[:-2], *(min(b + more, MAX_KV_BITS) for b in bits[-2:]))
            for more in range(_NUM_SAFER, 0, -1)
        ]
        return [found for found in dict.fromkeys(raised) if found != bits]

    def saving(self, bits: Combination) -> float:
        """Cost of the reference over the combination's."""
        kinds = len(self.names) - 2
        return self._cost((REFERENCE_BITS,) * kinds + (MAX_KV_BITS,) * 2) / self._cost(bits)

    def _cost(self, bits: Combination) -> float:
        wide = sum(
            len(self._bands[place % len(self._bands)])
            * (b > NARROW_BITS)
            / self._num_layers
            / len(TENSOR_TYPES)
            for place, b in enumerate(bits[:-2])
        )
        return self._costs.cost(wide, bits[-2], bits[-1])

    def _cheaper(self, bits: Combination) -> list[Combination]:
        found = []
        for place, b in enumerate(bits):
            narrow = NARROW_BITS if b > NARROW_BITS else 0
            lower = b - 1 if place >= len(bits) - 2 else narrow
            if lower >= 1:
                found.append((*bits[:place], lower, *bits[place + 1 :]))
        return found


class _StepCosts:
    """Measured: decode steps with narrow and with wide activations, with keys and values of each width.

    Keys and values are timed apart, all choices in turn, and their times made to rise with the bits: the
    differences are a few percent of a step, and a search must not follow the machine's noise.
    """

    def __init__(self, file: TaperFile, bits: int) -> None:
        self._file = file
        self._context = min(_COST_CONTEXT, context_length(file.config) - 1)
        wide, narrow = (REFERENCE_BITS, MAX_KV_BITS, MAX_KV_BITS), (NARROW_BITS, MAX_KV_BITS, MAX_KV_BITS)
        keys = [(NARROW_BITS, b, MAX_KV_BITS) for b in range(1, MAX_KV_BITS)]
        values = [(NARROW_BITS, MAX_KV_BITS, b) for b in range(1, MAX_KV_BITS)]
        seconds = self._times([wide, narrow, *keys, *values], bits)
        self._narrow, self._wide = seconds[narrow], max(seconds[narrow], seconds[wide])
        self._keys = _rising([seconds[choice] for choice in (*keys, narrow)])
        self._values = _rising([seconds[choice] for choice in (*values, narrow)])
        self._reference_bytes = self._kv_bytes(MAX_KV_BITS, MAX_KV_BITS)

    def cost(self, wide: float, key_bits: int, value_bits: int) -> float:
        """Of a share of wide activations: time and KV bytes, each over the reference's."""
        saved = self._keys[-1] - self._keys[key_bits - 1] + self._values[-1] - self._values[value_bits - 1]
        seconds = self._narrow - saved + wide * (self._wide - self._narrow)
        return seconds / self._wide + self._kv_bytes(key_bits, value_bits) / self._reference_bytes

    def _times(self, choices: list[tuple[int, int, int]], bits: int) -> dict[tuple[int, int, int], float]:
        runs = []
        for magnitude_bits, key_bits, value_bits in choices:
            kv = str(KvPlanes(key_bits, value_bits))
            choice = ActivationBits(dict.fromkeys(TENSOR_TYPES, magnitude_bits), kv)
            decoder = Decoder.from_taper(self._file, activations=choice)
            cache = decoder.new_cache(self._context + 1)
            fill_with_random_entries(cache, decoder.config, self._context)
            runs.append((decoder, cache))
        spent: dict[tuple[int, int, int], list[float]] = {choice: [] for choice in choices}
        for round_ in range(_COST_ROUNDS + 1):
            for named, (decoder, cache) in zip(choices, runs, strict=True):
                begin = time.perf_counter()
                decoder.forward([0], cache, bits)
                if round_:
                    spent[named].append(time.perf_counter() - begin)
                cache.truncate(self._context)
        return {named: statistics.median(times) for named, times in spent.items()}

    def _kv_bytes(self, key_bits: int, value_bits: int) -> int:
        choice = ActivationBits({}, str(KvPlanes(key_bits, value_bits)))
        decoder = Decoder.from_taper(self._file, activations=choice)
        return decoder.new_cache(self._context).bytes_read(self._context)


def _rising(seconds: list[float]) -> list[float]:
    """No time above a later one, nor above the last."""
    found = [min(spent, seconds[-1]) for spent in seconds]
    return list(itertools.accumulate(found, max))


SEARCHES: dict[str, type[PaperSpace] | type[JointSpace]] = {"paper": PaperSpace, "joint": JointSpace}


def _test(
    file: TaperFile,
    bits: int,
    windows: Int32,
    space: PaperSpace | JointSpace,
    result: SearchResult,
    max_loss: float,
    progress: Callable[[str, float], None],
) -> tuple[list[HeldOut], HeldOut | None]:
    losses = _Losses(file, bits, windows)
    bests = [tried.bits for tried in result.evaluations if tried.is_best]
    candidates = [*space.dearer(bests[0]), *bests] if bests else []
    tested: list[HeldOut] = []
    winner = None
    for count, combination in enumerate(candidates, 1):
        differences = losses.differences(space.chosen(combination))
        bound = float(np.expm1(upper_bound(differences)))
        tested.append(HeldOut(combination, float(np.expm1(differences.mean())), bound))
        progress("held out", count / len(candidates))
        if bound > max_loss:
            break
        winner = tested[-1]
    return tested, winner


def _windows(tokenizer: Tokenizer, config: ModelConfig, options: ActivationOptions) -> tuple[Int32, Int32]:
    """Calibration from the beginning of each text, held out from its end."""
    if not options.texts:
        raise UsageError("no text to calibrate on", "give --text TEXT, several times for several domains")
    calibration, held_out = [], []
    for path in options.texts:
        tokens = cut(read_text(path), tokenizer, context_length(config), "llama.cpp").tokens
        wanted = options.calibration_windows + options.held_out_windows
        if len(tokens) < wanted:
            raise UsageError(
                f"{path} has {len(tokens)} windows of {tokens.shape[1]} tokens; {wanted} are needed",
                "give a longer text, or ask for fewer windows",
            )
        calibration.append(tokens[: options.calibration_windows])
        held_out.append(tokens[len(tokens) - options.held_out_windows :])
    return np.concatenate(calibration), np.concatenate(held_out)


def _weight_bits(file: TaperFile, bits: int | None) -> int:
    if bits is None:
        return min(max(4, file.min_bits), file.max_bits)
    if not file.min_bits <= bits <= file.max_bits:
        raise UsageError(f"{bits} bits are outside the file's {file.min_bits}..{file.max_bits}")
    return bits


def _evidence(options: ActivationOptions, bits: int, result: SearchResult, winner: HeldOut) -> dict[str, Any]:
    return {
        "search": options.search,
        "max_loss": options.max_loss,
        "weight_bits": bits,
        "texts": [path.name for path in options.texts],
        "evaluations": len(result.evaluations),
        "held_out_loss": winner.loss,
        "held_out_bound": winner.bound,
        "confidence": CONFIDENCE,
        "date": datetime.date.today().isoformat(),
    }
