"""Speed of the linear layers over planes, one call at a time, beside the read bandwidth of the same moment.

Cold rotates over copies of the matrix that fill more than any cache; warm repeats one matrix. One thread is
timed by its processor time, so that other work on a shared machine costs bandwidth and not samples; more
threads are timed by the clock and need an idle machine. A table on stderr for people, JSON on the last line
of stdout.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taper import kernels
from taper.formats.spec import ACTIVATION_BITS, LEAST_WIDE_BITS, NARROW_VALUE, WIDE_VALUE
from taper.quantize.codebook import ACTIVATION_BITS_OF

POOL_BYTES = 1_200_000_000  # more than twice the largest last-level cache of the processors at hand
READ_BYTES = 400_000_000  # of the pool, for one reading of the bandwidth: about 25 ms at 15 GB/s
WARM_SAMPLE_S = 0.05
Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Case:
    """What one row of the table measures."""

    isa: str
    out_features: int
    in_features: int
    bits: int
    tokens: int
    threads: int
    cold: bool
    wide: bool  # values and activations as wide as the quantiser makes them at this width

    @property
    def values(self) -> NDArray[Any]:
        """(2**bits,) evenly spaced values of the table."""
        wide = self.wide and self.bits >= LEAST_WIDE_BITS
        most, dtype = (WIDE_VALUE, np.int16) if wide else (NARROW_VALUE, np.int8)
        return np.linspace(-most, most, 2**self.bits).astype(dtype)

    @property
    def magnitude_bits(self) -> int:
        """Of the activations."""
        return ACTIVATION_BITS_OF[self.bits] if self.wide else ACTIVATION_BITS


@dataclass(frozen=True, slots=True)
class Result:
    """A case's medians over its samples; `read_gb_s` was taken before each of them."""

    case: Case
    samples: int
    call_us: float
    call_us_p95: float
    call_us_best: float
    gb_s: float
    read_gb_s: float
    bandwidth_frac: float
    gop_s: float


def clock_of(threads: int) -> Callable[[], float]:
    """The clock for work on so many threads, in seconds."""
    return time.thread_time if threads == 1 else time.perf_counter


