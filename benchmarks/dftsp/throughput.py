"""Throughput of DFTSP and other batchings on the paper's edge node, over rate, latency bound and precision.

    python benchmarks/dftsp/throughput.py --out DIR [--seeds 5] [--duration 120]

Simulated: no time of this machine is in it. The settings are recalled or assumed (docs/dftsp.md). `stb` is
the static size that serves most at that point, of 2, 4, 8 and 16. A table for people, the last line JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from taper.planner.edge import MODELS, QUANTIZERS, EdgeCell, EdgeNode
from taper.planner.epochs import BATCHINGS, draw_requests, run_epochs

RATES = (1, 2, 5, 10, 20, 40, 80)
LATENCIES_S = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
RATE, LATENCY_S, QUANTIZER = 20.0, 2.0, "gptq-w8a16"
# Little band and memory, loose bounds: of 20 requests no resource carries all (mean of its uses: 1.2 to 2.1).
SCARCE = EdgeNode(uplink_hz=2e4, downlink_hz=2e4, memory_bytes=4e9)
SCARCE_LATENCY_S = 5.0


def point(
    model: str, quantizer: str, rate: float, latency_s: float, node: EdgeNode, seeds: int, duration_s: float
) -> dict[str, Any]:
    """All batchings on the same requests; means over the seeds.

    Returns:
        Requests a second served in time by batching, `stb` for the best size, and the standard error of
        DFTSP's; the share of requests for which the precision is accurate enough; the mean batch.
    """
    cell = EdgeCell(MODELS[model], QUANTIZERS[quantizer], node)
    served: dict[str, list[float]] = {name: [] for name in BATCHINGS}
    batches: list[int] = []
    admitted = total = 0
    for seed in range(seeds):
        requests = draw_requests(rate, latency_s, duration_s, seed)
        total += len(requests)
        for name, choose in BATCHINGS.items():
            result = run_epochs(choose, cell, requests, seed)
            served[name].append(result.throughput)
            if name == "dftsp":
                batches += result.batches
                admitted += result.admitted
    means = {name: float(np.mean(values)) for name, values in served.items()}
    best = max((name for name in means if name.startswith("stb")), key=lambda name: means[name])
    return {
        "model": model,
        "quantizer": quantizer,
        "rate": rate,
        "max_latency_s": latency_s,
        "served": {**means, "stb": means[best]},
        "best_stb": best,
        "error": float(np.std(served["dftsp"], ddof=1) / len(served["dftsp"]) ** 0.5) if seeds > 1 else None,
        "admitted_frac": admitted / total,
        "mean_batch": float(np.mean(batches)) if batches else 0.0,
    }


def curves(seeds: int, duration_s: float) -> dict[str, list[dict[str, Any]]]:
    """Over the rate, over the bound, over the precision, and over the rate where all is scarce."""
    ends, node = (seeds, duration_s), EdgeNode()
    return {
        "rate": [point(m, QUANTIZER, rate, LATENCY_S, node, *ends) for m in MODELS for rate in RATES],
        "latency": [point(m, QUANTIZER, RATE, bound, node, *ends) for m in MODELS for bound in LATENCIES_S],
        "quantizer": [
            point(m, quantizer, rate, LATENCY_S, node, *ends)
            for m in MODELS
            for quantizer in QUANTIZERS
            for rate in (2, 80)
        ],
        "scarce": [point("bloom-3b", QUANTIZER, rate, SCARCE_LATENCY_S, SCARCE, *ends) for rate in RATES],
    }


def text(rows: list[dict[str, Any]]) -> str:
    """Lines of a table in Markdown."""
    shown = ("dftsp", "greedy", "fcfs", "stb", "nob")
    lines = [
        "| model, quantiser | rate | bound | " + " | ".join(shown) + " | best size | mean batch | accurate |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = " | ".join(f"{row['served'][name]:.2f}" for name in shown)
        lines.append(
            f"| {row['model']}, {row['quantizer']} | {row['rate']:g} | {row['max_latency_s']:g} s | {cells} "
            f"| {row['best_stb'].removeprefix('stb-')} | {row['mean_batch']:.1f} "
            f"| {row['admitted_frac']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Simulate everything, print the tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--duration", type=float, default=120.0)
    options = parser.parse_args()
    found = curves(options.seeds, options.duration)
    for name, rows in found.items():
        print(f"{name}\n\n{text(rows)}\n")
    report = {"seeds": options.seeds, "duration_s": options.duration, "curves": found}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "throughput.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    gains = {
        f"{row['model']} at {row['rate']:g}": {
            name: round(row["served"]["dftsp"] / row["served"][name], 3)
            for name in ("greedy", "fcfs", "stb", "nob")
            if row["served"][name]
        }
        for row in found["rate"]
    }
    print(json.dumps({"dftsp_over": gains}))


if __name__ == "__main__":
    main()
