"""Traces: seeded, with the rate asked for, kept and read as they were, hostile files refused."""

from __future__ import annotations

import json
from math import inf

import numpy as np
import pytest
from machines import WIDTHS, Linear

from taper.errors import CorruptFileError, UsageError
from taper.planner.traces import load_trace, mixed_trace, save_trace


@pytest.mark.parametrize("arrivals", ["poisson", "bursty"])
def test_a_seed_gives_one_trace_of_the_rate_asked_for(arrivals):
    trace = mixed_trace(Linear(), WIDTHS, 50.0, 2000, 3, arrivals)
    assert trace == mixed_trace(Linear(), WIDTHS, 50.0, 2000, 3, arrivals)
    assert trace != mixed_trace(Linear(), WIDTHS, 50.0, 2000, 4, arrivals)
    assert 2000 / trace[-1].arrival_s == pytest.approx(50, rel=0.1)
    times = np.array([one.arrival_s for one in trace])
    assert (np.diff(times) >= 0).all()


def test_bursts_are_burstier():
    def spread(arrivals):
        times = np.array([one.arrival_s for one in mixed_trace(Linear(), WIDTHS, 50.0, 4000, 3, arrivals)])
        counts = np.bincount((times * 5).astype(int))
        return counts.var() / counts.mean()

    assert spread("bursty") > 2 * spread("poisson")


def test_lengths_and_terms_do_not_depend_on_the_rate_and_are_mixed():
    slow, fast = (mixed_trace(Linear(), WIDTHS, rate, 500, 1) for rate in (1.0, 100.0))
    assert [one.terms for one in slow] == [one.terms for one in fast]
    assert {one.terms.min_bits for one in slow} == {0, 3, 4, 8}
    assert all(1 <= one.output_tokens <= one.max_tokens <= 256 for one in slow)
    assert all(one.terms.deadline_s < inf for one in slow)


def test_all_at_once_without_terms():
    trace = mixed_trace(Linear(), WIDTHS, inf, 10, 1, has_terms=False)
    assert {one.arrival_s for one in trace} == {0.0}
    assert {one.terms.deadline_s for one in trace} == {inf}


def test_a_file_gives_the_trace_back(tmp_path):
    trace = mixed_trace(Linear(), WIDTHS, 50.0, 20, 3)
    trace += mixed_trace(Linear(), WIDTHS, 50.0, 20, 3, has_terms=False)
    save_trace(trace, tmp_path / "trace.json")
    assert load_trace(tmp_path / "trace.json") == sorted(trace, key=lambda one: one.arrival_s)


@pytest.mark.parametrize(
    "change",
    [
        {"arrival_s": -1},
        {"prompt_tokens": 0},
        {"output_tokens": 9, "max_tokens": 8},
        {"terms": {"deadline_s": 0}},
        {"terms": {"on_miss": "explode"}},
        {"surprise": 1},
        {"prompt_tokens": "many"},
    ],
)
def test_hostile_files_are_refused(tmp_path, change):
    path = tmp_path / "trace.json"
    save_trace(mixed_trace(Linear(), WIDTHS, 50.0, 1, 3), path)
    data = json.loads(path.read_text())
    data["requests"][0] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(CorruptFileError, match="is no trace"):
        load_trace(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="there is no trace"):
        load_trace(tmp_path / "none.json")
