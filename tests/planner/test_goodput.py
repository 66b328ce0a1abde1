"""Policies by name on the simulator and on the engine: floors hold, nothing is lost, times are fitted."""

from __future__ import annotations

import pytest
from machines import MACHINE, WIDTHS, Linear, decoding, random_trace, state, view

from taper import load
from taper.engine.batch import BatchSizes
from taper.engine.schedule import Terms
from taper.errors import UsageError
from taper.planner.baselines import SlackFit, baselines
from taper.planner.goodput import Row, Stand, named, verdict
from taper.planner.planner import Planner
from taper.planner.replay import replay, with_host
from taper.planner.simulator import simulate
from taper.planner.step_time import Measurement
from taper.planner.traces import TracedRequest
from taper.testing.tiny import tiny_taper


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tiny_taper(tmp_path_factory.mktemp("tiny") / "tiny.taper", max_position_embeddings=1024)
    return load(path, kv="7")


@pytest.mark.parametrize("name", baselines(WIDTHS))
def test_every_policy_serves_and_keeps_floors_on_the_simulator(name):
    trace = random_trace(1, 20.0)
    result = simulate(baselines(WIDTHS)[name](), trace, MACHINE)
    assert result.met > 0
    assert result.floor_violations == 0
    assert result.admitted + result.refused == len(trace)


def test_slackfit_widens_with_slack():
    def bits(deadline_s, **changes):
        return SlackFit().schedule(0.0, state(running=[decoding(1, deadline_s=deadline_s, **changes)])).bits

    # 9 tokens are left and one pass of slack: 0.5 ms a bit, 0.1 ms a row.
    assert bits(10 * 5e-3) == 8
    assert bits(10 * 3e-3) == 4
    assert bits(10 * 1e-4) == 2
    assert bits(10 * 1e-4, min_bits=4) == 4


def test_slackfit_turns_the_late_away():
    plan = SlackFit().schedule(2.0, state(waiting=[view(1, deadline_s=1.0), view(2, deadline_s=9.0)]))
    assert plan.refuse == ((1, "late"),)
    assert plan.prefill == ((2, 16),)


@pytest.mark.parametrize("name", ["planner", "edf", "fcfs:8", "static", "slackfit"])
def test_a_trace_on_the_engine(llm, name):
    trace = [
        TracedRequest(0.01 * index, 5 + index, 3 + index, 20, Terms(deadline_s=30, min_bits=4 * (index % 2)))
        for index in range(8)
    ]
    widths = tuple(float(bits) for bits in range(2, 9))
    result = replay(llm, named([name], widths)[name](), Linear(), trace, BatchSizes())
    assert (result.met, result.violations, result.floor_violations) == (8, 0, 0)
    assert [outcome.generated for outcome in result.outcomes] == [3 + index for index in range(8)]
    assert sum(result.bits.values()) == sum(range(3, 11))
    assert result.seconds >= 0.07
    assert 0 < result.planner_s < result.seconds
    if name == "fcfs:8":
        assert set(result.bits) == {8}


def test_what_is_late_on_the_engine_does_not_count(llm):
    trace = [TracedRequest(0.0, 5, 200, 200, Terms(deadline_s=0.002))]
    result = replay(llm, baselines((2.0, 8.0))["fcfs:8"](), Linear(), trace, BatchSizes())
    assert (result.met, result.violations, result.admitted) == (0, 1, 1)
    refused = replay(llm, Planner(), Linear(), trace, BatchSizes())
    assert (refused.met, refused.violations, refused.admitted) == (0, 0, 0)


def test_what_the_engine_adds_is_found():
    kinds = [(4, rows, 0, 10 * rows) for rows in (1, 2, 5, 9, 20)]
    passes = [Measurement(*kind, 1.5 * Linear().seconds(*kind) + 2e-4 + 3e-5 * kind[1]) for kind in kinds]
    found = with_host(Linear(), [*passes, Measurement(4, 1, 0, 10, -1.0)])
    for kind, one in zip(kinds, passes, strict=True):
        assert found.seconds(*kind) == pytest.approx(one.seconds, rel=1e-6)
    assert found.seconds(4, 0, 0, 0) == 0


def test_a_stand_measures_and_both_places_run(llm):
    stand = Stand(llm, Linear(), BatchSizes())
    assert stand.saturation > 0
    traces = {1.0: stand.trace(1.0, 20 / stand.saturation, 0, "poisson")}
    rows = [
        row
        for where in ("engine", "simulator")
        for row in stand.rows(named(["planner", "edf"], stand.widths), traces, where)
    ]
    assert [(row.where, row.policy) for row in rows] == [
        ("engine", "planner"), ("engine", "edf"), ("simulator", "planner"), ("simulator", "edf"),
    ]  # fmt: skip
    assert all(row.admitted + row.refused == 20 for row in rows)
    came = 20 / (traces[1.0][-1].arrival_s - traces[1.0][0].arrival_s)
    assert all(row.goodput <= row.arrivals == pytest.approx(came) for row in rows)


def test_an_unknown_policy_is_named():
    with pytest.raises(UsageError, match="no policy 'best'"):
        named(["best"], WIDTHS)


def test_the_verdict_compares_with_the_best_of_each_kind():
    def row(policy, goodput):
        return Row(policy, 2.0, "engine", 40.0, goodput, 1, 1, 0, 0.0, 0, 0, 4.0, 0.01, 9)

    rows = [row("planner", 30.0), row("fcfs:2", 20.0), row("fcfs:4", 10.0), row("edf", 25.0)]
    found = verdict(rows, "engine")["2"]
    assert found["arrivals"] == 40
    assert (found["best_other"], found["over_best"]) == ("edf", 1.2)
    assert (found["over_best_fcfs"], found["over_edf"]) == (1.5, 1.2)
    assert verdict(rows, "simulator") == {}