class Pool:
    """Random bytes that serve as planes, and the reader of the bandwidth that they can have."""

    def __init__(self) -> None:
        self.bytes = np.random.default_rng(0).integers(0, 256, POOL_BYTES, dtype=np.uint8)

    def read_gb_s(self, threads: int) -> float:
        """Gigabytes per second that `threads` threads sum, each a part of its own."""
        words = self.bytes[: READ_BYTES // (8 * threads) * (8 * threads)].view(np.int64)
        clock = clock_of(threads)
        with ThreadPoolExecutor(threads) as executor:
            start_s = clock()
            list((map if threads == 1 else executor.map)(np.sum, np.split(words, threads)))
            return words.nbytes / (clock() - start_s) / 1e9

    def matrices(self, case: Case) -> list[kernels.Planes]:
        """As many matrices as the pool holds when cold, else one."""
        cols = kernels.padded_cols(case.in_features)
        plane_bytes = case.out_features * cols // 8
        num_planes = POOL_BYTES // plane_bytes if case.cold else case.bits
        planes = [
            self.bytes[i * plane_bytes : (i + 1) * plane_bytes].reshape(case.out_features, cols // 8)
            for i in range(num_planes)
        ]
        values = {case.bits: case.values}
        scales = np.ones((1, case.out_features), np.float32)
        return [
            kernels.Planes(
                planes[i : i + case.bits], values, {case.bits: 1.0}, scales, None, case.in_features
            )
            for i in range(0, num_planes - case.bits + 1, case.bits)
        ]


def activations(case: Case) -> kernels.Activations:
    """Random rows, quantised as a layer would."""
    x = np.random.default_rng(1).standard_normal((case.tokens, case.in_features)).astype(np.float32)
    cols = kernels.padded_cols(case.in_features)
    return kernels.prepare(x, cols=cols, signs=None, block=1, magnitude_bits=case.magnitude_bits)


def timed(case: Case, matrices: Sequence[kernels.Planes], x: kernels.Activations) -> float:
    """Seconds of one call: over one round of a cold pool, or over calls enough to time a warm matrix."""
    clock = clock_of(case.threads)
    count = 0
    start_s = clock()
    while count == 0 or (not case.cold and clock() - start_s < WARM_SAMPLE_S):
        for matrix in matrices:
            matrix.matmul(x, case.bits)
        count += len(matrices)
    return (clock() - start_s) / count


def measure(case: Case, pool: Pool, num_samples: int) -> Result:
    """Take the samples of a case, each after a fresh reading of the bandwidth."""
    matrices = pool.matrices(case)
    x = activations(case)
    times_s, read_gb_s = [], []
    kernels.set_num_threads(case.threads)
    with kernels.use_isa(case.isa):
        for matrix in matrices[:3]:
            matrix.matmul(x, case.bits)
        for _ in range(num_samples):
            read_gb_s.append(pool.read_gb_s(case.threads))
            times_s.append(timed(case, matrices, x))
    moved = matrices[0].bytes_read(case.bits)
    call_s = statistics.median(times_s)
    return Result(
        case,
        num_samples,
        call_us=call_s * 1e6,
        call_us_p95=float(np.percentile(times_s, 95)) * 1e6,
        call_us_best=min(times_s) * 1e6,
        gb_s=moved / call_s / 1e9,
        read_gb_s=statistics.median(read_gb_s),
        bandwidth_frac=statistics.median(
            moved / t / 1e9 / read for t, read in zip(times_s, read_gb_s, strict=True)
        ),
        gop_s=2 * case.out_features * case.in_features * case.tokens / call_s / 1e9,
    )


def shape(text: str) -> Shape:
    """Parse OUTxIN."""
    out_features, in_features = text.lower().split("x")
    return int(out_features), int(in_features)


def numbers(text: str) -> list[int]:
    """Parse a comma-separated list of numbers."""
    return [int(part) for part in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", nargs="+", default=[kernels.isa()], choices=kernels.available_isas())
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(5632, 2048), (2048, 5632)])
    parser.add_argument("--bits", type=numbers, default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--tokens", type=numbers, default=[1])
    parser.add_argument("--threads", type=numbers, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--cache", nargs="+", default=["cold", "warm"], choices=["cold", "warm"])
    parser.add_argument("--wide", action="store_true", help="wide values and activations from 6 bits on")
    parser.add_argument("--samples", type=int, default=7)
    return parser.parse_args()


def environment() -> dict[str, object]:
    """What a reader needs to judge the figures."""
    try:
        cpu = next(
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        cpu = platform.processor()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
    }


def print_row(result: Result) -> None:
    """One line of the table."""
    case = result.case
    print(
        f"{case.isa:9} {case.threads} thr {'cold' if case.cold else 'warm'} {case.tokens:4} tok "
        f"{case.out_features:5}x{case.in_features:<5} {case.bits} bits {result.call_us:9.1f} us "
        f"(best {result.call_us_best:9.1f}) "
        f"{result.gb_s:6.1f} GB/s of {result.read_gb_s:5.1f} = {result.bandwidth_frac:4.0%} "
        f"{result.gop_s:6.0f} GOP/s",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    """Run every combination of the options."""
    args = parse_arguments()
    pool = Pool()
    results = []
    for isa, cache, threads, tokens, (out_features, in_features), bits in itertools.product(
        args.isa, args.cache, args.threads, args.tokens, args.shapes, args.bits
    ):
        case = Case(isa, out_features, in_features, bits, tokens, threads, cache == "cold", args.wide)
        results.append(measure(case, pool, args.samples))
        print_row(results[-1])
    print(json.dumps({"environment": environment(), "results": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
