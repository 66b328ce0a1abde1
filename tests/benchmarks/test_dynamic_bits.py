"""The pure parts of the measurement of widths that follow each step."""

from __future__ import annotations

import dynamic_bits
import numpy as np
import pytest


def test_bits_go_to_the_steps_where_they_save_most() -> None:
    """Two units of 1/2 each, 2 or 4 bits: a budget of 2.5 raises one unit in one of two steps."""
    costs = np.array([[[5.0, 1.0], [3.0, 1.0]], [[2.0, 1.0], [9.0, 1.0]]])
    bits = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert dynamic_bits.choose(costs, bits, 2.5).tolist() == [[0, 0], [0, 1]]
    assert dynamic_bits.choose(costs, bits, 3.0).tolist() == [[1, 0], [0, 1]]
    assert dynamic_bits.choose(costs, bits, 4.0).tolist() == [[1, 1], [1, 1]]


def test_a_budget_is_never_exceeded() -> None:
    generator = np.random.default_rng(1)
    costs = np.sort(generator.exponential(size=(40, 5, 4)), axis=2)[:, :, ::-1]
    bits = generator.uniform(0.1, 0.2, (5, 1)) * np.arange(2, 6)
    for share in (0.1, 0.5, 0.9):
        budget = float(bits[:, 0].sum() + share * (bits[:, -1] - bits[:, 0]).sum())
        picked = dynamic_bits.choose(costs, bits, budget)
        spent = bits[np.arange(5), picked].sum(axis=1).mean()
        assert budget - 0.02 < spent <= budget


def seen(errors: list[float], kl: list[float], entropy: list[float]) -> dynamic_bits.Observed:
    """One matrix at one width."""
    return dynamic_bits.Observed(np.array(errors, np.float32)[:, None, None], np.array(kl), np.array(entropy))


def test_estimates_look_where_they_say() -> None:
    calibration = [(np.array([7, 8, 7], np.int32), seen([1, 2, 3], [1, 1, 1], [0, 1, 2]))]
    text = [
        (np.array([8, 7], np.int32), seen([4, 6], [1, 1], [0, 1])),
        (np.array([9], np.int32), seen([8], [1], [0])),
    ]
    made = dynamic_bits.Estimates(calibration, text, 10)
    assert made.this_step().ravel() == pytest.approx([2, 3, 4])
    assert made.last_step().ravel() == pytest.approx([1, 2, 1])  # not across blocks
    prior = dynamic_bits.TABLE_PRIOR
    assert made.token().ravel() == pytest.approx([(prior + 1) / (prior + 1), (prior + 2) / (prior + 2), 1])


def test_entropy_is_the_mean_loss_after_an_entropy_like_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_bits, "ENTROPY_BINS", 2)
    calibration = [(np.zeros(5, np.int32), seen([1] * 5, [9, 1, 1, 3, 3], [0.1, 0.2, 2, 3, 0]))]
    text = [(np.zeros(3, np.int32), seen([1] * 3, [0] * 3, [2.5, 0.1, 5]))]
    factors = dynamic_bits.Estimates(calibration, text, 1).entropy().ravel()
    assert factors == pytest.approx([1, 1.5, 0.5])
