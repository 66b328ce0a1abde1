"""What a switch of width costs, and whether a million of them change anything.

    python benchmarks/precision/switches.py [FILE] [--switches 1000000]

Cost: decode steps at one position and random widths out of two; the time of a step at a width after a step at
the other width, less that of a step after a step at the same width. The steps are whole decode steps (native
call, KV write, logits), so the cost holds all that a switch brings: the choice of planes and kernels, and
planes that have left the processor's cache meanwhile.

A million switches: decode steps, each at another width than the one before, over sequences of `--length`
tokens in one cache that is truncated between them. Resident memory is read after a warm-up and at the end;
the digest of each sequence's logits is kept, and some sequences, the first and the last among them, are run
again by a fresh decoder with a fresh cache. Rows for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from taper.engine import embedded_model
from taper.formats.container import TaperFile
from taper.kernels import set_num_threads
from taper.models import Decoder

LIMIT_US = 20.0
POSITION = 64
NUM_REPLAYS = 32
NUM_BOOTSTRAPS = 400


def open_decoder(path: Path) -> Decoder:
    """A decoder of its own."""
    return Decoder.from_taper(TaperFile.open(path))


def switch_cost(decoder: Decoder, pair: tuple[int, int], num_steps: int, seed: int) -> list[dict[str, Any]]:
    """A row for each width of a pair; times in microseconds."""
    generator = np.random.default_rng(seed)
    cache = decoder.new_cache(POSITION + 1)
    decoder.forward(
        generator.integers(0, decoder.config.vocab_size, POSITION).astype(np.int32), cache, pair[0]
    )
    token = np.array([1], np.int32)
    widths = [pair[choice] for choice in generator.integers(0, 2, num_steps)]
    times: dict[tuple[int, int], list[int]] = {}
    last = pair[0]
    for bits in widths:
        cache.truncate(POSITION)
        began_ns = time.perf_counter_ns()
        decoder.forward(token, cache, bits)
        times.setdefault((last, bits), []).append(time.perf_counter_ns() - began_ns)
        last = bits
    rows = []
    for to, other in (pair, pair[::-1]):
        stays, switches = (np.array(times[before, to]) * 1e-3 for before in (to, other))
        low, high = interval(stays, switches, generator)
        rows.append(
            {
                "from_bits": other,
                "to_bits": to,
                "step_us": float(np.median(stays)),
                "cost_us": float(np.median(switches) - np.median(stays)),
                "cost_95_us": [low, high],
                "steps": [len(stays), len(switches)],
            }
        )
    return rows


def interval(
    stays: np.ndarray[Any, Any], switches: np.ndarray[Any, Any], generator: np.random.Generator
) -> tuple[float, float]:
    """95 % of the difference of medians, by bootstrap."""
    differences = [
        np.median(generator.choice(switches, len(switches))) - np.median(generator.choice(stays, len(stays)))
        for _ in range(NUM_BOOTSTRAPS)
    ]
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


class Switcher:
    """Sequences of steps, each at another width than the step before."""

    def __init__(self, decoder: Decoder, length: int, seed: int) -> None:
        self._decoder = decoder
        self._length = length
        self._seed = seed
        self._cache = decoder.new_cache(length)

    def run(self, index: int) -> np.ndarray[Any, Any]:
        """Run the sequence with this index; the digest of all its logits."""
        tokens, widths = self.plan(index)
        sha = hashlib.sha256()
        self._cache.truncate(0)
        for token, bits in zip(tokens, widths, strict=True):
            logits = self._decoder.forward(token, self._cache, bits)
            assert logits is not None
            sha.update(logits)
        return np.frombuffer(sha.digest(), np.uint8)

    def plan(self, index: int) -> tuple[np.ndarray[Any, Any], list[int]]:
        """Tokens (length, 1) and widths. Neighbours differ, also over the seam of two sequences: every one
        begins at the least width and ends at another."""
        generator = np.random.default_rng([self._seed, index])
        low, high = self._decoder.min_bits, self._decoder.max_bits
        tokens = generator.integers(0, self._decoder.config.vocab_size, (self._length, 1)).astype(np.int32)
        widths = [low]
        for left in range(self._length - 1, 0, -1):
            banned = {widths[-1], low} if left == 1 else {widths[-1]}
            choices = [bits for bits in range(low, high + 1) if bits not in banned]
            widths.append(int(generator.choice(choices)))
        return tokens, widths


def resident_kib() -> int:
    """Resident memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def endure(path: Path, num_switches: int, length: int, seed: int) -> dict[str, Any]:
    """Switch, and compare memory and logits."""
    num_sequences = -(-num_switches // length)
    switcher = Switcher(open_decoder(path), length, seed)
    # What the benchmark itself keeps is in memory before that is first read: 10,000 digests as text would be
    # 1.1 MB more at the end.
    digests = np.full((num_sequences, hashlib.sha256().digest_size), 255, np.uint8)
    for index in range(min(20, num_sequences)):
        digests[index] = switcher.run(index)
    before_kib = resident_kib()
    began = time.perf_counter()
    for index in range(num_sequences):
        digests[index] = switcher.run(index)
    seconds = time.perf_counter() - began
    after_kib = resident_kib()
    replayed = sorted({*np.linspace(0, num_sequences - 1, NUM_REPLAYS).astype(int).tolist()})
    differing = [
        i for i in replayed if (Switcher(open_decoder(path), length, seed).run(i) != digests[i]).any()
    ]
    return {
        "switches": num_sequences * length,
        "seconds": seconds,
        "resident_before_kib": before_kib,
        "resident_after_kib": after_kib,
        "replayed_sequences": len(replayed),
        "differing_sequences": differing,
    }


def main() -> None:
    """Print rows and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", help="default: the model in the package")
    parser.add_argument("--pairs", default="2-3,3-4,2-6", help="widths to switch between")
    parser.add_argument("--steps", type=int, default=20000, help="for each pair")
    parser.add_argument("--switches", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=100, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    set_num_threads(options.threads)
    path = options.file or embedded_model()
    decoder = open_decoder(path)
    costs = []
    for text in options.pairs.split(",") if options.steps else ():
        low, high = (int(word) for word in text.split("-"))
        costs += switch_cost(decoder, (low, high), options.steps, options.seed)
    for row in costs:
        print(
            f"{row['from_bits']} -> {row['to_bits']} bits: {row['cost_us']:6.2f} us "
            f"({row['cost_95_us'][0]:.2f} to {row['cost_95_us'][1]:.2f}) on a step of {row['step_us']:.0f} us"
        )
    endured = endure(path, options.switches, options.length, options.seed) if options.switches else None
    if endured:
        print(
            f"{endured['switches']:,} switches in {endured['seconds']:.0f} s: resident "
            f"{endured['resident_before_kib']:,} KiB before, {endured['resident_after_kib']:,} KiB after; "
            f"{len(endured['differing_sequences'])} of {endured['replayed_sequences']} replays differ"
        )
    record = {
        "benchmark": "switches",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "file": path.name,
        "threads": options.threads,
        "limit_us": LIMIT_US,
        "median_cost_us": statistics.median(row["cost_us"] for row in costs) if costs else None,
        "costs": costs,
        "endurance": endured,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
