"""The search for activation bits takes the paper's path, step by step."""

from __future__ import annotations

import itertools
import math

import pytest

from taper.errors import UsageError
from taper.tune.anda_search import SEEDS, bops, bops_saving, search_bits

OPT = (3, 1, 4, 4)
# What a tensor type loses at so many bits; they add up. Made so that 7777 holds 1 %, and of its descendants
# what the paper's path on OPT-125M says: gate_up gives one bit, down two, and then nothing more.
LOSSES = (
    {4: 0.5, 5: 0.1, 6: 0.008, 7: 0.001},
    {4: 0.5, 5: 0.1, 6: 0.008, 7: 0.001},
    {4: 0.4, 5: 0.03, 6: 0.003, 7: 0.001},
    {4: 0.3, 5: 0.004, 6: 0.002, 7: 0.001},
)


def additive(bits):
    return sum(losses.get(b, 0.0) for losses, b in zip(LOSSES, bits, strict=True))


def path(result):
    return [("".join(map(str, e.bits)), e.is_best) for e in result.evaluations]


def box(least):
    """Holds where no entry is below `least`."""
    return lambda bits: float(any(b < low for b, low in zip(bits, least, strict=True)))


def test_the_path_of_the_paper_and_the_end_of_it():
    result = search_bits(OPT, additive, 0.01)
    assert path(result) == [
        ("4444", False),
        ("5555", False),
        ("6666", False),
        ("7777", True),
        ("7767", True),  # as cheap as 7776, queued before it
        ("7757", False),
        ("7766", True),
        ("7756", False),
        ("7765", True),
        ("7755", False),
        # The paper prints its path as far as here. What costs less than 7765 is tried, and nothing else.
        ("7764", False),
        ("6765", False),
        ("7665", False),
    ]
    assert result.best.bits == (7, 7, 6, 5)
    assert result.is_finished
    assert bops_saving(OPT, result.best.bits) == 16 / ((3 * 7 + 7 + 4 * 6 + 4 * 5) / 12)


def test_going_on_to_the_limit_as_the_paper_does_finds_the_same():
    early = search_bits(OPT, additive, 0.01)
    late = search_bits(OPT, additive, 0.01, early_stop=False)
    assert late.best == early.best
    assert late.evaluations[: len(early.evaluations)] == early.evaluations
    assert not any(e.is_best for e in late.evaluations[len(early.evaluations) :])
    assert len(late.evaluations) > len(early.evaluations)


def test_of_two_that_cost_the_same_the_first_stays():
    held = {(7, 7, 7, 7), (7, 7, 6, 7), (7, 7, 7, 6)}
    for early_stop in (True, False):
        result = search_bits(OPT, lambda bits: float(bits not in held), 0.0, early_stop=early_stop)
        assert result.best.bits == (7, 7, 6, 7)
        assert ((7, 7, 7, 6) in {e.bits for e in result.evaluations}) is not early_stop


@pytest.mark.parametrize("macs", [OPT, (3, 1, 5.375, 2.6875), (1, 1, 1, 1), (7, 5, 3, 2)])
@pytest.mark.parametrize("least", [*itertools.product((4, 6, 7, 9), repeat=4)][::11])
def test_where_losses_fall_with_bits_the_end_is_the_cheapest_of_all(macs, least):
    result = search_bits(macs, box(least), 0.0, max_evaluations=1000)
    assert result.best.bits == least
    assert result.is_finished
    # A neighbour of 7666 is the seed 6666, which was tried before.
    assert len({e.bits for e in result.evaluations}) == len(result.evaluations)


def test_the_limit_of_evaluations_holds():
    asked = []
    result = search_bits(OPT, lambda bits: asked.append(bits) or 0.0, 0.0, max_evaluations=5)
    assert len(asked) == 5
    assert not result.is_finished
    assert result.best == result.evaluations[-1]
    # From 4444 on every step is accepted, the cheapest neighbour first.
    assert asked == [(4, 4, 4, 4), (4, 4, 3, 4), (4, 4, 2, 4), (4, 4, 1, 4), (4, 4, 1, 3)]


def test_bits_end_at_one():
    result = search_bits(OPT, lambda bits: 0.0, 0.0, max_evaluations=1000)
    assert result.best.bits == (1, 1, 1, 1)


@pytest.mark.parametrize("loss", [1.0, math.nan])
def test_where_nothing_holds_all_seeds_were_tried(loss):
    result = search_bits(OPT, lambda bits: loss, 0.5)
    assert result.best is None
    assert result.is_finished
    assert [e.bits for e in result.evaluations] == [(m,) * 4 for m in SEEDS]


def test_a_loss_of_just_the_limit_holds():
    assert search_bits(OPT, lambda bits: 0.01, 0.01, max_evaluations=1).best is not None


def test_bops_count_both_factors():
    assert bops((10, 20), (7, 3)) == 10 * 7 * 4 + 20 * 3 * 4
    assert bops((10, 20), (7, 3), weight_bits=2) == 10 * 7 * 2 + 20 * 3 * 2
    assert bops_saving((10, 20), (8, 8)) == 2.0


@pytest.mark.parametrize(("macs", "limit"), [((), 32), (OPT, 0), ((3, 0, 4, 4), 32)])
def test_nothing_to_search_is_an_error(macs, limit):
    with pytest.raises(UsageError, match="all must be positive"):
        search_bits(macs, additive, 0.01, max_evaluations=limit)
