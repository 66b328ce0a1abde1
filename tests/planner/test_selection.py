"""The generalised search against all subsets."""

from __future__ import annotations

from itertools import combinations
from math import inf

import numpy as np
import pytest
from machines import WIDTHS, Linear, state, view

from taper.planner.forecast import OperatingPoint, PassTimes
from taper.planner.planner import Planner
from taper.planner.promises import Members, Option
from taper.planner.selection import Choice, largest_set


def drawn(seed: int, count: int) -> tuple[Members, list[Option], int, int]:
    """Members that run, options, free blocks and places."""
    generator = np.random.default_rng(seed)
    times = PassTimes()
    times.use(Linear())
    members = Members(times, WIDTHS[0], 100)

    def option(hurry: float) -> Option:
        tokens = int(generator.integers(1, 30))
        left_s = float(tokens * generator.uniform(0.0015, 0.012) * hurry)
        first_s = left_s if generator.random() < 0.2 else inf
        floor = float(generator.choice(WIDTHS, p=[0.6, 0.25, 0.15]))
        return Option(
            tokens, left_s, int(generator.integers(0, 20)), floor, int(generator.integers(1, 4)), first_s
        )

    for _ in range(generator.integers(0, 4)):
        members.take(option(3.0))
    return (
        members,
        [option(1.0) for _ in range(count)],
        int(generator.integers(3, 20)),
        int(generator.integers(1, 9)),
    )


def fits(members: Members, chosen: list[Option], blocks: int, places: int) -> bool:
    """Everybody at once, without the way that the search goes."""
    whole = members.copy()
    for one in chosen:
        whole.add(one)
    holds = whole.is_steady(whole.bits) or whole.can_drain(whole.bits)
    return holds and len(chosen) <= places and sum(one.blocks for one in chosen) <= blocks


def exhaustive(members: Members, options: list[Option], blocks: int, places: int) -> int:
    for size in range(len(options), 0, -1):
        if any(fits(members, list(some), blocks, places) for some in combinations(options, size)):
            return size
    return 0


@pytest.mark.parametrize("seed", range(150))
def test_no_set_is_larger(seed: int) -> None:
    members, options, blocks, places = drawn(seed, 9)
    before = members.copy()
    choice = largest_set(members, options, blocks=blocks, places=places)
    assert choice.is_optimal
    assert len(choice.chosen) == exhaustive(members, options, blocks, places)
    assert fits(members, [options[place] for place in choice.chosen], blocks, places)
    assert members == before


def test_a_wider_pass_is_taken_where_more_can_share_it() -> None:
    times = PassTimes()
    times.use(Linear())
    # At 2 bits one may join, with its 100 passes; at 4 bits two short ones, which make that impossible.
    slow = Option(100, 100 * 0.0013, 0, 2.0)
    short = [Option(4, 0.012, 0, 4.0), Option(4, 0.012, 0, 4.0)]
    choice = largest_set(Members(times, 2.0, 64), [slow, *short], blocks=9, places=9)
    assert (choice.chosen, choice.is_optimal) == ((1, 2), True)


def test_a_budget_ends_it_and_never_costs_the_incumbent() -> None:
    members, options, blocks, places = drawn(7, 12)
    whole = largest_set(members, options, blocks=blocks, places=places)
    assert whole.tests > 20
    assert largest_set(
        members, options, blocks=blocks, places=places, incumbent=whole.chosen, max_tests=5
    ) == Choice(whole.chosen, 5, False)
    sizes = [
        len(largest_set(members, options, blocks=blocks, places=places, max_tests=most).chosen)
        for most in range(0, whole.tests + 1, 5)
    ]
    assert sizes[0] == 0
    assert sizes == sorted(sizes)
    assert len(whole.chosen) in (sizes[-1], sizes[-1] + 1)


def test_under_overload_the_planner_takes_the_larger_set() -> None:
    # In the order of cost the first one comes first, and its pace leaves no room for the two others.
    planner = Planner()
    planner._times.use(Linear())
    hurried = view(1, 0.0055, prompt_tokens=1, max_tokens=3, expected_tokens=3)
    calm = [view(number, 0.06, prompt_tokens=16, max_tokens=20, expected_tokens=20) for number in (2, 3)]
    for one in (hurried, *calm):
        assert planner.admit(0.0, state(), one) is None
    planner._point = OperatingPoint(2.0, 0.001)
    planner._rank_again()
    assert planner._ranked[0][1] == 1
    assert [number for number, _ in planner.schedule(0.0, state([hurried, *calm])).prefill] == [2, 3]
