"""The nested codebook against Lloyd-Max quantisers, which are optimal for one width alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from taper.errors import UsageError
from taper.quantize.codebook import gaussian_codebook, mean_squared_error, moments

# Mean squared error of the unit Gaussian's Lloyd-Max quantisers (Max, 1960, table I).
LLOYD_MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


@pytest.mark.parametrize("max_bits", [4, 6, 8])
def test_every_width_is_within_two_percent_of_lloyd_max(max_bits: int) -> None:
    # Splitting the best 2-bit codebook greedily gives 1.08 at 3 bits and 1.16 at 4.
    codebook = gaussian_codebook(2, max_bits)
    ratios = {bits: codebook.level(bits).mse / limit for bits, limit in LLOYD_MAX.items() if bits <= max_bits}
    assert max(ratios.values()) < 1.02, ratios


def test_error_falls_with_every_bit() -> None:
    errors = [level.mse for level in gaussian_codebook(2, 8).levels]
    assert all(more < less for less, more in pairwise(errors))
    # Four times below the last width, but for the int8 step at 6 bits, 5 %.
    assert errors[4] < errors[3] / 4 * 1.08
    assert all(more < less / 4 * 1.03 for less, more in pairwise(errors[4:]))


def test_wide_values_cost_nothing() -> None:
    """Error of 7 and 8 bits against the cells with real values; int8 has 2.7 times that at 8 bits."""
    for level in gaussian_codebook(2, 8).levels[5:]:
        assert level.values.dtype == np.int16
        # A step of 2.7e-4 adds step^2 / 12 = 6e-9, 0.015 % of 4.1e-5.
        inner = 0.5 * (level.reals[1:] + level.reals[:-1]).astype(np.float64)
        edges = np.concatenate([[-np.inf], inner, [np.inf]])
        mass, first, second = (np.diff(part) for part in moments(edges))
        assert level.mse < np.sum(second - first**2 / mass) * 1.02
    assert gaussian_codebook(2, 8).level(8).mse < 4.2e-5  # Lloyd-Max of 8 bits alone: 4.1e-5


def test_activations_are_as_fine_as_the_width_needs() -> None:
    found = [level.activation_bits for level in gaussian_codebook(2, 8).levels]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (7, 14)


def test_reported_error_is_that_of_the_rounded_values() -> None:
    level = gaussian_codebook(2, 6).level(3)
    points = np.linspace(-8, 8, 400_001)
    density = np.exp(-0.5 * points**2)
    nearest = np.abs(points[:, None] - level.reals[None, :].astype(np.float64)).min(axis=1)
    # A Riemann sum with step 4e-5 of a function with second derivative of order 1 is good to far below 1e-6.
    assert level.mse == pytest.approx(np.sum(density * nearest**2) / np.sum(density), rel=1e-5)


@pytest.mark.parametrize(("min_bits", "max_bits"), [(1, 4), (2, 6), (2, 8), (4, 4)])
def test_values_are_symmetric_ascending_integers(min_bits: int, max_bits: int) -> None:
    codebook = gaussian_codebook(min_bits, max_bits)
    assert [level.bits for level in codebook.levels] == list(range(min_bits, max_bits + 1))
    for level in codebook.levels:
        values = level.values.astype(int)
        assert values.dtype == int
        assert len(values) == 2**level.bits
        np.testing.assert_array_equal(values, -values[::-1])
        steps = np.diff(values)
        assert (steps > 0).all()
        assert values[-1] <= (127 if level.bits <= 6 else 16319)
        assert level.values.dtype == (np.int8 if level.bits <= 6 else np.int16)


def test_levels_nest() -> None:
    """A value lies between its two children: the cells of a level are unions of the next one's."""
    codebook = gaussian_codebook(2, 8)
    for level, deeper in pairwise(codebook.levels):
        slack = 0.5 * (level.scale + deeper.scale)  # each value is rounded to half a step
        children = deeper.reals.reshape(-1, 2)
        assert (children[:, 0] - slack <= level.reals).all()
        assert (level.reals <= children[:, 1] + slack).all()


def test_the_same_widths_give_the_same_values() -> None:
    again = gaussian_codebook.__wrapped__(2, 5)
    for left, right in zip(gaussian_codebook(2, 5).levels, again.levels, strict=True):
        np.testing.assert_array_equal(left.values, right.values)
        assert left.scale == right.scale


def test_one_bit_error_is_the_known_closed_form() -> None:
    # Two values +-sqrt(2 / pi): error 1 - 2 / pi.
    centre = np.sqrt(2 / np.pi)
    assert mean_squared_error(np.array([-centre, centre])) == pytest.approx(1 - 2 / np.pi, abs=1e-12)


@pytest.mark.parametrize("widths", [(0, 4), (5, 4), (2, 9)])
def test_impossible_widths_are_refused(widths: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="outside 1 <= min <= max <= 8"):
        gaussian_codebook(*widths)


def test_a_missing_level_is_refused() -> None:
    with pytest.raises(UsageError, match="no codebook level of 7 bits"):
        gaussian_codebook(2, 6).level(7)
