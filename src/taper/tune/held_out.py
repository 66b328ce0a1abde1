"""Losses on held-out prompts with their bounds, and the engine's own time for each schedule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taper.engine import Engine, Request, SamplingParams
from taper.models import Decoder
from taper.precision import StepContext
from taper.tune.bounds import by_document, upper_bound
from taper.tune.costs import Costs
from taper.tune.losses import Loss
from taper.tune.prompts import PromptSet
from taper.tune.report import Row
from taper.tune.schedule import Schedule
from taper.tune.search import Bench

Float64 = NDArray[np.float64]


class HeldOutTest:
    """The schedules measured on the held-out prompts.

    Args:
        bench: over them.
        loss: what is limited.
        high: the schedule to compare with.
    """

    def __init__(self, bench: Bench, loss: Loss, high: Schedule) -> None:
        self._bench = bench
        self._loss = loss
        self._high = high
        self._values: dict[str, Float64] = {}

    def measure(self, schedules: Sequence[Schedule], what: str) -> None:
        """Measure schedules on every prompt; those that were measured are not run again."""
        prompts = self._bench.task.prompts
        every = [self._high, *schedules]
        for schedule, values in zip(every, self._bench.values(every, len(prompts), what), strict=True):
            self._values[schedule.key] = by_document(values, prompts.documents)

    def terms(self, schedule: Schedule) -> Float64:
        """What each document says about the loss of a measured schedule."""
        return self._loss.terms(self._values[schedule.key], self._values[self._high.key])

    def row(
        self,
        role: str,
        schedule: Schedule,
        costs: Costs,
        search_loss: float | None = None,
        beside: Schedule | None = None,
    ) -> Row:
        """The figures of a measured schedule; `beside` is what its loss is compared with, pair by pair."""
        terms, loss = self.terms(schedule), self._loss.loss
        mean, error = _mean(terms)
        beyond = beyond_error = None
        if beside is not None:
            other = self.terms(beside)
            beyond, beyond_error = loss(mean) - loss(float(other.mean())), _mean(terms - other)[1]
        cost = costs.of(schedule)
        return Row(
            role=role,
            bits=schedule.key,
            policy=schedule.policy,
            average_bits=schedule.average_bits,
            cost=cost,
            saved_frac=1.0 - cost / costs.of(self._high),
            loss=loss(mean),
            standard_error=loss(mean + error) - loss(mean),
            upper=loss(upper_bound(terms)),
            search_loss=search_loss,
            beyond_winner=beyond,
            beyond_winner_error=beyond_error,
        )


@dataclass(frozen=True, slots=True)
class Listed:
    """A schedule as a policy of the engine, whether or not it has a text."""

    schedule: Schedule

    @property
    def name(self) -> str:
        """The schedule's key."""
        return self.schedule.key

    def bits(self, step: StepContext) -> float:
        """Bits of the token that the pass draws."""
        if step.phase == "prefill":
            return self.schedule.prefill_bits
        return self.schedule.decode_bits[step.num_generated - 1]


def engine_times(decoder: Decoder, prompts: PromptSet, schedules: Sequence[Schedule]) -> dict[str, float]:
    """Schedule key to ms a token, prompt included, of full-length answers in the engine.

    Every prompt runs under every schedule before the next prompt comes, so that a disturbance meets all of
    them; the figure is the median over the prompts, the first of which warms up.
    """
    engine = Engine(decoder, None)
    found: dict[str, list[float]] = {schedule.key: [] for schedule in schedules}
    for prompt in prompts.prompts:
        for schedule in schedules:
            request = Request(
                prompt,
                Listed(schedule),
                SamplingParams(temperature=0.0),
                max_tokens=prompts.max_tokens,
                ignore_eos=True,
            )
            usage = engine.generate(request).usage
            total_s = usage.prefill_s + usage.decode_s
            found[schedule.key].append(1e3 * total_s / usage.num_completion_tokens)
    return {key: statistics.median(times[1:] or times) for key, times in found.items()}


def _mean(terms: Float64) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(terms.mean()), float(terms.std(ddof=1)) / math.sqrt(len(terms))
