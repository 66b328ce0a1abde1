"""Rows into the Anda format and back: GB/s of floats beside a copy of the same array, alternating.

    python benchmarks/kernels/anda.py --threads 1

The array is larger than the caches. `pack` counts the floats read, `unpack` the floats written, `copy` the
floats copied, which reads and writes as much. Medians; a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from taper import kernels
from taper.kernels.anda_rows import pack_rows, unpack_rows

SHAPE = (4096, 4096)
BITS = (4, 7, 11)
ROUNDS = 7


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    """Measure, print, and end with a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    if options.threads is not None:
        kernels.set_num_threads(options.threads)
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    target = np.empty_like(x)
    runs: dict[str, Callable[[], object]] = {"copy": lambda: np.copyto(target, x)}
    for bits in BITS:
        planes = pack_rows(x, bits)
        runs[f"pack {bits}"] = lambda bits=bits: pack_rows(x, bits)
        runs[f"unpack {bits}"] = lambda planes=planes: unpack_rows(planes)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(options.rounds + 1):
        for name, run in runs.items():
            spent = seconds(run)
            if round_:
                times[name].append(spent)
    rows = {name: x.nbytes / statistics.median(spent) / 1e9 for name, spent in times.items()}
    print(
        f"{kernels.isa()}, {kernels.num_threads()} threads, {x.nbytes / 1e6:.0f} MB of float32, groups of 64"
    )
    for name, speed in rows.items():
        print(f"{name:10} {speed:6.2f} GB/s  {speed / rows['copy']:6.2f} of the copy")
    print(
        json.dumps(
            {
                "benchmark": "anda_rows",
                "isa": kernels.isa(),
                "threads": kernels.num_threads(),
                "gb_per_s": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
