"""The search of DFTSP over what a server knows: the most requests that can join those that run.

`dftsp.py` is the paper's problem, with sums against budgets. Here a set is feasible where `Members` promises
every deadline, at one width for all that keeps every floor, and its KV blocks are there. Both only become
harder with another member, which is all that the search needs: a request that cannot join a set joins none
that contains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from taper.planner.promises import Members, Option


@dataclass(frozen=True, slots=True)
class Choice:
    """Of a search.

    Attributes:
        chosen: places in the options, rising.
        tests: certificates that were asked for.
        is_optimal: no larger set exists; False where the tests ran out before that was known.
    """

    chosen: tuple[int, ...]
    tests: int
    is_optimal: bool


def largest_set(
    members: Members,
    options: Sequence[Option],
    *,
    blocks: int,
    places: int,
    incumbent: Sequence[int] = (),
    max_tests: int | None = None,
) -> Choice:
    """A largest set of options that can join the members.

    Depth first, for each width that some floor asks for, from the least on: an option is taken, then left
    out, in the given order, so that the first way down is that of a greedy choice. At each node options that
    cannot join by themselves are dropped, and a branch is left when what remains cannot beat the best so far.

    Args:
        members: run already, and stay; not changed.
        options: in the order in which a greedy choice would take them.
        blocks: of the KV cache that are free.
        places: in the batch that are free.
        incumbent: a feasible set, to be beaten.
        max_tests: of a certificate; then the best set so far is the answer. None: until it is proven.
    """
    search = _Search(options, tuple(incumbent), inf if max_tests is None else max_tests)
    for bits in sorted({members.bits, *(one.bits for one in options if one.bits > members.bits)}):
        allowed = [place for place, one in enumerate(options) if one.bits <= bits]
        here = members.copy()
        here.bits = bits
        search.descend(here, blocks, places, allowed, ())
    return Choice(tuple(sorted(search.best)), search.tests, search.tests < search.max_tests)


class _Search:
    def __init__(self, options: Sequence[Option], best: tuple[int, ...], max_tests: float) -> None:
        self.options, self.best, self.max_tests = options, best, max_tests
        self.tests = 0

    def descend(
        self, members: Members, blocks: int, places: int, left: list[int], taken: tuple[int, ...]
    ) -> None:
        """Beat the best set by one that contains `taken`, who are members by now, and some of those left."""
        if len(taken) > len(self.best):
            self.best = taken
        if len(taken) + min(places, len(left)) <= len(self.best):
            return
        joined = [(place, more) for place in left if (more := self._with(members, blocks, place))]
        for index, (place, more) in enumerate(joined):
            if (
                len(taken) + min(places, len(joined) - index) <= len(self.best)
                or self.tests >= self.max_tests
            ):
                return
            free = blocks - self.options[place].blocks
            others = [other for other, _ in joined[index + 1 :]]
            self.descend(more, free, places - 1, others, (*taken, place))

    def _with(self, members: Members, blocks: int, place: int) -> Members | None:
        """The members with an option that can join them."""
        one = self.options[place]
        if one.blocks > blocks or self.tests >= self.max_tests:
            return None
        self.tests += 1
        more = members.copy()
        return more if more.take(one) else None
