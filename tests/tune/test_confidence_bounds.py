"""The upper bound covers as often as it says, and documents count once."""

from __future__ import annotations

import numpy as np
import pytest

from taper.errors import UsageError
from taper.tune import bounds
from taper.tune.bounds import by_document, upper_bound


def test_bound_covers_the_mean_of_skewed_values(monkeypatch):
    monkeypatch.setattr(bounds, "NUM_RESAMPLES", 400)
    random = np.random.default_rng(1)
    trials = 400
    covered = sum(upper_bound(-random.exponential(1.0, 40)) > -1.0 for _ in range(trials))
    # 95 % +- 3 standard errors of 400 trials, and what 400 resamples and 40 values leave: 1 %.
    assert 0.95 - 3 * np.sqrt(0.95 * 0.05 / trials) - 0.01 < covered / trials < 0.95 + 0.033 + 0.01


def test_bound_is_near_students_for_symmetric_values():
    values = np.random.default_rng(2).standard_normal(200)
    student = values.mean() + 1.6525 * values.std(ddof=1) / np.sqrt(200)
    assert upper_bound(values) == pytest.approx(student, abs=0.02)


def test_bound_shifts_and_scales_with_the_values():
    values = np.random.default_rng(3).exponential(1.0, 50)
    assert upper_bound(3.0 * values - 5.0) == pytest.approx(3.0 * upper_bound(values) - 5.0)
    assert upper_bound(np.full(30, 0.25)) == 0.25


def test_one_document_apart_is_no_certainty():
    values = np.zeros(100)
    values[0] = 1.0
    assert upper_bound(values) > values.mean()


def test_few_documents_are_refused():
    with pytest.raises(UsageError, match="19 held-out documents are too few"):
        upper_bound(np.arange(19.0))


def test_prompts_of_a_document_count_once():
    np.testing.assert_array_equal(by_document(np.array([1.0, 3.0, 5.0]), (7, 7, 2)), [5.0, 2.0])
