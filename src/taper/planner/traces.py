"""Traces of requests for load tests: seeded, kept as JSON, run again as they were."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from taper.engine.schedule import StepTime, Terms
from taper.errors import CorruptFileError, UsageError

FORMAT = "taper-trace-1"
Arrivals = Literal["poisson", "bursty"]
# Bursts: the rate alternates between these multiples of its mean, in phases of so many gaps on average.
_QUIET, _BUSY, _PHASE_GAPS = 0.4, 1.6, 20
MAX_TOKENS = 400 + 256  # of the longest request of `mixed_trace`
_MAX_REQUESTS = 1_000_000
_HINT = "make one: taper bench --serve --save-trace FILE"


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One arrival of a trace.

    Attributes:
        arrival_s: seconds from the begin.
        prompt_tokens: at least 1.
        output_tokens: that it really generates, 1..max_tokens; the scheduler does not know it.
        max_tokens: that it may generate.
        terms: deadline from arrival, floor, what to do on a miss.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    terms: Terms


def mixed_trace(
    times: StepTime,
    widths: Sequence[float],
    rate: float,
    count: int,
    seed: int,
    arrivals: Arrivals = "poisson",
    has_terms: bool = True,
) -> list[TracedRequest]:
    """Requests of mixed lengths, deadlines and floors.

    Prompts and limits are log-normal (median 55; 8 to 400 and 8 to 256 tokens), answers 30 to 100 % of the
    limit. Deadlines are 4, 8, 20 or 60 times what one takes alone at the largest width (20, 30, 30, 20 % of
    them), floors none, 3, 4 or the largest width (30, 25, 25, 20 %).

    Args:
        times: of the machine, for the deadlines.
        widths: of the model, rising.
        rate: requests a second on average; inf: all at once.
        count: of requests.
        seed: of everything; the lengths and terms of a seed are the same at every rate.
        arrivals: independent, or in bursts of 1.6 times the rate between pauses of 0.4 times.
        has_terms: whether there are deadlines and floors.
    """
    generator = np.random.default_rng(seed)
    found = []
    for at in _arrivals(rate, count, seed, arrivals).tolist():
        prompt = int(np.clip(generator.lognormal(4, 0.7), 8, 400))
        limit = int(np.clip(generator.lognormal(4, 0.7), 8, 256))
        output = max(1, int(limit * min(1, generator.uniform(0.3, 1.3))))
        alone = times.seconds(widths[-1], 0, prompt, prompt * prompt // 2)
        alone += limit * times.seconds(widths[-1], 1, 0, prompt)
        slack = generator.choice([4, 8, 20, 60], p=[0.2, 0.3, 0.3, 0.2])
        floor = float(generator.choice([0, 3, 4, widths[-1]], p=[0.3, 0.25, 0.25, 0.2]))
        terms = Terms(deadline_s=float(alone * slack), min_bits=floor) if has_terms else Terms()
        found.append(TracedRequest(at, prompt, output, limit, terms))
    return found


def _arrivals(rate: float, count: int, seed: int, arrivals: Arrivals) -> NDArray[np.float64]:
    """Seconds, rising."""
    generator = np.random.default_rng(seed + 1000)
    gaps = generator.exponential(1.0, count)
    if arrivals == "bursty":
        # A gap is as long as its phase makes it; phases are drawn in gaps, so that the mean rate stays.
        phases = generator.geometric(1 / _PHASE_GAPS, count)
        factors = np.repeat(np.where(np.arange(count) % 2, _BUSY, _QUIET), phases)[:count]
        gaps /= factors
        gaps *= count / gaps.sum()
    found: NDArray[np.float64] = np.cumsum(gaps) / rate
    return found


def save_trace(trace: Sequence[TracedRequest], path: Path) -> None:
    """Write a trace as JSON; a deadline of none is null."""
    rows = [asdict(one) for one in trace]
    for row in rows:
        row["terms"] = {name: None if value == inf else value for name, value in row["terms"].items()}
    path.write_text(json.dumps({"format": FORMAT, "requests": rows}, indent=1) + "\n", encoding="utf-8")


def load_trace(path: Path) -> list[TracedRequest]:
    """Read a trace.

    Raises:
        UsageError: there is no such file.
        CorruptFileError: it is no trace, or a value is outside its range.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or len(data["requests"]) > _MAX_REQUESTS:
            raise ValueError(f"the format is not {FORMAT}")
        trace = [_request(row) for row in data["requests"]]
    except FileNotFoundError as error:
        raise UsageError(f"there is no trace {path}", _HINT) from error
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path} is no trace: {error}", _HINT) from error
    return sorted(trace, key=lambda one: one.arrival_s)


def _request(row: dict[str, Any]) -> TracedRequest:
    terms: dict[str, Any] = {n: inf if value is None else value for n, value in row["terms"].items()}
    one = TracedRequest(**{**row, "terms": Terms(**terms)})
    good = (
        0 <= one.arrival_s < inf
        and 1 <= one.prompt_tokens <= 1 << 20
        and 1 <= one.output_tokens <= one.max_tokens <= 1 << 20
        and one.terms.deadline_s > 0
        and one.terms.on_miss in ("lower_bits", "truncate", "reject")
    )
    if not good:
        raise ValueError(f"a request of {row}")
    return one
