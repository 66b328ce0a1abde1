"""DFTSP finds what looking at every subset finds, with fewer nodes; cut short, it says what it may miss."""

from __future__ import annotations

import numpy as np
import pytest

from taper.errors import UsageError
from taper.planner.dftsp import Candidate, Problem, Selection, dftsp, exhaustive, greedy

KINDS = ("all bind", "no slack", "all fit", "ties", "free", "one resource")


def random_problem(seed: int) -> Problem:
    """1 to 15 candidates; the kinds take turns."""
    generator = np.random.default_rng(seed)
    kind, count = KINDS[seed % len(KINDS)], int(generator.integers(1, 16))
    compute, slack = generator.integers(1, 100, count), generator.integers(0, 500, count)
    uses, budgets = generator.integers(0, 60, (count, 3)), generator.integers(50, 300, 3)
    if kind == "no slack":
        slack[:] = -1
    elif kind == "all fit":
        slack[:], budgets[:] = 10**9, 10**9
    elif kind == "ties":
        compute[:], uses[:] = 10, 20
        slack = generator.choice([30, 60, 60, 90], count)
    elif kind == "free":
        compute[:], uses[:] = 0, 0
    elif kind == "one resource":
        uses[:, 1:] = 0
    return problem_of(compute, slack, uses, budgets)


def problem_of(compute, slack, uses, budgets) -> Problem:  # type: ignore[no-untyped-def]
    rows = zip(compute, slack, uses, strict=True)
    return Problem(
        tuple(Candidate(int(time), int(left), tuple(map(int, row))) for time, left, row in rows),
        tuple(map(int, budgets)),
    )


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_500_random_instances_have_the_size_that_every_subset_has(kind: int) -> None:
    sizes, nodes = [], [0, 0, 0]
    for seed in range(kind, 500, len(KINDS)):
        problem = random_problem(seed)
        found, unpruned, oracle = dftsp(problem), dftsp(problem, prune=False), exhaustive(problem)
        for selection in (found, unpruned, oracle):
            assert problem.fits(selection.chosen)
            assert selection.is_optimal
            assert len(selection.chosen) == len(oracle.chosen) == len(set(selection.chosen))
        sizes.append((len(found.chosen), len(problem.candidates)))
        nodes = [total + one.nodes for total, one in zip(nodes, (found, unpruned, oracle), strict=True)]
    if KINDS[kind] == "no slack":
        assert {size for size, _ in sizes} == {0}
    elif KINDS[kind] in ("all fit", "free"):
        assert all(size == count for size, count in sizes)
    else:
        assert any(0 < size < count for size, count in sizes)
    assert nodes[0] <= nodes[1]
    if KINDS[kind] == "all bind":
        assert nodes[0] < 0.01 * nodes[2]
        assert nodes[0] < 0.05 * nodes[1]


@pytest.mark.parametrize("seed", range(0, 60, 6))
def test_within_a_budget_of_nodes_the_answer_fits_and_the_bound_holds(seed: int) -> None:
    problem = random_problem(seed)
    best = dftsp(problem)
    for max_nodes in range(best.nodes):
        found = dftsp(problem, max_nodes=max_nodes)
        assert found.nodes == max_nodes
        assert problem.fits(found.chosen)
        assert found.chosen == greedy(problem)
        assert len(found.chosen) <= len(best.chosen) <= found.bound
    assert dftsp(problem, max_nodes=best.nodes) == best


def test_greedy_can_miss_what_the_search_finds() -> None:
    # The first is quick, so greedy takes it, and then its memory leaves room for one more.
    problem = problem_of([1, 2, 2, 2], [20, 20, 20, 9], [[5], [3], [3], [4]], [10])
    assert len(greedy(problem)) == 2
    assert dftsp(problem).chosen == (1, 2, 3)


def test_the_slack_of_the_member_that_has_least_holds_for_all() -> None:
    problem = problem_of([4, 4, 4], [12, 12, 8], [[0]] * 3, [0])
    assert len(dftsp(problem).chosen) == 2
    assert not problem.fits((0, 1, 2))
    assert problem.fits((0, 2))


def test_limits_are_inclusive_and_nobody_is_a_set() -> None:
    assert dftsp(problem_of([5], [5], [[7]], [7])).chosen == (0,)
    assert dftsp(problem_of([5], [4], [[7]], [7])) == Selection((), 0, 0)
    assert dftsp(Problem((), (1,))) == exhaustive(Problem((), (1,))) == Selection((), 0, 0)
    assert Problem((), (-1,)).fits(())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Problem((Candidate(1, 1, (1,)),), (1, 1)), "1 uses, there are 2 budgets"),
        (lambda: Problem((Candidate(1, 1, (-1,)),), (1,)), "negative amount"),
        (lambda: Problem((Candidate(-1, 1, (1,)),), (1,)), "negative amount"),
        (lambda: dftsp(Problem((), ()), max_nodes=-1), "max_nodes -1"),
        (lambda: exhaustive(Problem((Candidate(1, 1, ()),) * 21, ())), "21 candidates have 2"),
    ],
)
def test_what_can_never_be_right_is_a_usage_error(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert caught.value.hint


def test_the_bounds_of_what_remains_end_branches() -> None:
    nodes = 0
    for seed in range(6):
        generator = np.random.default_rng(seed)
        compute, slack = generator.integers(20, 100, 30), generator.integers(100, 1000, 30)
        nodes += dftsp(problem_of(compute, slack, generator.integers(1, 60, (30, 3)), (400,) * 3)).nodes
    # Counted: 48,805 if only overdrawn budgets end a branch, 1,105 if its later siblings are still tried.
    assert nodes == 792
