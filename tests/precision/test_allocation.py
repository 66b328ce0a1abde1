"""The allocation against exhaustive search, its budget, its order, its refusals."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taper.errors import UsageError
from taper.formats.spec import expected_matrices
from taper.precision import allocation
from taper.precision.allocation import allocate, bits_per_weight, predicted_loss
from taper.testing.random_model import SHAPES

MIN_BITS = 2


@st.composite
def instances(draw: st.DrawFn) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    """One to four matrices of one to four widths; losses need not fall."""
    count = draw(st.integers(1, 4))
    losses, sizes = {}, {}
    for name in "abcd"[:count]:
        num_widths = draw(st.integers(1, 4))
        row = draw(st.lists(st.floats(0, 10), min_size=num_widths, max_size=num_widths))
        losses[name] = dict(enumerate(row, MIN_BITS))
        sizes[name] = draw(st.integers(1, 40))
    return losses, sizes


def used(widths: dict[str, int], sizes: dict[str, int]) -> int:
    return sum(bits * sizes[name] for name, bits in widths.items())


def exhaustive(losses: dict[str, dict[int, float]], sizes: dict[str, int], budget: float) -> float:
    """The least loss of all choices that fit; infinity where none does."""
    choices = (dict(zip(losses, widths, strict=True)) for widths in itertools.product(*losses.values()))
    return min((predicted_loss(losses, c) for c in choices if used(c, sizes) <= budget), default=math.inf)


@settings(max_examples=200, deadline=None)
@given(instances(), st.floats(0, 1))
def test_no_choice_within_the_budget_is_better(
    instance: tuple[dict[str, dict[int, float]], dict[str, int]], share: float
) -> None:
    losses, sizes = instance
    floor, most = (sum(pick(row) * sizes[name] for name, row in losses.items()) for pick in (min, max))
    budget = floor + share * (most - floor)
    widths = allocate(losses, sizes, budget)
    assert used(widths, sizes) <= budget
    # Sums of at most four floats below 10 in another order.
    assert predicted_loss(losses, widths) == pytest.approx(exhaustive(losses, sizes, budget), abs=1e-14)


@settings(max_examples=50, deadline=None)
@given(instances(), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_a_larger_budget_has_no_larger_loss_on_a_coarse_grid(
    instance: tuple[dict[str, dict[int, float]], dict[str, int]], shares: list[float]
) -> None:
    losses, sizes = instance
    floor, most = (sum(pick(row) * sizes[name] for name, row in losses.items()) for pick in (min, max))
    budgets = [floor + share * (most - floor) for share in sorted(shares)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "MAX_CELLS", 7)
        found = [allocate(losses, sizes, budget) for budget in budgets]
    assert all(used(widths, sizes) <= budget for widths, budget in zip(found, budgets, strict=True))
    figures = [predicted_loss(losses, widths) for widths in found]
    assert all(later <= earlier + 1e-14 for earlier, later in itertools.pairwise(figures))


def test_the_bits_go_where_they_help_most() -> None:
    losses = {"small": {2: 1.0, 3: 0.1, 4: 0.0}, "large": {2: 1.1, 3: 0.9, 4: 0.8}}
    assert allocate(losses, {"small": 1, "large": 10}, 24) == {"small": 4, "large": 2}
    assert allocate(losses, {"small": 1, "large": 10}, 33) == {"small": 3, "large": 3}


def test_a_width_that_helps_nothing_is_not_taken() -> None:
    flat = {2: 0.5, 3: 0.5, 4: 0.5}
    assert allocate({"a": flat, "b": flat}, {"a": 1, "b": 1}, 7) == {"a": 2, "b": 2}
    assert allocate({"a": flat, "b": flat}, {"a": 1, "b": 1}, 100) == {"a": 2, "b": 2}


def test_a_large_model_is_exact_within_the_cells() -> None:
    weights = {spec.name: spec.num_weights for spec in expected_matrices(SHAPES["1.1b"])}
    cells = 6 * sum(weights.values()) // math.gcd(*weights.values())
    assert cells <= allocation.MAX_CELLS
    losses = {name: {bits: 4.0**-bits for bits in range(2, 9)} for name in weights}
    widths = allocate(losses, weights, 3.3 * sum(weights.values()))
    # The least matrix is 2048 x 2048 of 1.1 billion weights: 0.004 bits per weight.
    assert 3.296 < bits_per_weight(widths, weights) <= 3.3


@pytest.mark.parametrize("budget", [3.99, -1.0, math.nan])
def test_a_budget_below_the_least_widths_is_refused(budget: float) -> None:
    with pytest.raises(UsageError, match="below 4"):
        allocate({"a": {2: 1.0, 3: 0.0}, "b": {2: 1.0}}, {"a": 1, "b": 1}, budget)
