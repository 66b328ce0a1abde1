"""What a pass costs at each width on this machine: time, energy, or bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from taper.errors import UsageError
from taper.kvcache import AnyCache
from taper.models import Decoder
from taper.tune.greedy import new_cache, run_prompt
from taper.tune.schedule import Schedule

OBJECTIVES = {"time": "ms", "bits": "bits", "energy": "mJ"}
# Widths take turns, so that a disturbance of the machine meets all of them, and the least round counts: what
# other work adds is no cost of a width. Beside ten busy processes, medians put 3 bits above 3.75.
_ROUNDS = 20
_STEPS = 8
# A package's energy counter is updated about every millisecond and counts the whole machine: rounds of 0.2 s.
_ENERGY_STEPS = 200
RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost of a prompt and of one decode pass, by width.

    Attributes:
        objective: time (ms), bits or energy (mJ).
        prefill: of the whole prompt; for bits, of the token that it draws.
        decode: of one decode pass in the middle of the answer.
    """

    objective: str
    prefill: dict[float, float]
    decode: dict[float, float]

    @property
    def unit(self) -> str:
        """Of all figures."""
        return OBJECTIVES[self.objective]

    def with_widths(self, other: Costs) -> Costs:
        """These costs and those of another measurement's widths."""
        return Costs(self.objective, other.prefill | self.prefill, other.decode | self.decode)

    def of(self, schedule: Schedule) -> float:
        """Mean cost of a token of the answer, the prompt's included."""
        passes = sum(count * self.decode[bits] for bits, count in schedule.runs)
        passes -= self.decode[schedule.runs[0][0]]  # token 0 costs no decode pass
        return (self.prefill[schedule.prefill_bits] + passes) / schedule.max_tokens


def measure_costs(
    decoder: Decoder, prompt: Sequence[int], max_tokens: int, widths: Iterable[float], objective: str
) -> Costs:
    """Measure, or for bits say, what each width costs for this prompt and the middle of its answer.

    Raises:
        UsageError: an unknown objective, or energy on a machine whose meter cannot be read.
    """
    widths = [*widths]
    if objective == "bits":
        return Costs(objective, {bits: bits for bits in widths}, {bits: bits for bits in widths})
    if objective not in OBJECTIVES:
        raise UsageError(f"objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    meter, steps = (_milliseconds, _STEPS) if objective == "time" else (_millijoules, _ENERGY_STEPS)
    meter()
    cache = new_cache(decoder, prompt, max_tokens)
    prefill: dict[float, list[float]] = {bits: [] for bits in widths}
    decode: dict[float, list[float]] = {bits: [] for bits in widths}
    for turn in range(_ROUNDS + 1):
        for bits in widths:
            prompt_cost = _metered(meter, partial(run_prompt, decoder, cache, prompt, bits))
            decoder.forward(np.zeros(max(1, max_tokens // 2), np.int32), cache, bits, logits="none")
            pass_cost = _metered(meter, partial(_decode, decoder, cache, bits, steps)) / steps
            if turn:  # the first round warms up
                prefill[bits].append(prompt_cost)
                decode[bits].append(pass_cost)
    return Costs(
        objective,
        {bits: min(found) for bits, found in prefill.items()},
        {bits: min(found) for bits, found in decode.items()},
    )


def _decode(decoder: Decoder, cache: AnyCache, bits: float, steps: int) -> None:
    place = cache.num_tokens
    for _ in range(steps):
        decoder.forward([0], cache, bits)
        cache.truncate(place)


def _metered(meter: Callable[[], float], run: Callable[[], object]) -> float:
    before = meter()
    run()
    return meter() - before


def _milliseconds() -> float:
    return time.perf_counter_ns() * 1e-6


def _millijoules() -> float:
    """The energy counter of the first package."""
    try:
        return int(RAPL.read_text(encoding="ascii")) * 1e-3
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the energy meter {RAPL} cannot be read ({error})",
            hint="choose --objective time, or run where RAPL is readable",
        ) from error
