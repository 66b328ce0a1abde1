"""The planner: tables of decisions, and what holds on any trace."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from machines import MACHINE, WIDTHS, Linear, decoding, random_trace, state, view

from taper.planner.forecast import Demand, OperatingPoint, OutputLengths, PassTimes, operating_point
from taper.planner.planner import Planner
from taper.planner.promises import Members, Option
from taper.planner.simulator import simulate


def admitted(planner: Planner, *views) -> Planner:  # type: ignore[no-untyped-def]
    for one in views:
        assert planner.admit(0.0, state(), one) is None
    return planner


def test_a_quiet_machine_reads_all_bits_and_an_urgent_request_fewer() -> None:
    # Alone: 16 prompt tokens, 10 tokens of 4.1 ms at 8 bits, 2.1 at 4, 1.1 at 2; the factor is 1.1 at first.
    for deadline_s, bits in ((inf, 8), (0.08, 8), (0.03, 4), (0.018, 2)):
        one = view(1, deadline_s)
        plan = admitted(Planner(), one).schedule(0.0, state([one]))
        assert plan.bits == bits, deadline_s
        assert plan.prefill == ((1, 16),)


def test_floor_and_wish_bound_the_bits() -> None:
    urgent = view(1, 0.03, min_bits=3.0)
    assert admitted(Planner(), urgent).schedule(0.0, state([urgent])).bits == 4
    modest = view(2, max_bits=4.0)
    assert admitted(Planner(), modest).schedule(0.0, state([modest])).bits == 4


def test_refused_at_once() -> None:
    planner = Planner()
    for one, reason in (
        (view(1, 0.005), "even alone"),
        (view(2, min_bits=9.0), "no width of 9 bits"),
        (view(3, max_tokens=2000, expected_tokens=2000), "KV blocks"),
    ):
        assert reason in (planner.admit(0.0, state(), one) or "")


def test_a_request_that_would_break_a_promise_waits_and_is_refused_when_its_time_is_over() -> None:
    # The running one needs 9 passes of 1.1 x 1.1 ms in 11 ms: a prompt of 16 tokens (1.7 ms) is too much.
    busy = decoding(1, deadline_s=0.0112)
    new = view(2, 0.04)
    planner = admitted(Planner(), new)
    plan = planner.schedule(0.0, state([new], [busy]))
    assert (plan.prefill, plan.decode, plan.bits, plan.refuse) == ((), (1,), 2, ())
    plan = planner.schedule(0.035, state([new], [busy]))
    assert plan.refuse == ((2, "the deadline cannot be met any more"),)


def test_the_longer_deadline_leaves_room_for_both() -> None:
    busy, new = decoding(1, deadline_s=0.05), view(2, 0.08)
    plan = admitted(Planner(), new).schedule(0.0, state([new], [busy]))
    assert plan.prefill == ((2, 16),)
    assert plan.decode == (1,)


def test_blocks_and_places_bound_the_batch() -> None:
    new = [view(number) for number in range(5)]
    plan = admitted(Planner(), *new).schedule(0.0, state(new, kv_blocks=4))  # 2 blocks each
    assert [number for number, _ in plan.prefill] == [0, 1]
    plan = admitted(Planner(), *new).schedule(0.0, state(new, max_batch=3))
    assert [number for number, _ in plan.prefill] == [0, 1, 2]


def test_priority_then_deadline_decide_who_is_first() -> None:
    new = [view(1, 0.9), view(2, 0.5), view(3, 2.0, priority=1)]
    plan = admitted(Planner(), *new).schedule(0.0, state(new, max_batch=2))
    assert [number for number, _ in plan.prefill] == [3, 2]


def test_a_full_queue_turns_away_its_end() -> None:
    new = [view(number, 10.0 + number) for number in range(6)]
    running = [decoding(number + 10) for number in range(8)]
    plan = admitted(Planner(max_waiting=4), *new).schedule(0.0, state(new, running))
    assert [number for number, _ in plan.refuse] == [4, 5]


def test_a_truncated_answer_ends_before_its_deadline_and_holds_nobody_up() -> None:
    cut = decoding(1, generated=3, deadline_s=0.02, on_miss="truncate", max_tokens=100, expected_tokens=100)
    new = view(2, 0.05)
    planner = admitted(Planner(), new)
    assert planner.schedule(0.0, state([new], [cut])).prefill == ((2, 16),)
    assert planner.schedule(0.0199, state([], [cut])).finish == (1,)


def test_passes_between_news_repeat_the_decision() -> None:
    one = decoding(1, deadline_s=1.0)
    planner = Planner()
    first = planner.schedule(0.0, state([], [one]))
    planner.observe(first, 0.004)
    assert planner.schedule(0.004, state([], [replace(one, num_generated=2)])) == first


def test_running_members_that_it_never_saw_keep_their_floor() -> None:
    planner = Planner(budget_frac=0.0)
    planner.schedule(0.0, state([], [decoding(1, deadline_s=0.012)]))
    for _ in range(100):  # no budget is left for a replan
        planner.schedule(0.0, state([], [decoding(1, deadline_s=0.012)]))
    assert planner.schedule(0.0, state([], [decoding(1), decoding(2, min_bits=8.0)])).bits == 8


@pytest.mark.parametrize("rate", [30, 100, 300])
def test_floors_hold_promises_are_kept_and_nobody_starts_late(rate: float) -> None:
    machine = replace(MACHINE, noise=0.1)
    results = [simulate(Planner(), random_trace(seed, rate, 300), machine, seed) for seed in range(4)]
    for result in results:
        assert result.floor_violations == 0
        assert not any(outcome.late_start for outcome in result.outcomes)
        assert result.met > 20  # it serves
    assert sum(one.violations for one in results) <= 0.01 * sum(one.admitted for one in results)


def test_more_budget_never_starves_and_none_still_serves() -> None:
    trace = random_trace(1, 60, 200)
    some, none = (simulate(Planner(budget), trace, MACHINE).met for budget in (0.01, 0.0))
    assert none > 0.5 * some


def test_short_passes_leave_no_budget_and_still_fill_the_batch() -> None:
    # Passes of 0.1 ms buy 1 us of planning each: without plans that are made all the same it starves.
    quick = replace(MACHINE, step_time=Linear(speed=20))
    trace = random_trace(2, 4000, 2000)
    some, plenty = (simulate(Planner(budget), trace, quick).met for budget in (0.01, 1.0))
    assert some > 0.85 * plenty


def test_repeated_plans_predict_what_their_passes_take() -> None:
    # Without noise every pass takes what it should, so nothing is to be corrected.
    planner = Planner()
    simulate(planner, random_trace(3, 60, 300), MACHINE)
    # But that a repeated plan keeps its prediction for up to 16 entries of 0.1 us a row.
    for bits in WIDTHS[:2]:
        assert 1.0 <= planner._times.residuals.factor(bits) < 1.005


def test_one_that_comes_back_is_started_once() -> None:
    one = view(1, 5.0)
    planner = admitted(Planner(), one)
    assert planner.schedule(0.0, state([one])).prefill == ((1, 16),)
    assert planner.schedule(0.01, state([], [decoding(1, deadline_s=5.0)])).decode == (1,)
    again = view(1, 5.0, num_generated=3)  # preempted
    assert planner.schedule(0.02, state([again])).prefill == ((1, 19),)


def test_one_that_comes_back_is_refused_when_its_time_is_over() -> None:
    planner = Planner()
    busy, again = decoding(1, deadline_s=0.0112), view(2, 0.04, num_generated=3)  # never admitted here
    assert planner.schedule(0.0, state([again], [busy])).refuse == ()
    assert [number for number, _ in planner.schedule(0.039, state([again], [busy])).refuse] == [2]


def test_a_plan_goes_on_after_the_time_of_one_that_has_started() -> None:
    planner = admitted(Planner(), view(1, 0.03))
    planner.schedule(0.0, state([view(1, 0.03)]))
    running = decoding(1, deadline_s=0.03)
    plan = planner.schedule(0.005, state([], [running]))
    assert planner.schedule(0.029, state([], [running])) == plan
    assert planner.schedule(0.0291, state([], [running])) is planner.schedule(0.0292, state([], [running]))


def brute_finish(members: list[tuple[int, float, int]], bits: float, entries: int, times: PassTimes) -> bool:
    """Token by token: prompts first, then everybody that has tokens left decodes."""
    prompts = sum(unread for _, _, unread in members)
    now = prompts * times.prompt_token(bits) + (times.decode(bits, len(members), entries) if prompts else 0)
    left = [tokens for tokens, _, _ in members]
    while any(left):
        now += times.decode(bits, sum(tokens > 0 for tokens in left), entries)
        for index, tokens in enumerate(left):
            if tokens == 1 and now > members[index][1] + 1e-12:
                return False
            left[index] = max(0, tokens - 1)
    return True


@pytest.mark.parametrize("seed", range(200))
def test_finish_times_equal_those_of_passes_one_by_one(seed: int) -> None:
    generator = np.random.default_rng(seed)
    times = PassTimes()
    times.use(Linear())
    drawn = [
        (int(generator.integers(1, 30)), float(generator.uniform(0.02, 0.12)), int(generator.integers(0, 20)))
        for _ in range(generator.integers(1, 7))
    ]
    members = Members(times, 2.0, 100)
    before = [True, True]
    for tokens, left_s, unread in drawn:
        members.add(Option(tokens, left_s, unread, 2.0))
        after = [members.can_drain(4.0), members.is_steady(4.0)]
        assert all(was or not is_now for was, is_now in zip(before, after, strict=True))  # only harder
        before = after
    assert members.can_drain(4.0) == brute_finish(drawn, 4.0, 100, times)


def test_the_operating_point_serves_most() -> None:
    def demand(at: float, bits: float, cost: float) -> Demand:
        return Demand(bits, at, cost * pass_s[bits])

    pass_s = {2.0: 1.0, 4.0: 1.5, 8.0: 3.0}
    light = [demand(index, 8.0, 0.1) for index in range(10)]
    assert operating_point(light, pass_s) == OperatingPoint(8.0, inf)
    # 1.25 x 6 s: at 8 bits two of 3 s each, at 2 bits seven of the ten with floor 2.
    mixed = [demand(index, 8.0 if index % 2 else 2.0, 1.0) for index in range(19)]
    squeezed = [one._replace(arrival_s=one.arrival_s / 3) for one in mixed]
    point = operating_point(squeezed, pass_s)
    assert (point.bits, point.price_s, point.is_overload) == (2.0, 1.0, True)


def test_output_bounds_are_conditional_and_never_beyond_the_limit() -> None:
    lengths = OutputLengths(quantile=0.9)
    assert lengths.bound(0, 100) == 100
    for share in range(1, 161):
        lengths.observe(share * 50 // 160, 100)  # answers of 0 to 50 %
    assert lengths.bound(0, 100) in (45, 46)
    assert lengths.bound(10, 100) > lengths.bound(0, 100)
    assert lengths.bound(40, 100) == 100  # too few are that long
    assert lengths.bound(99, 100) == 100
