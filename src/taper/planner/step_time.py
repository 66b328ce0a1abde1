"""How long a pass of the model takes on this machine: fitted to measurements, monotone in every argument."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.planner.least_squares import non_negative_least_squares

F64 = NDArray[np.float64]

# Where the cost of a row bends. The kernels change from products of vectors to products of matrices between 9
# and 17 rows, so knots are close there; beyond the last knot the last slope goes on.
ROW_KNOTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
# Attention of a decoded token costs more an entry than that of a prompt (0.27 and 0.09 us of the embedded
# model on Zen 4), but a pass is described by the entries of all its rows. min(context, decoded rows x these)
# tells them apart and stays monotone.
CONTEXT_KNOTS = (256, 1024)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The time of one kind of pass.

    Attributes:
        bits: weights were read at.
        decode_tokens: rows of sequences that decode.
        prefill_tokens: rows of prompts.
        context_tokens: entries that the rows see, summed.
        seconds: median of the repetitions.
    """

    bits: float
    decode_tokens: int
    prefill_tokens: int
    context_tokens: int
    seconds: float


class _Curve:
    """One width: seconds by rows in a table, and what decoded tokens and entries add."""

    __slots__ = ("_context", "_rows", "_slope", "_table")

    def __init__(self, weights: Sequence[float]) -> None:
        base, *rest = weights
        increments, (row_s, *context) = rest[: len(ROW_KNOTS) - 1], rest[len(ROW_KNOTS) - 1 :]
        heights = np.concatenate(([base], base + np.cumsum(increments)))
        self._table: list[float] = np.interp(np.arange(ROW_KNOTS[-1] + 1), ROW_KNOTS, heights).tolist()
        self._slope = increments[-1] / (ROW_KNOTS[-1] - ROW_KNOTS[-2])
        self._rows, self._context = row_s, tuple(context)

    def seconds(self, decode: int, prefill: int, context: int) -> float:
        rows = decode + prefill
        last = ROW_KNOTS[-1]
        base = self._table[rows] if rows <= last else self._table[last] + (rows - last) * self._slope
        each, near, far = self._context
        return (
            base
            + self._rows * decode
            + each * context
            + near * min(context, CONTEXT_KNOTS[0] * decode)
            + far * min(context, CONTEXT_KNOTS[1] * decode)
        )


class FittedStepTime:
    """Seconds of a pass: for each width a rising broken line over the rows, plus terms for entries seen.

    T(p, b, P, ctx) = f_p(b + P) + r_p b + g_p ctx + sum over k of h_pk min(ctx, C_k b), all coefficients at
    least 0, and a width never takes less than a smaller one. The measurements decided the form: max(w + u b,
    v (b + P)), which is right while weights come from memory, misses the change of kernels between 9 and 17
    rows (docs/planner.md).

    Args:
        coefficients: by width, as `fit` finds them.

    Raises:
        UsageError: no width, or another number of coefficients, or one that is negative or not finite.
    """

    def __init__(self, coefficients: dict[float, tuple[float, ...]]) -> None:
        wanted = len(ROW_KNOTS) + 2 + len(CONTEXT_KNOTS)
        for bits, values in coefficients.items():
            if len(values) != wanted or not all(0 <= value < float("inf") for value in values):
                raise UsageError(
                    f"the step times at {bits:g} bits have coefficients {values}: not {wanted} from 0 on",
                    hint="measure again with taper plan --calibrate",
                )
        if not coefficients:
            raise UsageError("step times of no width", hint="measure them with taper plan --calibrate")
        self.coefficients = dict(sorted(coefficients.items()))
        self._widths = tuple(self.coefficients)
        curves = [_Curve(values) for values in self.coefficients.values()]
        self._curves = [tuple(curves[: index + 1]) for index in range(len(curves))]

    def seconds(self, bits: float, decode_tokens: int, prefill_tokens: int, context_tokens: int) -> float:
        """Seconds of a pass; between two widths that of the larger. 0 for a pass without rows.

        Args:
            bits: of the pass; beyond the largest width that was measured, that width's time.
            decode_tokens: rows of sequences that decode.
            prefill_tokens: rows of prompts.
            context_tokens: entries that the rows see, summed.
        """
        if decode_tokens + prefill_tokens == 0:
            return 0.0
        index = min(bisect_left(self._widths, bits), len(self._widths) - 1)
        return max(
            curve.seconds(decode_tokens, prefill_tokens, context_tokens) for curve in self._curves[index]
        )


