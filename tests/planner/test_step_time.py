"""The step-time model: exact least squares, monotone in every argument, near what it was fitted to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taper.errors import CorruptFileError, UsageError
from taper.planner.calibration import Calibration, load_calibration, save_calibration
from taper.planner.least_squares import non_negative_least_squares
from taper.planner.step_time import Measurement, Residuals, fit, relative_errors


def measured(bits: float, decode: int, prefill: int, depth: int, noise: float = 1.0) -> Measurement:
    """A machine whose weights cost 0.1 ms a bit until 8 rows hide them; kernels jump at 17 rows."""
    rows = decode + prefill
    context = decode * (depth + 1) + prefill * depth + prefill * (prefill + 1) // 2
    weights = max(1e-4 * bits, 5e-5 * rows) + (4e-4 if rows >= 17 else 0)
    return Measurement(bits, decode, prefill, context, (weights + 2e-5 * decode + 1e-7 * context) * noise)


def grid(noise: float = 0.0) -> list[Measurement]:
    generator = np.random.default_rng(0)
    kinds = [(b, 0, d) for b in (1, 2, 4, 8, 12, 16, 20, 24, 32, 48) for d in (16, 512)]
    kinds += [(0, p, d) for p in (4, 16, 24, 64, 128, 256) for d in (0, 512)]
    kinds += [(8, 32, 128), (24, 64, 128)]
    factors = np.exp(generator.normal(0, noise, (3, len(kinds))))
    return [
        measured(bits, *kind, noise=float(factors[i, k]))
        for i, bits in enumerate((2, 4, 8))
        for k, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_non_negative_least_squares_meets_the_conditions_of_an_optimum(seed: int) -> None:
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((30, 8))
    target = generator.standard_normal(30)
    x = non_negative_least_squares(matrix, target)
    gradient = matrix.T @ (target - matrix @ x)
    assert (x >= 0).all()
    assert (gradient <= 1e-9).all()
    np.testing.assert_allclose(gradient[x > 0], 0, atol=1e-9)
    assert (x == 0).any()  # or the constraint was never needed
    assert (x > 0).any()


def test_non_negative_least_squares_takes_columns_of_zeros_and_repeated_ones() -> None:
    column = np.arange(1.0, 6.0)
    x = non_negative_least_squares(np.stack([column, np.zeros(5), column], axis=1), 3 * column)
    assert x[0] + x[2] == pytest.approx(3)
    assert x[1] == 0


def test_a_fit_is_within_three_percent_of_a_machine_of_its_own_form() -> None:
    assert relative_errors(fit(grid()), grid()).mean() < 0.03


counts = st.integers(0, 300)


@settings(max_examples=300, deadline=None)
@given(
    decode=st.integers(1, 300),
    prefill=counts,
    context=st.integers(0, 10**6),
    bits=st.sampled_from((2, 3, 4, 8)),
)
def test_time_never_falls_when_an_argument_grows(
    decode: int, prefill: int, context: int, bits: float
) -> None:
    base = NOISY.seconds(bits, decode, prefill, context)
    assert base > 0
    for more in (
        NOISY.seconds(bits + 1, decode, prefill, context),
        NOISY.seconds(bits, decode + 1, prefill, context),
        NOISY.seconds(bits, decode, prefill + 1, context),
        NOISY.seconds(bits, decode, prefill, context + 100),
    ):
        assert more >= base * (1 - 1e-12)


# 30 % noise: without pooling, smaller widths and fewer rows would often come out slower.
NOISY = fit(grid(noise=0.3))


def test_one_slow_measurement_of_a_small_width_does_not_raise_all_larger_ones_alone() -> None:
    rows = grid()
    slow = [replace(one, seconds=3 * one.seconds) if one.bits == 2 else one for one in rows]
    at_8 = fit(slow).seconds(8, 8, 0, 8 * 17)
    unpooled = 3 * measured(2, 8, 0, 16).seconds
    assert at_8 < unpooled


def test_a_pass_without_rows_takes_no_time_and_a_fraction_that_of_the_next_width() -> None:
    model = fit(grid())
    assert model.seconds(4, 0, 0, 0) == 0
    assert model.seconds(2.5, 4, 0, 80) == model.seconds(4, 4, 0, 80)
    assert model.seconds(99, 4, 0, 80) == model.seconds(8, 4, 0, 80)


def test_rows_beyond_the_last_knot_go_on_with_its_slope() -> None:
    model = fit(grid())
    at = [model.seconds(8, 0, rows, 0) for rows in (256, 320, 384)]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0])
    assert at[1] > at[0]


def test_residuals_follow_the_ninetieth_percentile_of_means_over_sixteen_passes() -> None:
    residuals = Residuals(quantile=0.9, prior=1.5)
    for _ in range(15):
        residuals.observe(4, 1.0, 1.0)
    assert residuals.factor(4) == 1.5
    residuals.observe(4, 0.0, 9.0)  # a pass without rows says nothing
    residuals.observe(4, 1.0, 1.0)
    assert residuals.factor(4) == pytest.approx(1.0)
    for block in range(1, 16):
        for index in range(16):
            residuals.observe(4, 2.0, 2.0 + block / 5 + (-0.5 if index % 2 else 0.5))
    # Means 1.0, 1.1, ... 2.5; 0.9 x 15 rounds to the 14th above the least.
    assert residuals.factor(4) == pytest.approx(2.4)
    assert residuals.factor(2) == pytest.approx(2.4)  # nothing seen of it: the latest of another width
    for _ in range(256):
        residuals.observe(4, 1.0, 0.5)
    assert residuals.factor(4) == pytest.approx(0.5)


def test_a_calibration_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    kept = Calibration("k" * 64, fit(grid()), 0.05, 0.2, tuple(grid()))
    path = tmp_path / "deep" / "times.json"
    save_calibration(kept, path)
    back = load_calibration(path, "k" * 64)
    assert back.measurements == kept.measurements
    assert back.step_time.coefficients == kept.step_time.coefficients
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(UsageError, match="another model"):
        load_calibration(path, "other")


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.update(format="x"),
        lambda report: report.pop("key"),
        lambda report: report.update(measurements=[]),
        lambda report: report.update(mape="nan"),
        lambda report: report["measurements"][0].update(seconds=-1),
        lambda report: report["measurements"][0].update(seconds=float("nan")),
        lambda report: report["measurements"][0].update(decode_tokens=1.5),
        lambda report: report["measurements"][0].update(prefill_tokens=-1),
        lambda report: report["measurements"][0].update(bits=99),
        lambda report: report.update(measurements="abc"),
    ],
)
def test_a_damaged_calibration_is_refused(tmp_path: Path, change: object) -> None:
    path = tmp_path / "times.json"
    save_calibration(Calibration("k", fit(grid()), 0.05, 0.2, tuple(grid())), path)
    report = json.loads(path.read_text())
    change(report)  # type: ignore[operator]
    path.write_text(json.dumps(report))
    with pytest.raises(CorruptFileError, match="no step times"):
        load_calibration(path)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_bytes(b"\xff[" * 100000)
    with pytest.raises(CorruptFileError):
        load_calibration(path)
    with pytest.raises(CorruptFileError):
        load_calibration(tmp_path / "missing.json")
