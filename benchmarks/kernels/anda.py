"""Rows into the Anda format and back: time beside a copy of the same array and beside the bound, alternating.

    python benchmarks/kernels/anda.py --threads 1

The array is larger than the caches. Outputs are warm: written before, so that no page faults count; `new`
makes its output each time. The bound is the bytes that are read and written, floats and planes, at the
bandwidth of the float32 copy. Medians and the fastest rounds, whose shares are printed: they are what the
memory allows where other programs run beside. A table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from taper import kernels
from taper.kernels.anda_rows import pack_rows, unpack_rows

SHAPE = (4096, 4096)
BITS = (4, 7, 11, 16)
ROUNDS = 7


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def cases(x: NDArray[np.float32]) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What is run, and the bytes that it must read and write."""
    runs: dict[str, Callable[[], object]] = {}
    moved: dict[str, int] = {}
    for given in (x, x.astype(np.float16)):
        name, target = given.dtype.name, np.empty_like(given)
        runs[f"{name} copy"] = lambda given=given, target=target: np.copyto(target, given)
        moved[f"{name} copy"] = 2 * given.nbytes
        for bits in BITS:
            planes = pack_rows(given, bits)
            runs[f"{name} pack {bits}"] = lambda given=given, bits=bits, planes=planes: pack_rows(
                given, bits, out=planes
            )
            runs[f"{name} unpack {bits}"] = lambda planes=planes, target=target: unpack_rows(
                planes, None, target.dtype, target
            )
            moved |= {f"{name} {what} {bits}": given.nbytes + planes.num_bytes for what in ("pack", "unpack")}
        runs[f"{name} pack 7 new"] = lambda given=given: pack_rows(given, 7)
        planes = pack_rows(given, 7)
        runs[f"{name} unpack 7 new"] = lambda planes=planes, target=target: unpack_rows(
            planes, None, target.dtype
        )
        moved |= {f"{name} {what} 7 new": given.nbytes + planes.num_bytes for what in ("pack", "unpack")}
    return runs, moved


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
    runs, moved = cases(x)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(options.rounds + 1):
        for name, run in runs.items():
            spent = seconds(run)
            if round_:
                times[name].append(spent)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    fastest = {name: min(spent) for name, spent in times.items()}
    bandwidth = moved["float32 copy"] / fastest["float32 copy"]
    rows = {
        name: {
            "median_ms": medians[name] * 1e3,
            "ms": spent * 1e3,
            "of_copy": fastest[f"{name.split()[0]} copy"] / spent,
            "of_bound": moved[name] / bandwidth / spent,
        }
        for name, spent in fastest.items()
    }
    print(f"{kernels.isa()}, {kernels.num_threads()} threads, {x.size / 1e6:.1f} M values, groups of 64")
    print(f"the copy moves {bandwidth / 1e9:.1f} GB/s")
    for name, row in rows.items():
        print(
            f"{name:22} {row['ms']:7.2f} ms (median {row['median_ms']:6.2f})  "
            f"{row['of_copy']:5.2f} of a copy  {row['of_bound']:5.2f} of the bound"
        )
    print(
        json.dumps(
            {
                "benchmark": "anda_rows",
                "isa": kernels.isa(),
                "threads": kernels.num_threads(),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
