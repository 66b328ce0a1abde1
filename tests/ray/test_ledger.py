"""Routing and scaling as plain arithmetic; no cluster."""

from __future__ import annotations

from math import inf
from types import SimpleNamespace

import pytest

from taper.ray.ledger import SILENT_CALLS, SUSPECT_S, UNROUTED_S, Asked, Ledger, Slack
from taper.ray.scaling import queue_and_slack

FAST, SLOW = "fast", "slow"


def test_the_replica_with_less_work_ahead_comes_first():
    ledger = Ledger()
    ledger.route("a", FAST, Asked(tokens=100))
    assert ledger.order({FAST: 0.01, SLOW: 0.01}, Asked(tokens=10)) == [SLOW, FAST]
    # Four times as slow: 10 tokens take longer there than 110 at the other one take... not yet at 2 times.
    assert ledger.order({FAST: 0.01, SLOW: 0.02}, Asked(tokens=10)) == [SLOW, FAST]
    assert ledger.order({FAST: 0.01, SLOW: 0.2}, Asked(tokens=10)) == [FAST, SLOW]


def test_an_urgent_request_passes_those_that_can_wait():
    ledger = Ledger()
    ledger.route("long", FAST, Asked(tokens=1000))
    ledger.route("urgent", SLOW, Asked(deadline_s=1.0, tokens=50))
    step_s = {FAST: 0.01, SLOW: 0.01}
    assert ledger.order(step_s, Asked(deadline_s=2.0, tokens=10)) == [FAST, SLOW]
    assert ledger.order(step_s, Asked(tokens=10)) == [SLOW, FAST]
    assert ledger.order(step_s, Asked(priority=1, tokens=10)) == [SLOW, FAST]  # equal: the one with less work


def test_a_replica_of_unknown_speed_counts_as_a_typical_one():
    ledger = Ledger()
    ledger.route("a", FAST, Asked(tokens=5))
    assert ledger.order({FAST: 0.01, "new": 0.0}, Asked(tokens=10)) == ["new", FAST]


def test_what_has_ended_or_died_or_was_never_taken_is_forgotten():
    ledger = Ledger()
    step_s = {"one": 0.01, "other": 0.01}
    ledger.choose("a", "one", Asked(tokens=9), now_s=0)
    assert ledger.order(step_s, Asked()) == ["other", "one"]
    ledger.route("b", "other", Asked(tokens=20))
    ledger.keep(step_s, now_s=UNROUTED_S)
    assert ledger.order(step_s, Asked()) == ["one", "other"]
    ledger.complete("b")
    ledger.complete("b")
    assert ledger.order(step_s, Asked()) == ["one", "other"]
    ledger.route("c", "gone", Asked(tokens=20))
    ledger.keep(step_s, now_s=0)
    assert ledger.order({"gone": 0.01, **step_s}, Asked())[0] == "gone"


def test_a_replica_that_keeps_silent_comes_last_for_a_while():
    ledger = Ledger()
    step_s = {"one": 0.01, "other": 0.01}
    ledger.route("a", "one", Asked(call="7"))
    ledger.route("b", "other", Asked(tokens=50))
    SILENT_CALLS.add("7")
    ledger.keep(step_s, now_s=0.0)
    assert not SILENT_CALLS
    assert ledger.order(step_s, Asked()) == ["other", "one"]
    ledger.keep(step_s, now_s=SUSPECT_S)
    assert ledger.order(step_s, Asked()) == ["one", "other"]


def test_pressure_is_the_needed_over_the_left_time():
    slack = Slack()
    assert slack.pressure(0.01, 1, now_s=0) == 0
    slack.begin(Asked(tokens=1000))
    assert slack.pressure(0.01, 1, now_s=0) == 0
    first = slack.begin(Asked(deadline_s=4.0, tokens=100))
    assert slack.pressure(0.01, 1, now_s=0) == pytest.approx(0.25)
    slack.begin(Asked(deadline_s=2.0, tokens=100))
    assert slack.pressure(0.01, 1, now_s=0) == pytest.approx(0.5)
    assert slack.pressure(0.01, 2, now_s=0) == pytest.approx(0.25)
    assert slack.pressure(0.01, 1, now_s=3.0) == 10
    slack.end(first, now_s=3.0)


def test_refused_and_late_ones_ask_for_more_replicas_for_a_while():
    slack = Slack()
    for is_refused in (True, False):
        slack.end(slack.begin(Asked(deadline_s=5.0)), is_refused, now_s=1.0)
    assert slack.pressure(0.01, 1, now_s=2.0) == 1.5
    assert slack.pressure(0.01, 1, now_s=30.0) == 0
    slack.end(slack.begin(Asked(deadline_s=inf)), True, now_s=30.0)
    assert slack.pressure(0.01, 1, now_s=30.0) == 0


@pytest.mark.parametrize(
    ("requests", "pressures", "replicas"),
    [(0, [], 0), (16, [0.0, 0.0], 4), (4, [1.5, 1.5], 3), (4, [10.0, 10.0], 4), (4, [0.1, 0.1], 1)],
)
def test_as_many_replicas_as_queue_or_deadlines_need(requests, pressures, replicas):
    context = SimpleNamespace(
        current_num_replicas=2,
        total_num_requests=requests,
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 4.0),
        aggregated_metrics={"pressure": dict(enumerate(pressures))},
    )
    assert queue_and_slack(context) == (replicas, {})
