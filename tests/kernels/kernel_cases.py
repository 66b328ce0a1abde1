"""Inputs and comparisons that the kernel tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from taper import kernels


def _runs_here(isa: str) -> bool:
    try:
        with kernels.use_isa(isa):
            return True
    except ValueError:
        return False


# amx_emulated is never chosen by itself: the AMX kernel with its tile instructions in plain code.
ISAS = [*kernels.available_isas(), *filter(_runs_here, ["amx_emulated"])]

# One lane group and its neighbours, lengths that are no multiple of 64, and the models' real widths.
WIDTHS = (1, 3, 15, 16, 17, 40, 64, 172, 192, 448, 576, 768, 2048, 5632)
SPECIALS = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 1.1754944e-38, 3.4e38, -3.4e38, 1e20, 88.5, -87.1],
    np.float32,
)

seeds = st.integers(0, 2**32 - 1)
widths = st.sampled_from(WIDTHS)
thread_counts = st.integers(1, 3)


def rows(seed: int, tokens: int, width: int, spread: float = 1.0) -> NDArray[np.float32]:
    """Gaussian rows (tokens, width)."""
    return (np.random.default_rng(seed).standard_normal((tokens, width)) * spread).astype(np.float32)


def rows_with_specials(seed: int, tokens: int, width: int) -> NDArray[np.float32]:
    """Gaussian rows in which about one row in two has an infinity, a NaN, a subnormal or a huge value."""
    rng = np.random.default_rng(seed)
    x = rows(seed, tokens, width, spread=10.0 ** rng.integers(-3, 4))
    for t in range(tokens):
        for _ in range(rng.integers(0, 3)):
            x[t, rng.integers(width)] = rng.choice(SPECIALS)
    return x


def signs(seed: int, width: int) -> NDArray[np.float32]:
    return np.where(np.random.default_rng(seed).random(width) < 0.5, -1, 1).astype(np.float32)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = kernels.num_threads()
    kernels.set_num_threads(count)
    try:
        yield
    finally:
        kernels.set_num_threads(before)


def assert_same_bits(got: NDArray[Any], expected: NDArray[Any]) -> None:
    """Equal bytes; a NaN equals any NaN, whose payload docs/numerics.md leaves open."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.dtype.kind == "f":
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        nan = np.isnan(got)
        got, expected = np.where(nan, 0, got), np.where(nan, 0, expected)
        np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))
    np.testing.assert_array_equal(got, expected)


def assert_on_every_isa(run: Callable[[], NDArray[Any]], expected: NDArray[Any]) -> None:
    for isa in ISAS:
        with kernels.use_isa(isa):
            assert_same_bits(run(), expected)
