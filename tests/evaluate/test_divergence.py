"""Token figures against exact arithmetic (math.fsum over float64 of every term)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from taper.evaluate import divergence
from taper.evaluate.divergence import agreements, kl_divergences, log_likelihoods, log_normalisers

F32 = npt.NDArray[np.float32]


def exact_kl(reference: F32, logits: F32) -> float:
    """Sum of p (log p - log q), each term in long double, summed exactly."""
    p, q = reference.astype(np.longdouble), logits.astype(np.longdouble)
    log_p = p - p.max() - np.log(np.exp(p - p.max()).sum())
    log_q = q - q.max() - np.log(np.exp(q - q.max()).sum())
    return math.fsum(float(term) for term in np.exp(log_p) * (log_p - log_q))


def pair(spread: float, vocab: int = 5000, tokens: int = 3) -> tuple[F32, F32]:
    generator = np.random.default_rng(0)
    reference = (3 * generator.standard_normal((tokens, vocab)) + 12).astype(np.float32)
    return reference, (reference + spread * generator.standard_normal((tokens, vocab))).astype(np.float32)


@pytest.mark.parametrize("spread", [1.0, 0.03, 0.004, 0.0005])
def test_kl_is_right_down_to_a_ten_millionth(spread: float) -> None:
    reference, logits = pair(spread)
    found = kl_divergences(reference, log_normalisers(reference), logits, log_normalisers(logits))
    expected = [exact_kl(*rows) for rows in zip(reference, logits, strict=True)]
    # KL is about spread^2 / 2, 1.2e-7 at the least; float64 leaves 1e-13. In float32 the sum is off by 1e-6.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-14)
    assert min(expected) > 0


def test_kl_is_taken_from_the_reference() -> None:
    reference, logits = np.float32([[0, 0]]), np.float32([[0, np.log(3)]])
    found = kl_divergences(reference, log_normalisers(reference), logits, log_normalisers(logits))
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 log 2 + 1/2 log 2/3; the other direction is 0.1308.
    assert found[0] == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)


def test_rows_of_any_size_and_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, logits = pair(0.1, vocab=700, tokens=11)
    targets = np.arange(11, dtype=np.int32)
    whole = (
        log_normalisers(logits),
        kl_divergences(reference, log_normalisers(reference), logits, log_normalisers(logits)),
    )
    monkeypatch.setattr(divergence, "_CHUNK_ELEMENTS", 1500)
    norms = log_normalisers(logits)
    np.testing.assert_array_equal(norms, whole[0])
    np.testing.assert_array_equal(
        kl_divergences(reference, log_normalisers(reference), logits, norms), whole[1]
    )
    shifted = logits + np.float32(512)  # exp(524) is beyond float32 and, squared, beyond float64
    expected = log_likelihoods(logits, norms, targets)
    np.testing.assert_allclose(
        log_likelihoods(shifted, log_normalisers(shifted), targets), expected, atol=1e-4
    )
    assert np.exp(expected).max() < 1


def test_agreement_breaks_ties_downwards() -> None:
    reference = np.float32([[1, 1, 0], [0, 2, 1]])
    logits = np.float32([[5, 0, 0], [0, 1, 1]])
    assert agreements(reference, logits).tolist() == [True, True]
    assert agreements(reference, logits[:, ::-1].copy()).tolist() == [False, False]
