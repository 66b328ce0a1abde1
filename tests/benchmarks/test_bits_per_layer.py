"""The pure parts of the measurement of bits per layer."""

from __future__ import annotations

import allocation
import pytest


def test_interpolation_is_exact_for_a_line_and_for_a_power() -> None:
    points = [(2.0, 0.4), (3.0, 0.1), (4.0, 0.025)]
    straight, logarithmic = allocation.interpolated(points, 2.5)
    assert straight == pytest.approx(0.25)
    assert logarithmic == pytest.approx(0.2)
    assert allocation.interpolated(points, 3.0) == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="outside"):
        allocation.interpolated(points, 4.5)


def test_budgets_are_set_against_the_widths_around_them() -> None:
    def row(reading: str, bits: float, kl: float) -> dict[str, object]:
        return {
            "reading": reading,
            "bits_per_weight": bits,
            "kl_mean": kl,
            "kl_mean_se": None,
            "predicted_kl": kl,
            "increase_frac": 0.1,
        }

    rows = [
        row("2 in every matrix", 2, 0.4),
        row("3 in every matrix", 3, 0.1),
        row("2.5 allocated", 2.5, 0.1),
    ]
    assert allocation.table(rows).splitlines()[-1].endswith("| 0.40 x | 0.50 x |")
