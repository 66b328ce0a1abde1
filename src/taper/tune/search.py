"""Finds schedules on search prompts: a tree of shared beginnings, in each round with fewer schedules on more
prompts.

What is exact: the value of a schedule on a prompt (shared prefixes change no byte), and the set of schedules
where no more than `MAX_TREE` are possible. What is a heuristic, and only costs efficiency, never the bound
on held-out prompts: the first-order preselection of a larger set, and dropping schedules by their mean over
some prompts (successive halving, Jamieson and Talwalkar, arXiv 1502.07943).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from taper.tune.bounds import by_document
from taper.tune.costs import Costs
from taper.tune.losses import Loss
from taper.tune.schedule import Schedule, uniform
from taper.tune.store import ValueStore
from taper.tune.walks import ScoredWalk, Task

Float64 = NDArray[np.float64]
Report = Callable[[str, float, float | None], None]

# Schedules whose tree is walked on the first prompts; 5 widths and 8 segments make 715.
MAX_TREE = 1024
# A round has four times the prompts of the one before and a quarter of its schedules.
_ETA = 4
_FIRST_PROMPTS = 8
_LEAST_KEPT = 48
# Kept while it is this many times the limit by the first-order prediction or by the mean so far: beyond it a
# schedule is hopeless, below it the mean of a few prompts may be wrong.
_HOPELESS = 2.0
# A schedule is tested on held-out prompts for each of these shares of the limit. Those beyond 1 cost nothing
# where the test stops before them, and the search prompts may be harder than the others: KL said 0.79 % where
# the likelihood of held-out prose fell by 0.43 %.
_RUNGS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0)


@dataclass(slots=True)
class Bench:
    """Measures schedules on prompts, and keeps every value.

    Attributes:
        task: with its prompts.
        walk: makes the walk over a prompt.
        store: where values are kept.
        stage: the name that they are kept under.
        report: called as report(what, done fraction, seconds left).
    """

    task: Task
    walk: Callable[[Task, int], ScoredWalk]
    store: ValueStore
    stage: str
    report: Report = field(default=lambda what, done_frac, left_s: None)

    def values(self, schedules: Sequence[Schedule], num_prompts: int, what: str) -> Float64:
        """Float64 (schedules, prompts): of the first `num_prompts` prompts; what is stored is not run."""
        rows = []
        begin, run = time.perf_counter(), 0
        for index in range(num_prompts):
            known = self.store.values(self.stage, index)
            missing = [schedule for schedule in schedules if schedule.key not in known]
            if missing:
                known |= walk_tree(self.walk(self.task, index), missing)
                self.store.save(self.stage, index, known)
                run += 1
            rows.append([known[schedule.key] for schedule in schedules])
            left_s = (time.perf_counter() - begin) / run * (num_prompts - index - 1) if run else None
            self.report(what, (index + 1) / num_prompts, left_s)
        return np.array(rows).T


@dataclass(frozen=True, slots=True)
class Found:
    """A schedule with its cost and its loss on the search prompts."""

    schedule: Schedule
    cost: float
    loss: float


def walk_tree(walk: ScoredWalk, schedules: Sequence[Schedule]) -> dict[str, float]:
    """Key to value of every schedule, depth first: what schedules share is run once."""
    values: dict[str, float] = {}
    ordered = sorted(schedules, key=lambda schedule: (schedule.prefill_bits, schedule.runs))
    for prefill_bits, group in itertools.groupby(ordered, key=lambda schedule: schedule.prefill_bits):
        walk.prefill(prefill_bits)
        _branch(walk, [*group], 0, values)
    return values


def _branch(walk: ScoredWalk, schedules: Sequence[Schedule], depth: int, values: dict[str, float]) -> None:
    """Go on with schedules, in order, that are alike in the first `depth` runs, which the walk has done."""
    here = walk.num_tokens
    unfinished = [schedule for schedule in schedules if len(schedule.runs) > depth]
    for schedule in schedules:
        if len(schedule.runs) == depth:
            values[schedule.key] = walk.value()
    for (bits, count), group in itertools.groupby(unfinished, key=lambda schedule: schedule.runs[depth]):
        walk.extend(bits, count)
        _branch(walk, [*group], depth + 1, values)
        walk.back_to(here)


class Search:
    """Narrows schedules down to a ladder from the safest to the cheapest that may hold the limit.

    Args:
        bench: over the search prompts.
        loss: what is limited.
        costs: of all widths.
        max_loss: the limit, as a share.
        high_bits: the uniform width to compare with.
    """

    def __init__(self, bench: Bench, loss: Loss, costs: Costs, max_loss: float, high_bits: float) -> None:
        self._bench = bench
        self._loss = loss
        self._costs = costs
        self._max_loss = max_loss
        self._high = uniform(high_bits, bench.task.prompts.max_tokens)
        self._documents = bench.task.prompts.documents

    def losses(self, schedules: Sequence[Schedule], num_prompts: int, what: str) -> Float64:
        """Loss of each schedule over the first prompts, float64 (schedules,)."""
        values = self._bench.values([self._high, *schedules], num_prompts, what)
        means = [by_document(row, self._documents[:num_prompts]) for row in values]
        terms = [self._loss.search_terms(row, means[0]) for row in means[1:]]
        return np.array([self._loss.loss(float(row.mean())) for row in terms])

    def ladder(self, schedules: Sequence[Schedule]) -> tuple[Found, ...]:
        """Schedules for the test, from the safest to the cheapest; none where only uniform high holds the
        limit.
        """
        costs = self._costs_of(schedules)
        total = len(self._bench.task.prompts)
        if len(schedules) > MAX_TREE:
            kept = self._preselect(schedules, costs, min(_FIRST_PROMPTS, total))
            schedules, costs = [schedules[i] for i in kept], costs[kept]
        num_prompts = min(_FIRST_PROMPTS, total)
        while True:
            what = f"{len(schedules):,} schedules on {num_prompts} prompts"
            losses = self.losses(schedules, num_prompts, what)
            if num_prompts == total:
                return self._rungs(schedules, costs, losses)
            kept = self._best(costs, losses, max(_LEAST_KEPT, len(schedules) // _ETA))
            schedules, costs = [schedules[i] for i in kept], costs[kept]
            num_prompts = min(_ETA * num_prompts, total)

    def _costs_of(self, schedules: Sequence[Schedule]) -> Float64:
        return np.array([self._costs.of(schedule) for schedule in schedules])

    def _preselect(self, schedules: Sequence[Schedule], costs: Float64, num_prompts: int) -> list[int]:
        """The most promising by a first-order prediction: the loss of a schedule is the sum of what each of
        its places costs alone, every other at the high width, as for the matrices in
        `taper.precision.allocation`.
        """
        places = [(schedule.prefill_bits, *(bits for bits, _ in schedule.runs)) for schedule in schedules]
        widths = np.array(places)
        lengths = [count for _, count in schedules[0].runs]
        high = self._high.prefill_bits
        lower = sorted({*widths.ravel().tolist()} - {high})
        probes = [_probe(high, place, bits, lengths) for place in range(widths.shape[1]) for bits in lower]
        losses = self.losses(probes, num_prompts, f"{len(probes)} probes on {num_prompts} prompts")
        predicted = np.zeros(len(schedules))
        for index, loss in enumerate(losses):
            place, bits = divmod(index, len(lower))
            predicted[widths[:, place] == lower[bits]] += loss
        return self._best(costs, predicted, MAX_TREE)

    def _best(self, costs: Float64, losses: Float64, count: int) -> list[int]:
        """Places of the `count` nearest to the front of cost and loss, of those that are not hopeless."""
        excess = losses - front(costs, losses)
        order = [int(i) for i in np.argsort(excess, kind="stable")]
        hopeful = [i for i in order if losses[i] <= _HOPELESS * self._max_loss]
        return sorted((hopeful or order)[:count])

    def _rungs(self, schedules: Sequence[Schedule], costs: Float64, losses: Float64) -> tuple[Found, ...]:
        """For each share of the limit the cheapest schedule within it; of equal cost the one that loses
        less.
        """
        order = np.lexsort((losses, costs))
        rungs: dict[str, Found] = {}
        for share in _RUNGS:
            within = (int(i) for i in order if losses[i] <= share * self._max_loss)
            if (i := next(within, None)) is not None and schedules[i].key != self._high.key:
                rungs[schedules[i].key] = Found(schedules[i], float(costs[i]), float(losses[i]))
        return tuple(rungs.values())


def front(costs: Float64, losses: Float64) -> Float64:
    """The least loss among all that cost as much or less, of each; float64 (schedules,)."""
    order = np.lexsort((losses, costs))
    least = np.minimum.accumulate(losses[order])
    result = np.empty_like(least)
    result[order] = least
    return result


def _probe(high: float, place: int, bits: float, lengths: Sequence[int]) -> Schedule:
    """All at the high width but one place: 0 is the prompt, n the n-th segment."""
    widths = [bits if index == place else high for index in range(len(lengths) + 1)]
    return Schedule(widths[0], tuple(zip(widths[1:], lengths, strict=True)))
