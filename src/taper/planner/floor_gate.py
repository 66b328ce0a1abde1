"""Which quality floors are worth serving now: one request with a high floor slows the passes of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import inf

# Arrivals between two reviews: enough of each floor to count, few seconds under load.
_WINDOW = 128
# The gate opens after a window in which fewer than this share was lost, and after as many windows as it took
# before, doubled each time that opening was wrong.
_FEW_LOST, _LEAST_PAUSE, _MOST_PAUSE = 0.03, 2, 64


class FloorGate:
    """The highest floor that is served while others wait.

    Every 128 arrivals it reckons what would have been served without the requests of the highest floor that
    ran: at most those of lower floors that were served or lost while such a request ran, and at most what all
    took of the machine at the next lower width. Where that is more, the gate closes to that width.

    Attributes:
        bits: requests with a floor above it wait until nothing else is there; inf: open.
    """

    def __init__(self) -> None:
        self.bits = inf
        self._arrived: Counter[float] = Counter()
        self._served: Counter[float] = Counter()
        self._lost: Counter[float] = Counter()  # by the highest floor that ran, of requests with a lower one
        self._all_lost = 0
        self._pause, self._quiet = _LEAST_PAUSE, 0
        self._was_opened = False

    def arrived(self, floor: float, seconds: Callable[[float], float]) -> bool:
        """Count an arrival. Returns whether the gate has moved.

        Args:
            floor: least width of the request.
            seconds: of a typical pass by width.
        """
        self._arrived[floor] += 1
        if self._arrived.total() < _WINDOW:
            return False
        before = self.bits
        self._review(seconds)
        for counts in (self._arrived, self._served, self._lost):
            counts.clear()
        self._all_lost = 0
        return self.bits != before

    def served(self, floor: float) -> None:
        """Count an answer that ended."""
        self._served[floor] += 1

    def lost(self, floor: float, running: float) -> None:
        """Count a request that waited until it was too late, while passes had at least `running` bits."""
        if floor <= self.bits:
            self._all_lost += 1
        if floor < running:
            self._lost[running] += 1

    def _review(self, seconds: Callable[[float], float]) -> None:
        top = max(self._served, default=0.0)
        lower = max((floor for floor in self._arrived if floor < top), default=None)
        if lower is not None:
            whole = self._served.total()
            others = whole - self._served[top]
            without = min(others + self._lost[top], whole * seconds(top) / seconds(lower))
            if without > whole:
                self.bits = lower
                self._pause = min(2 * self._pause, _MOST_PAUSE) if self._was_opened else self._pause
                self._quiet, self._was_opened = 0, False
                return
        if self._was_opened:
            self._pause, self._was_opened = _LEAST_PAUSE, False
        higher = min((floor for floor in self._arrived if floor > self.bits), default=None)
        self._quiet += 1
        if higher is None:
            self.bits = inf
        elif self._all_lost <= _FEW_LOST * _WINDOW and self._quiet >= self._pause:
            self.bits, self._quiet, self._was_opened = higher, 0, True
