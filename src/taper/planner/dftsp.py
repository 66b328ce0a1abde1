"""DFTSP: the largest set of requests that one batch can serve, by a depth-first search of a pruned tree.

After arXiv 2405.07140 (WCNC 2024), rebuilt from its description; `docs/dftsp.md` says what was recalled. All
amounts are integers, so that every way to the optimum gives the same one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError

I64 = NDArray[np.int64]
# Subsets that the exhaustive search holds in memory at once: 2^20 of int64, a handful of arrays.
MAX_EXHAUSTIVE = 20


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that may join the batch.

    Attributes:
        compute_ns: that it adds to the batch's time; at least 0.
        slack_ns: that the batch may take if it joins; negative: it can not.
        uses: of each shared resource, in units of `Problem.budgets`; at least 0.
    """

    compute_ns: int
    slack_ns: int
    uses: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """Most members of which the uses are within every budget and the computation within everyone's slack.

    Paper, problem P1 as far as it is known: (a) to (d); its (e), accuracy, is a filter before.

    Attributes:
        candidates: in any order.
        budgets: of the shared resources; a negative one admits nobody.

    Raises:
        UsageError: for a negative amount, or uses that are not one for each budget.
    """

    candidates: tuple[Candidate, ...]
    budgets: tuple[int, ...]

    def __post_init__(self) -> None:
        for number, one in enumerate(self.candidates):
            if len(one.uses) != len(self.budgets):
                raise UsageError(
                    f"candidate {number} has {len(one.uses)} uses, there are {len(self.budgets)} budgets",
                    hint="give one use for each budget",
                )
            if one.compute_ns < 0 or min(one.uses, default=0) < 0:
                raise UsageError(f"candidate {number} has a negative amount", hint="amounts are at least 0")

    def fits(self, chosen: Sequence[int]) -> bool:
        """Whether candidates, by their numbers, can be served together; nobody: always."""
        if not chosen:
            return True
        members = [self.candidates[number] for number in chosen]
        spent = [sum(column) for column in zip(*(one.uses for one in members), strict=True)]
        return sum(one.compute_ns for one in members) <= min(one.slack_ns for one in members) and all(
            use <= budget for use, budget in zip(spent, self.budgets, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """Of a search.

    Attributes:
        chosen: numbers of the members, rising.
        nodes: partial sets that were looked at; of the exhaustive search subsets.
        bound: no set has more members; the number chosen unless the budget of nodes ran out.
    """

    chosen: tuple[int, ...]
    nodes: int
    bound: int

    @property
    def is_optimal(self) -> bool:
        """Whether no larger set exists, as far as the search could tell."""
        return len(self.chosen) == self.bound


def dftsp(problem: Problem, *, prune: bool = True, max_nodes: int | None = None) -> Selection:
    """Find a largest set (paper: DFTSP; journal: OT).

    Sizes are tried from the largest that any single resource allows downwards. For a size, each candidate in
    falling order of slack is the *anchor*, the member with the least slack: that makes its slack the batch's
    budget of time, and everybody before it in that order a possible companion. Companions are taken or
    skipped in rising order of computation, then of uses. The first set of the size is the answer.

    Args:
        problem: what to choose from.
        prune: leave a branch when a budget is overdrawn or when in one dimension even the least of what
            remains is too much; False: look at budgets only when a set has its size.
        max_nodes: beyond it, a greedy set is the answer and `bound` says how much larger one may be.
    """
    if max_nodes is not None and max_nodes < 0:
        raise UsageError(f"max_nodes {max_nodes} is negative", hint="give 0 or more, or None for no limit")
    anchors = _anchors(problem)
    search = _Search(prune, max_nodes)
    for size in range(_largest_size(problem, anchors), 0, -1):
        for anchor in anchors:
            if anchor.companions_count >= size - 1 and search.from_anchor(anchor, size - 1):
                return Selection(tuple(sorted((anchor.number, *search.taken))), search.nodes, size)
            if search.is_over:
                return Selection(_greedy(anchors), search.nodes, size)
    return Selection((), search.nodes, 0)


def greedy(problem: Problem) -> tuple[int, ...]:
    """Numbers of the largest of the sets that take companions of each anchor while they fit; rising."""
    return _greedy(_anchors(problem))


def exhaustive(problem: Problem) -> Selection:
    """Look at every subset (the paper's brute force): the oracle.

    Raises:
        UsageError: for more than 20 candidates.
    """
    count = len(problem.candidates)
    if count > MAX_EXHAUSTIVE:
        raise UsageError(
            f"{count} candidates have 2^{count} subsets; at most {MAX_EXHAUSTIVE} candidates are searched",
            hint="use dftsp",
        )
    fits = np.ones(1 << count, dtype=bool)
    for dimension, budget in enumerate(problem.budgets):
        fits &= _subset_sums([one.uses[dimension] for one in problem.candidates]) <= budget
    compute = _subset_sums([one.compute_ns for one in problem.candidates])
    fits &= compute <= _subset_minima([one.slack_ns for one in problem.candidates])
    fits[0] = True
    sizes = np.where(fits, _subset_sums([1] * count), -1)
    best = int(np.argmax(sizes))
    chosen = tuple(number for number in range(count) if best >> number & 1)
    return Selection(chosen, (1 << count) - 1, len(chosen))


def _subset_sums(values: Sequence[int]) -> I64:
    """Int64, (2^n,): the sum of the values whose bit is set in the index."""
    sums = np.zeros(1, dtype=np.int64)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    return sums


def _subset_minima(values: Sequence[int]) -> I64:
    minima = np.full(1, np.iinfo(np.int64).max, dtype=np.int64)
    for value in values:
        minima = np.concatenate([minima, np.minimum(minima, value)])
    return minima


class _Anchor:
    """The member with the least slack, and the companions it may have.

    Attributes:
        number: of the candidate.
        left: budgets after it: time first, then the shared resources.
        order: numbers of the companions in the order of the search.
        costs: of each companion: time first, then its uses.
    """

    def __init__(self, problem: Problem, number: int, companions: Sequence[int]) -> None:
        one = problem.candidates[number]
        self.number = number
        self.left = (
            one.slack_ns - one.compute_ns,
            *(budget - use for budget, use in zip(problem.budgets, one.uses, strict=True)),
        )
        self.order = companions
        self.costs = [_cost(problem.candidates[other]) for other in companions]
        self.companions_count = len(companions)
        self._floors: list[list[tuple[int, ...]]] | None = None

    def is_hopeless(self, needed: int) -> bool:
        """Whether in one dimension even the `needed` least companions are too much."""
        if min(self.left) < 0:
            return True
        return any(
            sum(sorted(column)[:needed]) > left
            for column, left in zip(zip(*self.costs, strict=True), self.left, strict=False)
        )

    def floors(self, most: int) -> list[list[tuple[int, ...]]]:
        """[place][r]: for each dimension, the sum of the r least costs of companions from a place on.

        Args:
            most: r goes up to it in the first call; later calls may only need less, as sizes fall.
        """
        if self._floors is None:
            columns = [_suffix_floors(column, most) for column in zip(*self.costs, strict=True)]
            self._floors = [list(zip(*rows, strict=True)) for rows in zip(*columns, strict=True)]
        return self._floors


def _cost(one: Candidate) -> tuple[int, ...]:
    return (one.compute_ns, *one.uses)


def _suffix_floors(column: Sequence[int], most: int) -> list[list[int]]:
    """[place][r]: the sum of the r least values from a place on, r up to `most` or how many there are."""
    return [[0, *accumulate(sorted(column[place:])[:most])] for place in range(len(column))]


def _anchors(problem: Problem) -> list[_Anchor]:
    """Candidates that can be served at all, in falling order of slack; equal ones in the order given."""
    able = [number for number, one in enumerate(problem.candidates) if one.slack_ns >= 0]
    able.sort(key=lambda number: -problem.candidates[number].slack_ns)
    scale = [max(1, budget) for budget in problem.budgets]

    def rank(number: int) -> tuple[float, float]:
        one = problem.candidates[number]
        return one.compute_ns, sum(use / most for use, most in zip(one.uses, scale, strict=True))

    return [_Anchor(problem, number, sorted(able[:place], key=rank)) for place, number in enumerate(able)]


def _largest_size(problem: Problem, anchors: Sequence[_Anchor]) -> int:
    """The least, over the resources, of how many of the smallest uses fit."""
    if not anchors:
        return 0
    members = [problem.candidates[anchor.number] for anchor in anchors]
    budgets = (max(one.slack_ns for one in members), *problem.budgets)
    columns = zip(*(_cost(one) for one in members), strict=True)
    return min(
        bisect_right(list(accumulate(sorted(column))), budget)
        for column, budget in zip(columns, budgets, strict=True)
    )


def _greedy(anchors: Sequence[_Anchor]) -> tuple[int, ...]:
    best: list[int] = []
    for anchor in anchors:
        if min(anchor.left) < 0 or anchor.companions_count < len(best):
            continue
        left, taken = anchor.left, [anchor.number]
        for number, cost in zip(anchor.order, anchor.costs, strict=True):
            after = _minus(left, cost)
            if min(after) >= 0:
                left = after
                taken.append(number)
        if len(taken) > len(best):
            best = taken
    return tuple(sorted(best))


def _minus(left: tuple[int, ...], cost: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([budget - use for budget, use in zip(left, cost, strict=True)])


class _Search:
    """Depth first through take and skip; one instance counts the nodes of all trees.

    Attributes:
        nodes: so far.
        taken: companions of the set that was found.
        is_over: the budget of nodes ran out.
    """

    def __init__(self, prune: bool, max_nodes: int | None) -> None:
        self._prune, self._max_nodes = prune, max_nodes
        self.nodes = 0
        self.taken: list[int] = []
        self.is_over = False

    def from_anchor(self, anchor: _Anchor, needed: int) -> bool:
        """Whether an anchor has `needed` companions with which it fits; then they are in `taken`."""
        self.taken = []
        if self._counts():
            return False
        if self._prune and anchor.is_hopeless(needed):
            return False
        return self._down(anchor, 0, needed, anchor.left)

    def _down(self, anchor: _Anchor, place: int, needed: int, left: tuple[int, ...]) -> bool:
        """Take each of the companions from `place` on, in turn, and go on behind it."""
        if needed == 0:
            return min(left) >= 0
        floors = anchor.floors(needed) if self._prune else None
        for at in range(place, anchor.companions_count - needed + 1):
            if self._counts():
                return False
            if floors is not None and _exceeds(floors[at][needed], left):
                return False  # what remains only grows dearer: the later ones are its subsets
            after = _minus(left, anchor.costs[at])
            if floors is not None and min(after) < 0:
                continue
            self.taken.append(anchor.order[at])
            if self._down(anchor, at + 1, needed - 1, after):
                return True
            self.taken.pop()
        return False

    def _counts(self) -> bool:
        """Count a node; whether the budget is spent."""
        if self._max_nodes is not None and self.nodes >= self._max_nodes:
            self.is_over = True
        else:
            self.nodes += 1
        return self.is_over


def _exceeds(costs: tuple[int, ...], left: tuple[int, ...]) -> bool:
    return any(cost > budget for cost, budget in zip(costs, left, strict=True))
