"""What the planner's search for the largest set finds beyond its greedy set, and what that is worth.

    python benchmarks/dftsp/largest_set.py [--seeds 3] [--requests 600]

Simulated: a machine whose weights come from memory (15 ms a bit, 0.5 ms a row, passes of 130 ms), where 1 %
of a pass pays for a search; the traces are those of `taper bench --serve`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any
from unittest.mock import patch

from taper.planner import planner
from taper.planner.baselines import baselines
from taper.planner.selection import Choice, largest_set
from taper.planner.simulator import Machine, simulate
from taper.planner.traces import mixed_trace

WIDTHS = (2.0, 3.0, 4.0, 5.0, 6.0)
LOADS = (1.0, 1.5, 2.0, 3.0)


class Memory:
    """Seconds of a pass whose weights come from memory."""

    def seconds(self, bits: float, decode_tokens: int, prefill_tokens: int, context_tokens: int) -> float:
        """See `StepTime`."""
        rows = decode_tokens + prefill_tokens
        return 15e-3 * bits + 5e-4 * rows + 1e-7 * context_tokens if rows else 0.0


@contextmanager
def counted(found: Counter[str]) -> Iterator[None]:
    """Count the searches, those that were proven or found more, and their tests."""

    def search(*arguments: Any, **options: Any) -> Choice:
        choice = largest_set(*arguments, **options)
        found["searches"] += 1
        found["larger"] += len(choice.chosen) > len(options["incumbent"])
        found["proven"] += choice.is_optimal
        found["tests"] += choice.tests
        return choice

    with patch.object(planner, "largest_set", search):
        yield


def main() -> None:
    """Run each trace with the search and without."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=600)
    options = parser.parse_args()
    times, found = Memory(), Counter[str]()
    machine = Machine(times, WIDTHS, noise=0.1)
    burst = mixed_trace(times, WIDTHS, inf, 300, 99, has_terms=False)
    saturation = len(burst) / simulate(baselines(WIDTHS)["fcfs:2"](), burst, machine).seconds
    ratios = []
    for load in LOADS:
        for seed in range(1, options.seeds + 1):
            trace = mixed_trace(times, WIDTHS, load * saturation, options.requests, seed)
            with counted(found):
                searched = simulate(planner.Planner(), trace, machine).goodput
            with patch.object(planner, "_SEARCH_S", inf):
                greedy = simulate(planner.Planner(), trace, machine).goodput
            ratios.append(round(searched / greedy, 4))
            print(f"{load:g} x, seed {seed}: {searched:.2f} requests/s, greedy alone {greedy:.2f}")
    print(json.dumps({**found, "goodput_over_greedy": ratios}))


if __name__ == "__main__":
    main()
