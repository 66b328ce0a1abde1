"""Likelihood, KL divergence and agreement of single tokens, in float64 from float32 logits.

A float32 sum over a vocabulary carries an error of some 1e-6 nats, a tenth of what 8 bits cost; in float64
the sum of p (log p - log q) is good to 1e-14. Rows are taken a few at a time, so that the wide temporaries
stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]

# 1 MiB of float64: with two more temporaries still within a 4 MiB share of a cache.
_CHUNK_ELEMENTS = 1 << 17


def log_normalisers(logits: F32) -> F64:
    """log of the sum of exp(logits), float64 (tokens,), of float32 (tokens, vocab)."""
    norms = np.empty(len(logits))
    for rows in _chunks(logits.shape):
        wide = logits[rows].astype(np.float64)
        top = wide.max(axis=1)
        wide -= top[:, None]
        norms[rows] = np.log(np.exp(wide, out=wide).sum(axis=1)) + top
    return norms


def log_likelihoods(logits: F32, norms: F64, targets: Int32) -> F64:
    """Natural log-probability of each position's target, float64 (tokens,).

    Args:
        logits: float32 (tokens, vocab).
        norms: of `log_normalisers`.
        targets: int32 (tokens,), the tokens that followed.
    """
    return logits[np.arange(len(targets)), targets].astype(np.float64) - norms


def kl_divergences(reference: F32, reference_norms: F64, logits: F32, norms: F64) -> F64:
    """KL(reference || model) of each position in nats, float64 (tokens,).

    Args:
        reference, logits: float32 (tokens, vocab).
        reference_norms, norms: of `log_normalisers`.
    """
    divergences = np.empty(len(logits))
    for rows in _chunks(logits.shape):
        log_p = reference[rows].astype(np.float64)
        log_p -= reference_norms[rows, None]
        log_q = logits[rows].astype(np.float64)
        log_q -= norms[rows, None]
        np.subtract(log_p, log_q, out=log_q)
        divergences[rows] = np.einsum("ij,ij->i", np.exp(log_p, out=log_p), log_q)
    return divergences


def agreements(reference: F32, logits: F32) -> npt.NDArray[np.bool_]:
    """Whether both have the same likeliest token (ties: the lowest id), bool (tokens,)."""
    same: npt.NDArray[np.bool_] = reference.argmax(axis=1) == logits.argmax(axis=1)
    return same


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, _CHUNK_ELEMENTS // shape[1])
    return (slice(begin, begin + rows) for begin in range(0, shape[0], rows))
