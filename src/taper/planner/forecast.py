"""What the planner expects: how long passes and answers will be, and what of the load is worth serving."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from taper.engine.schedule import StepTime
from taper.planner.step_time import Residuals

# Costs count bounds of answers, which end earlier: filling a window to 1.25 times its length served 2 to 4 %
# more than to once where weights come from memory, and as many on the embedded model.
_FILL = 1.25
# Steps of the bounds on an answer's length, and answers after which they are looked up anew: a search for
# every member of every plan took a quarter of the planner's time.
_SHARES, _FRESH_ANSWERS = 64, 16


class PassTimes:
    """Seconds of passes that promises count on: fitted times the correction.

    Entries that a row sees are rounded up to a multiple of 64, so that a table of a few hundred numbers does.
    """

    def __init__(self) -> None:
        self.residuals = Residuals()
        self._tables: dict[tuple[float, int, int], list[float]] = {}
        self._prompt: dict[float, float] = {}
        self._model: StepTime | None = None

    def use(self, model: StepTime) -> None:
        """Take the times of a model."""
        if self._model is not model:
            self._model = model
            self._tables.clear()
            self._prompt.clear()

    def decode(self, bits: float, rows: int, entries: int, prompt_rows: int = 0) -> float:
        """A pass that decodes `rows` tokens which see `entries` each, beside `prompt_rows` of prompts."""
        return self.by_rows(bits, rows, entries, prompt_rows)[rows] * self.residuals.factor(bits)

    def prompt_token(self, bits: float) -> float:
        """What a prompt token adds to a pass that decodes 16 tokens and reads 64 of prompts."""
        seconds = self._prompt.get(bits)
        if seconds is None:
            seconds = (self.by_rows(bits, 16, 64, 64)[16] - self.by_rows(bits, 16, 64)[16]) / 64
            self._prompt[bits] = seconds
        return seconds * self.residuals.factor(bits)

    def by_rows(self, bits: float, rows: int, entries: int, prompt_rows: int = 0) -> list[float]:
        """Fitted seconds of passes by the tokens that they decode, 0 to at least `rows`, not corrected."""
        bucket = entries >> 6
        table = self._tables.get((bits, bucket, prompt_rows))
        if table is None:
            table = self._tables[bits, bucket, prompt_rows] = []
        while len(table) <= rows:
            assert self._model is not None
            context = (len(table) + prompt_rows) * ((bucket + 1) << 6)
            table.append(self._model.seconds(bits, len(table), prompt_rows, context))
        return table


class OutputLengths:
    """Bounds on how much of `max_tokens` an answer uses, from the answers so far.

    The bound is a quantile of the used share among answers that used more than this one has by now, rounded
    up to 64ths; it grows with the answer and never exceeds max_tokens. With fewer than 50 such answers it is
    max_tokens. New answers count from every 16th on.

    Args:
        quantile: 0..1 of the answers that the bound holds for.
    """

    def __init__(self, quantile: float = 0.99) -> None:
        self._quantile = quantile
        self._latest: deque[float] = deque()
        self._shares: list[float] = []
        self._fresh = 0
        # By the 64ths that were used so far: the share that is used in the end, at most.
        self._bounds = [1.0] * (_SHARES + 1)

    def observe(self, tokens: int, max_tokens: int) -> None:
        """Take in an answer that ended."""
        share = tokens / max_tokens
        self._latest.append(share)
        insort(self._shares, share)
        if len(self._latest) > 512:
            del self._shares[bisect_left(self._shares, self._latest.popleft())]
        self._fresh += 1
        if self._fresh >= _FRESH_ANSWERS:
            self._fresh = 0
            self._bounds = [self._share(used / _SHARES) for used in range(_SHARES + 1)]

    def bound(self, generated: int, max_tokens: int) -> int:
        """Tokens that an answer has in the end, at most, after `generated` of them."""
        if generated >= max_tokens:
            return max_tokens
        share = self._bounds[-(-(generated + 1) * _SHARES // max_tokens)]
        most = int(share * max_tokens) + 1
        if most <= generated:
            most = generated + 1
        return most if most < max_tokens else max_tokens

    def _share(self, used: float) -> float:
        """The quantile among answers that used at least so much."""
        first = bisect_left(self._shares, used)
        count = len(self._shares) - first
        return 1.0 if count < 50 else self._shares[first + int(self._quantile * (count - 1))]


class Demand(NamedTuple):
    """A request as the forecast sees it: least width that its floor allows, arrival, and the machine's
    seconds that it takes at that width."""

    bits: float
    arrival_s: float
    cost_s: float


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """What is worth serving while more comes than can be served.

    Attributes:
        bits: requests with a floor above it wait until there is room: one of them would slow all others.
        price_s: seconds of the machine of the first request that there was no time for; inf: no overload.
    """

    bits: float = inf
    price_s: float = inf

    @property
    def is_overload(self) -> bool:
        """Whether more comes than can be served."""
        return self.price_s < inf


def operating_point(demands: Sequence[Demand], pass_s: Mapping[float, float]) -> OperatingPoint:
    """The width and price at which the requests of a window could have been served most.

    For each width a knapsack of unit profits: the cheapest requests whose floor it meets, until their seconds
    fill the window. The first that does not fit gives the price.

    Args:
        demands: in order of arrival.
        pass_s: seconds of a typical pass by width, widths rising: what a request costs at another width.
    """
    limit = _FILL * (demands[-1].arrival_s - demands[0].arrival_s)
    # In passes, which are as many at every width.
    by_cost = sorted([(one.cost_s / pass_s[one.bits], one.bits) for one in demands])
    best, most = OperatingPoint(), -1
    for bits, seconds in pass_s.items():
        costs = [passes * seconds for passes, floor in by_cost if floor <= bits]
        total, count = 0.0, 0
        for cost in costs:
            total += cost
            if total > limit:
                break
            count += 1
        price = costs[count] if count < len(costs) else inf
        # At a tie the wider one only where nothing is turned away.
        if count > most or (count == most and price == inf):
            best, most = OperatingPoint(bits, price), count
    return best
