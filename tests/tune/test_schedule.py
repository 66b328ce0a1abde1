"""Schedules: how many there are, what they are called, and that the policy of that name does the same."""

from __future__ import annotations

import math

import pytest

from taper.engine import Engine, Request, SamplingParams
from taper.errors import UsageError
from taper.precision import StepContext, parse_policy
from taper.tune.controls import evenly_mixed, order_controls, thirds, uniform_controls
from taper.tune.held_out import Listed
from taper.tune.schedule import Schedule, monotone_schedules, segment_lengths, uniform


def bits_of_tokens(policy, num_tokens):
    steps = [StepContext("decode" if n else "prefill", 9 + n, n, num_tokens, 2, 8) for n in range(num_tokens)]
    return [policy.bits(step) for step in steps]


@pytest.mark.parametrize(("widths", "segments"), [((8, 4), 1), ((8, 6, 4, 3), 5), ((2, 3, 4, 5, 6, 7, 8), 3)])
def test_every_falling_schedule_is_there_once(widths, segments):
    found = monotone_schedules(widths, 20, segments)
    assert len(found) == math.comb(segments + len(widths), len(widths) - 1)
    assert len({schedule.key for schedule in found}) == len(found)
    assert all(schedule.is_monotone and schedule.max_tokens == 20 for schedule in found)


def test_policy_text_gives_the_schedules_bits():
    schedules = monotone_schedules((8, 4, 2), 11, 4)
    for schedule in schedules:
        policy = parse_policy(schedule.policy, 2, 8)
        assert policy.name == schedule.policy
        assert bits_of_tokens(policy, 11) == [schedule.prefill_bits, *schedule.decode_bits]
        assert bits_of_tokens(Listed(schedule), 11) == bits_of_tokens(policy, 11)
    texts = {schedule.policy for schedule in schedules}
    assert {"fixed:8", "phase:8/2", "progressive:8@0,4@2", "progressive:8/4@0,2@8"} <= texts


def test_names_of_schedules():
    assert Schedule(8, ((4, 3), (4, 3), (2, 2))).key == "8/4@0,2@6"
    assert Schedule(8, ((3.3, 8),)).policy == "phase:8/3.3"
    assert Schedule(3, ((8, 8),)).policy == "phase:3/8"
    assert Schedule(8, ((2, 4), (4, 4))).policy is None
    assert uniform(4, 8).policy == "fixed:4"


def test_average_bits_are_the_engines(decoder):
    schedule = Schedule(8, ((6, 4), (4, 3), (2, 5)))
    request = Request(
        [5, 6, 7],
        parse_policy(schedule.policy, 2, 8),
        SamplingParams(temperature=0.0),
        max_tokens=12,
        ignore_eos=True,
    )
    assert Engine(decoder, None).generate(request).usage.average_bits == schedule.average_bits
    assert uniform(4, 1, 8).average_bits == 8


def test_segments_differ_by_one_token_at_most():
    assert segment_lengths(128, 8) == [16] * 8
    assert segment_lengths(10, 4) == [2, 3, 2, 3]
    with pytest.raises(UsageError, match="11 segments of 10 tokens"):
        segment_lengths(10, 11)


def test_too_many_schedules_are_refused():
    with pytest.raises(UsageError, match="7 widths and 64 segments make 143,218,999 schedules"):
        monotone_schedules(range(2, 9), 128, 64)


def test_order_controls_have_the_winners_passes():
    winner = Schedule(8, ((6, 4), (4, 4), (4, 4), (2, 4)))
    controls = order_controls(winner)
    assert set(controls) == {"reverse order", "flat mix", "random order"}
    for control in controls.values():
        assert sorted(control.decode_bits) == sorted(winner.decode_bits)
        assert control.prefill_bits == 8
    assert controls["reverse order"].decode_bits == winner.decode_bits[::-1]
    assert controls["random order"].decode_bits not in (winner.decode_bits, winner.decode_bits[::-1])
    assert order_controls(uniform(4, 8))["random order"] == uniform(4, 8)


def test_flat_mix_is_even():
    mixed = evenly_mixed([8] * 4 + [2] * 12)
    assert mixed.count(8) == 4
    for begin in range(0, 16, 4):
        assert mixed[begin : begin + 4].count(8) == 1
    assert evenly_mixed([4, 4]) == [4, 4]
    assert evenly_mixed([]) == []


def test_pmpds_grid():
    keys = {schedule.key for schedule in thirds(8, (8, 4), 128)}
    assert keys == {"8/8@0,4@2", "8/8@0,4@43", "8/8@0,4@86"}
    assert len(thirds(8, (8, 4, 3), 128)) == 6
    assert [schedule.key for schedule in thirds(8, (8, 4), 1)] == ["8/8@0"]


def test_uniform_controls_come_from_high_to_low():
    assert [*uniform_controls((2, 8, 4), 9)] == ["uniform 8", "uniform 4", "uniform 2"]
