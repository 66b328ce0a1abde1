"""How far a quantisation is, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from taper.formats.spec import MatrixSpec


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is.

    Attributes:
        stage: `generate`, `calibrate`, `solve`, `write` or `sensitivity`, which counts from 0 to 1 anew.
        name: the matrix or layer in work.
        done_frac: finished share of all the work, 0..1.
        eta_s: seconds that remain at the present pace; None while there is no pace yet.
    """

    stage: str
    name: str
    done_frac: float
    eta_s: float | None


class Meter:
    """Work done, in products of the solver, and the time that is left at the present pace."""

    def __init__(self, report: Callable[[Progress], None] | None, specs: Sequence[MatrixSpec]) -> None:
        self._report = report
        self._total = float(sum(spec.out_features * row_work(spec) for spec in specs))
        self._done = 0.0
        self._found = 0.0
        self._begin = time.perf_counter()

    def find(self, spec: MatrixSpec) -> None:
        """Count a matrix that an earlier run finished: it is done, but says nothing about the pace."""
        self._found += spec.out_features * row_work(spec)

    def advance(self, stage: str, name: str, work: float) -> None:
        """Count work and report."""
        self._done += work
        if self._report is None:
            return
        elapsed = time.perf_counter() - self._begin
        remaining = self._total - self._found - self._done
        eta_s = elapsed * remaining / self._done if self._done else None
        self._report(Progress(stage, name, (self._found + self._done) / self._total, eta_s))

    def measure(self, name: str, done_frac: float, left_s: float | None) -> None:
        """Report the sensitivity's share: its pace says nothing about the solver's."""
        if self._report is not None:
            self._report(Progress("sensitivity", name, done_frac, left_s))


def row_work(spec: MatrixSpec) -> int:
    return spec.in_features**2
