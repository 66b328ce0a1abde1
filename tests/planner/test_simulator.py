"""The simulator: no request is lost, times add up, plans that no engine could run are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import MACHINE, Linear, random_trace

from taper.engine.schedule import EngineState, SequenceView, StepPlan, Terms
from taper.planner.planner import Planner
from taper.planner.simulator import InvalidPlanError, simulate
from taper.planner.traces import TracedRequest


class Scripted:
    """Does what a function says."""

    def __init__(self, plan) -> None:  # type: ignore[no-untyped-def]
        self._plan = plan

    def schedule(self, now_s: float, state: EngineState) -> StepPlan:
        return self._plan(state)

    def observe(self, plan: StepPlan, seconds: float) -> None:
        pass

    def admit(self, now_s: float, state: EngineState, new: SequenceView) -> str | None:
        return None


def one_by_one(state: EngineState) -> StepPlan:
    if state.running:
        return StepPlan(4, decode=(state.running[0].id,))
    first = state.waiting[0]
    return StepPlan(4, prefill=((first.id, first.prompt_tokens),))


def test_times_of_two_requests_one_after_the_other() -> None:
    trace = [
        TracedRequest(1.0, 10, 3, 5, Terms(deadline_s=0.0121)),
        TracedRequest(1.0, 10, 1, 5, Terms()),
    ]
    result = simulate(Scripted(one_by_one), trace, MACHINE)
    prompt = Linear().seconds(4, 0, 10, 55)
    first = prompt + Linear().seconds(4, 1, 0, 11) + Linear().seconds(4, 1, 0, 12)
    assert result.outcomes[0].finished_s == pytest.approx(1 + first)
    assert result.outcomes[1].finished_s == pytest.approx(1 + first + prompt)
    assert result.busy_s == pytest.approx(first + prompt)
    assert result.seconds == pytest.approx(first + prompt)
    assert (result.met, result.violations, result.passes, result.bits) == (2, 0, 4, {4: 4})


def test_late_below_the_floor_and_refused_requests_do_not_count() -> None:
    late = TracedRequest(0.0, 10, 3, 5, Terms(deadline_s=0.001))
    low = TracedRequest(0.0, 10, 3, 5, Terms(min_bits=8))
    result = simulate(Scripted(one_by_one), [late, low], MACHINE)
    assert (result.met, result.violations, result.floor_violations) == (0, 2, 1)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda state: StepPlan(4, prefill=((0, 99),)), "99 prompt tokens"),
        (lambda state: StepPlan(4, prefill=((77, 1),)), "not there"),
        (lambda state: StepPlan(5, prefill=((0, 1),)), "no width"),
        (lambda state: StepPlan(4, prefill=((0, 1), (0, 1))), "not there"),
        (lambda state: StepPlan(4, prefill=tuple((view.id, 1) for view in state.waiting)), "too many"),
    ],
)
def test_impossible_plans_are_refused(plan: object, message: str) -> None:
    trace = [TracedRequest(0.0, 10, 3, 5, Terms()) for _ in range(12)]
    with pytest.raises(InvalidPlanError, match=message):
        simulate(Scripted(plan), trace, MACHINE)


def test_kv_blocks_run_out() -> None:
    machine = replace(MACHINE, kv_blocks=1)
    with pytest.raises(InvalidPlanError, match="KV blocks"):
        simulate(Scripted(one_by_one), [TracedRequest(0.0, 10, 9, 9, Terms())], machine)


@pytest.mark.parametrize("rate", [20, 100, 400])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_ends_once_and_the_same_seed_gives_the_same_run(rate: float, seed: int) -> None:
    trace = random_trace(seed, rate)
    machine = replace(MACHINE, noise=0.1)
    result, again = (simulate(Planner(), trace, machine, seed) for _ in range(2))
    assert result.outcomes == again.outcomes
    for outcome, request in zip(result.outcomes, trace, strict=True):
        assert (outcome.finished_s is None) == bool(outcome.reason)
        assert outcome.generated <= request.output_tokens
        assert outcome.started == (outcome.generated > 0)
    assert result.admitted + result.refused == len(trace)
    assert sum(result.bits.values()) == sum(outcome.generated for outcome in result.outcomes)
    assert result.busy_s <= result.seconds + 1e-9