class StepSeconds(Protocol):
    """Anything that knows the time of a pass (`taper.engine.schedule.StepTime`)."""

    def seconds(self, bits: float, decode_tokens: int, prefill_tokens: int, context_tokens: int) -> float:
        """Seconds of a pass."""
        ...


def fit(measurements: Sequence[Measurement]) -> FittedStepTime:
    """Fit each width by non-negative least squares of the relative error.

    Raises:
        UsageError: when there is nothing to fit.
    """
    coefficients = {}
    pooled = _rising_with_bits(measurements)
    for bits in sorted({one.bits for one in pooled}):
        rows = [one for one in pooled if one.bits == bits]
        seconds = np.array([one.seconds for one in rows])
        matrix = np.array([_features(one) for one in rows])
        # Divided by the measured time: an error of 10 % counts alike in a short pass and in a long one.
        solution = non_negative_least_squares(matrix / seconds[:, None], np.ones(len(rows)))
        coefficients[bits] = tuple(float(value) for value in solution)
    return FittedStepTime(coefficients)


def relative_errors(model: StepSeconds, measurements: Sequence[Measurement]) -> F64:
    """|predicted - measured| / measured, (measurements,)."""
    found = [
        model.seconds(one.bits, one.decode_tokens, one.prefill_tokens, one.context_tokens) / one.seconds
        for one in measurements
    ]
    errors: F64 = np.abs(np.array(found, np.float64) - 1)
    return errors


def _rising_with_bits(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Isotonic regression over the widths of each kind of pass: where a smaller width was measured slower,
    both get their geometric mean, or the slower one alone would count at every larger width."""
    kinds: dict[tuple[int, int, int], list[Measurement]] = {}
    for one in measurements:
        kinds.setdefault((one.decode_tokens, one.prefill_tokens, one.context_tokens), []).append(one)
    return [
        pooled for group in kinds.values() for pooled in _isotonic(sorted(group, key=lambda one: one.bits))
    ]


def _isotonic(rising: Sequence[Measurement]) -> list[Measurement]:
    pools: list[tuple[float, int]] = []
    for one in rising:
        pools.append((float(np.log(one.seconds)), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (high, m), (low, n) = pools[-2:]
            pools[-2:] = [((high * m + low * n) / (m + n), m + n)]
    values = [float(np.exp(value)) for value, count in pools for _ in range(count)]
    return [replace(one, seconds=value) for one, value in zip(rising, values, strict=True)]


def _features(one: Measurement) -> list[float]:
    rows = one.decode_tokens + one.prefill_tokens
    steps = [
        (rows - low) / (high - low) if high == ROW_KNOTS[-1] else min(1.0, (rows - low) / (high - low))
        for low, high in pairwise(ROW_KNOTS)
    ]
    capped = [float(min(one.context_tokens, knot * one.decode_tokens)) for knot in CONTEXT_KNOTS]
    return [1.0, *(max(0.0, step) for step in steps), one.decode_tokens, one.context_tokens, *capped]


# A promise is about the sum of many passes: percentiles are taken of means over 16 passes in a row, of the
# latest 16 such means. Single passes that vary by 10 % would cost 13 % of the machine, their means cost 3 %.
_BLOCK, _BLOCKS = 16, 16


class Residuals:
    """Measured over predicted time of the latest passes by width, for promises that hold on a busy machine.

    Before 16 passes of a width were seen, the latest factor of another width counts, or `prior`.

    Args:
        quantile: 0..1, of the mean ratios of 16 passes; 0.9 for promises.
        prior: factor before anything was seen.
    """

    def __init__(self, quantile: float = 0.9, prior: float = 1.1) -> None:
        self._quantile, self._latest = quantile, prior
        self._sums: dict[float, tuple[float, int]] = {}
        self._means: dict[float, deque[float]] = {}
        self._factors: dict[float, float] = {}

    def observe(self, bits: float, predicted_s: float, seconds: float) -> None:
        """Take in the time of a pass; nothing for a pass that was predicted to take none."""
        if predicted_s <= 0:
            return
        total, count = self._sums.get(bits, (0.0, 0))
        total, count = total + seconds / predicted_s, count + 1
        if count == _BLOCK:
            means = self._means.setdefault(bits, deque(maxlen=_BLOCKS))
            means.append(total / count)
            ordered = sorted(means)
            self._latest = self._factors[bits] = ordered[int(self._quantile * (len(ordered) - 1) + 0.5)]
            total, count = 0.0, 0
        self._sums[bits] = (total, count)

    def factor(self, bits: float) -> float:
        """What to multiply a predicted time by."""
        return self._factors.get(bits, self._latest)
