"""What the planner expects: how long passes and answers will be, and what of the load is worth serving."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from taper.engine.schedule import StepTime
from taper.planner.step_time import Residuals

# Costs count bounds of answers, which end earlier: filling a window to 1.25 times its length served 2 to 4 %
# more than to once where weights come from memory, and as many on the embedded model.
_FILL = 1.25


class PassTimes:
    """Seconds of passes that promises count on: fitted times the correction.

    Entries that a row sees are rounded up to a multiple of 64, so that a table of a few hundred numbers does.
    """

    def __init__(self) -> None:
        self.residuals = Residuals()
        self._fitted: dict[tuple[float, int, int, int], float] = {}
        self._prompt: dict[float, float] = {}
        self._model: StepTime | None = None

    def use(self, model: StepTime) -> None:
        """Take the times of a model."""
        if self._model is not model:
            self._model = model
            self._fitted.clear()
            self._prompt.clear()

    def decode(self, bits: float, rows: int, entries: int, prompt_rows: int = 0) -> float:
        """A pass that decodes `rows` tokens which see `entries` each, beside `prompt_rows` of prompts."""
        return self._seconds(bits, rows, entries, prompt_rows) * self.residuals.factor(bits)

    def prompt_token(self, bits: float) -> float:
        """What a prompt token adds to a pass that decodes 16 tokens and reads 64 of prompts."""
        seconds = self._prompt.get(bits)
        if seconds is None:
            seconds = (self._seconds(bits, 16, 64, 64) - self._seconds(bits, 16, 64, 0)) / 64
            self._prompt[bits] = seconds
        return seconds * self.residuals.factor(bits)

    def _seconds(self, bits: float, rows: int, entries: int, prompt_rows: int) -> float:
        key = (bits, rows, entries >> 6, prompt_rows)
        seconds = self._fitted.get(key)
        if seconds is None:
            assert self._model is not None
            context = (rows + prompt_rows) * (((entries >> 6) + 1) << 6)
            seconds = self._fitted[key] = self._model.seconds(bits, rows, prompt_rows, context)
        return seconds


class OutputLengths:
    """Bounds on how much of `max_tokens` an answer uses, from the answers so far.

    The bound is a quantile of the used share among answers that used more than this one has by now; it grows
    with the answer and never exceeds max_tokens. With fewer than 50 such answers it is max_tokens.

    Args:
        quantile: 0..1 of the answers that the bound holds for.
    """

    def __init__(self, quantile: float = 0.99) -> None:
        self._quantile = quantile
        self._latest: deque[float] = deque()
        self._shares: list[float] = []

    def observe(self, tokens: int, max_tokens: int) -> None:
        """Take in an answer that ended."""
        share = tokens / max_tokens
        self._latest.append(share)
        insort(self._shares, share)
        if len(self._latest) > 512:
            del self._shares[bisect_left(self._shares, self._latest.popleft())]

    def bound(self, generated: int, max_tokens: int) -> int:
        """Tokens that an answer has in the end, at most, after `generated` of them."""
        shares = self._shares
        first = bisect_left(shares, (generated + 1) / max_tokens)
        if len(shares) - first < 50:
            return max_tokens
        share = shares[first + int(self._quantile * (len(shares) - first - 1))]
        return min(max_tokens, max(generated + 1, int(share * max_tokens) + 1))


@dataclass(frozen=True, slots=True)
class Demand:
    """A request as the forecast sees it: least width that its floor allows, arrival, and by width the
    machine's seconds that it takes."""

    bits: float
    arrival_s: float
    costs: dict[float, float]


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


def operating_point(demands: Sequence[Demand], widths: Sequence[float]) -> OperatingPoint:
    """The width and price at which the requests of a window could have been served most.

    For each width a knapsack of unit profits: the cheapest requests whose floor it meets, until their seconds
    fill the window. The first that does not fit gives the price.

    Args:
        demands: in order of arrival.
        widths: rising.
    """
    window = demands[-1].arrival_s - demands[0].arrival_s
    best, most = OperatingPoint(), -1
    for bits in widths:
        costs = sorted(one.costs[bits] for one in demands if one.bits <= bits)
        total, count = 0.0, 0
        for cost in costs:
            total += cost
            if total > _FILL * window:
                break
            count += 1
        price = costs[count] if count < len(costs) else inf
        # At a tie the wider one only where nothing is turned away.
        if count > most or (count == most and price == inf):
            best, most = OperatingPoint(bits, price), count
    return best
