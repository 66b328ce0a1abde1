"""Attention time of a decode step against context and KV format, alternating in one process.

    python -m taper.testing.random_model --out 1.1b.taper --shape 1.1b --bits 2-4
    python benchmarks/anda/kv_time.py 1.1b.taper --json OUT.json

For each context a cache of each format is filled with random entries; then steps of one token alternate
between the formats, each round in another order, and the native decoder says what its attention took.
Medians, and the median of the ratios to float16 of the same round with the least and the largest.
"""

from __future__ import annotations

import argparse
import datetime
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finish import finish

from taper import kernels
from taper.formats.activations import KV_FLOAT16
from taper.formats.container import TaperFile
from taper.kvcache import AnyCache, fill_with_random_entries
from taper.models import Decoder

FORMATS = (KV_FLOAT16, "7", "5", "4", "7,4@128")
CONTEXTS = (512, 1024, 2048, 4096, 8192)
ROUNDS = 15
STAGES = ("attention", "merge")


def filled(decoder: Decoder, context: int, room: int) -> AnyCache:
    """A cache with random entries and room behind them."""
    cache = decoder.new_cache(context + room)
    fill_with_random_entries(cache, decoder.config, context)
    cache.release_old()
    return cache


def step_times(decoder: Decoder, cache: AnyCache, bits: int) -> tuple[float, float]:
    """Milliseconds of a step's attention, and of all of it."""
    decoder.times = {}
    decoder.forward([1], cache, bits)
    times, decoder.times = decoder.times, None
    return sum(times[stage] for stage in STAGES) / 1e6, sum(times.values()) / 1e6


def measure(decoders: dict[str, Decoder], context: int, bits: int, rounds: int) -> list[dict[str, Any]]:
    """All formats at one context."""
    caches = {kv: filled(decoder, context, rounds + 1) for kv, decoder in decoders.items()}
    found: dict[str, list[tuple[float, float]]] = {kv: [] for kv in decoders}
    order, shuffle = list(decoders), random.Random(context)
    for round_ in range(rounds + 1):
        shuffle.shuffle(order)
        for kv in order:
            spent = step_times(decoders[kv], caches[kv], bits)
            if round_:
                found[kv].append(spent)
    rows = []
    for kv, spent in found.items():
        ratios = sorted(own[0] / base[0] for own, base in zip(spent, found[KV_FLOAT16], strict=True))
        rows.append(
            {
                "context": context,
                "kv": kv,
                "attention_ms": statistics.median(own[0] for own in spent),
                "step_ms": statistics.median(own[1] for own in spent),
                "share": statistics.median(own[0] / own[1] for own in spent),
                "ratio": statistics.median(ratios),
                "ratio_range": [ratios[0], ratios[-1]],
                "bytes_held": caches[kv].bytes_used,
                "bytes_read": caches[kv].bytes_read(context),
            }
        )
    return rows


def report(model: Path, bits: int, contexts: Sequence[int], rounds: int) -> dict[str, Any]:
    """All figures."""
    file = TaperFile.open(model)
    decoders = {kv: Decoder.from_taper(file, kv=kv) for kv in FORMATS}
    rows = []
    for context in contexts:
        rows += measure(decoders, context, bits, rounds)
        print(f"{context} tokens done", file=sys.stderr)
    return {
        "benchmark": "kv_time",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": model.name,
        "weight_bits": bits,
        "isa": kernels.isa(),
        "threads": kernels.num_threads(),
        "rounds": rounds,
        "rows": rows,
    }


def main() -> None:
    """Measure, print a table, and end with a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=int, default=4, help="of the weights")
    parser.add_argument("--contexts", type=lambda text: [int(n) for n in text.split(",")], default=CONTEXTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads is not None:
        kernels.set_num_threads(options.threads)
    found = report(options.model, options.bits, options.contexts, options.rounds)
    print(f"{found['model']} at {found['weight_bits']} bits, {found['isa']}, {found['threads']} threads")
    print(
        f"{'context':>8} {'KV':10} {'attention':>10} {'of float16 (range)':>26} {'share':>7} {'MB held':>8}"
    )
    for row in found["rows"]:
        low, high = row["ratio_range"]
        ratio = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
        print(
            f"{row['context']:8} {row['kv']:10} {row['attention_ms']:7.2f} ms {ratio:>26} "
            f"{row['share']:7.1%} {row['bytes_held'] / 1e6:8.1f}"
        )
    finish(found, options.json)


if __name__ == "__main__":
    main()
