"""The gate closes to floors that cost more than they bring, and opens again when there is room."""

from __future__ import annotations

from math import inf

from taper.planner.floor_gate import FloorGate


def seconds(bits):
    return bits  # twice the bits, half the passes


def window(gate, served, lost=(), floors=(2.0, 4.0, 8.0)):
    """128 arrivals of some floors; what was served by floor, and (floor, running) of what was lost."""
    for floor, count in served.items():
        for _ in range(count):
            gate.served(floor)
    for floor, running in lost:
        gate.lost(floor, running)
    moved = False
    for index in range(128):
        moved = gate.arrived(floors[index % len(floors)], seconds) or moved
    return moved


def test_it_closes_where_high_floors_cost_more_than_they_bring():
    gate = FloorGate()
    assert not window(gate, {2.0: 40, 4.0: 40, 8.0: 30}, [(2.0, 8.0)] * 20)
    assert gate.bits == inf
    assert window(gate, {2.0: 30, 4.0: 30, 8.0: 20}, [(2.0, 8.0)] * 30)
    assert gate.bits == 4


def test_what_the_machine_can_do_without_them_bounds_the_gain():
    # 90 more were lost, but at half the time a pass no more than twice the 40 served would be: 80 < 81.
    gate = FloorGate()
    window(gate, {2.0: 1, 8.0: 80}, [(2.0, 8.0)] * 79)
    assert gate.bits == inf


def test_losses_beside_lower_floors_are_not_blamed_on_high_ones():
    gate = FloorGate()
    window(gate, {2.0: 30, 4.0: 30, 8.0: 5}, [(8.0, 8.0)] * 40)
    assert gate.bits == inf


def test_it_opens_after_quiet_windows_and_later_each_time_that_was_wrong():
    gate = FloorGate()
    bad = [(2.0, 8.0)] * 60
    window(gate, {2.0: 30, 8.0: 20}, bad)
    assert gate.bits == 4
    waits = []
    for _ in range(3):
        count = 0
        while gate.bits == 4:
            window(gate, {2.0: 60, 4.0: 60})
            count += 1
        waits.append(count)
        assert gate.bits == 8
        window(gate, {2.0: 30, 8.0: 20}, bad)
    assert waits == [2, 4, 8]


def test_it_stays_closed_while_much_is_lost():
    gate = FloorGate()
    window(gate, {2.0: 30, 8.0: 20}, [(2.0, 8.0)] * 60)
    for _ in range(10):
        window(gate, {2.0: 60, 4.0: 60}, [(4.0, 4.0)] * 10)
    assert gate.bits == 4


def test_it_is_open_where_no_floor_is_above_it():
    gate = FloorGate()
    window(gate, {2.0: 30, 8.0: 20}, [(2.0, 8.0)] * 60)
    window(gate, {2.0: 60, 4.0: 60}, floors=(2.0, 4.0))
    assert gate.bits == inf
