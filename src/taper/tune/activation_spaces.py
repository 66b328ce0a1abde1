"""What a search for bits of activations and KV cache chooses from, and what a choice costs (docs/anda.md)."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taper.config import ModelConfig
from taper.formats.activations import TENSOR_TYPES, ActivationBits
from taper.formats.container import TaperFile
from taper.kvcache import MAX_KV_BITS, KvPlanes, fill_with_random_entries
from taper.layers.rope import context_length
from taper.models import Decoder
from taper.tune.anda_search import (
    MAX_EVALUATIONS,
    Combination,
    Evaluation,
    SearchResult,
    bops_saving,
    search_bits,
    search_combinations,
)

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
        texts: of one domain each; calibration and held-out windows are taken from all of them. Without any
            the model writes as many windows as one text has to hold.
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


def multiplications(config: ModelConfig) -> tuple[int, ...]:
    """Multiply-accumulates of a token and layer by tensor type: qkv, o, up and gate, down."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return (
        hidden * config.qkv_features,
        hidden * config.num_heads * config.head_dim,
        2 * hidden * inner,
        hidden * inner,
    )


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
