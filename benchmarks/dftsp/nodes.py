"""Nodes and time of DFTSP beside its tree without pruning and all subsets, on what waits before an epoch.

    python benchmarks/dftsp/nodes.py --out DIR [--instances 20]

Settings: BLOOM-3B at gptq-w8a16 as `recalled` (docs/dftsp.md), where only time binds, or `scarce`, little
band and memory under loose bounds, where all bind; `uncorrelated`, made-up amounts of four resources, where
what is small in one may be large in another. All subsets are looked at by NumPy, the trees by Python: ratios
of times flatter the former. Every answer is compared with the others. A table, the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from throughput import LATENCY_S, QUANTIZER, SCARCE, SCARCE_LATENCY_S

from taper.planner.dftsp import Candidate, Problem, Selection, dftsp, exhaustive, greedy
from taper.planner.edge import MODELS, QUANTIZERS, EdgeCell, EdgeNode
from taper.planner.epochs import draw_requests

SETTINGS = {"recalled": (EdgeNode(), LATENCY_S), "scarce": (SCARCE, SCARCE_LATENCY_S)}
NAMES = (*SETTINGS, "uncorrelated")
SMALL, LARGE = (8, 12, 16, 20), (40, 80, 160)
# The tree without pruning has up to 2^(n + 1) nodes, each in Python.
MAX_UNPRUNED = 16
MAX_NODES = 200_000


def instance(setting: str, count: int, seed: int) -> Problem:
    """`count` requests that came within the last second and can be served alone."""
    if setting == "uncorrelated":
        return uncorrelated(count, seed)
    node, latency_s = SETTINGS[setting]
    cell = EdgeCell(MODELS["bloom-3b"], QUANTIZERS[QUANTIZER], node)
    requests = [
        one
        for one in draw_requests(count * 10.0, latency_s, 1.0, seed)
        if cell.admits(one) and cell.compute_ns(one) <= cell.slack_ns(one, 1.0)
    ][:count]
    if len(requests) < count:
        raise RuntimeError(f"only {len(requests)} of {count} requests can be served")
    return cell.problem(requests, 1.0, np.random.default_rng(seed).exponential(size=count).tolist())


def uncorrelated(count: int, seed: int) -> Problem:
    """Uniform amounts of which about ten fit."""
    generator = np.random.default_rng(seed)
    compute, slack = generator.integers(20, 100, count), generator.integers(100, 1000, count)
    uses = generator.integers(1, 60, (count, 3))
    rows = zip(compute.tolist(), slack.tolist(), uses.tolist(), strict=True)
    return Problem(tuple(Candidate(time, left, tuple(row)) for time, left, row in rows), (400, 400, 400))


def timed(search: Callable[[Problem], Selection], problem: Problem) -> tuple[Selection, float]:
    """What a search finds, and its seconds."""
    begin = time.perf_counter()
    found = search(problem)
    return found, time.perf_counter() - begin


def small(setting: str, count: int, instances: int) -> dict[str, Any]:
    """Means over instances of all three searches."""
    searches: dict[str, Callable[[Problem], Selection]] = {"dftsp": dftsp, "subsets": exhaustive}
    if count <= MAX_UNPRUNED:
        searches["unpruned"] = lambda problem: dftsp(problem, prune=False)
    nodes: dict[str, list[int]] = {name: [] for name in searches}
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    sizes = []
    for seed in range(instances):
        problem = instance(setting, count, seed)
        found = {name: timed(search, problem) for name, search in searches.items()}
        if len({len(selection.chosen) for selection, _ in found.values()}) != 1:
            raise RuntimeError(f"the searches differ on instance {seed} of {count}, {setting}")
        sizes.append(len(found["dftsp"][0].chosen))
        for name, (selection, spent) in found.items():
            nodes[name].append(selection.nodes)
            seconds[name].append(spent)
    return {
        "setting": setting,
        "requests": count,
        "instances": instances,
        "mean_size": float(np.mean(sizes)),
        "nodes": {name: float(np.mean(values)) for name, values in nodes.items()},
        "most_nodes": max(nodes["dftsp"]),
        "ms": {name: float(np.median(values)) * 1e3 for name, values in seconds.items()},
        "cut": {name: 1 - sum(nodes["dftsp"]) / sum(nodes[name]) for name in nodes if name != "dftsp"},
    }


def large(setting: str, count: int, instances: int) -> dict[str, Any]:
    """DFTSP alone, within a budget of nodes, and the greedy batch."""
    nodes, spent, gaps, short = [], [], [], []
    for seed in range(instances):
        problem = instance(setting, count, seed)
        found, seconds = timed(lambda one: dftsp(one, max_nodes=MAX_NODES), problem)
        nodes.append(found.nodes)
        spent.append(seconds)
        gaps.append(found.bound - len(found.chosen))
        short.append(found.bound - len(greedy(problem)))
    return {
        "setting": setting,
        "requests": count,
        "instances": instances,
        "proven": gaps.count(0),
        "largest_gap": max(gaps),
        "greedy_below_bound": sum(gap > 0 for gap in short),
        "median_nodes": float(np.median(nodes)),
        "most_nodes": max(nodes),
        "median_ms": float(np.median(spent)) * 1e3,
        "most_ms": max(spent) * 1e3,
    }


def table(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """Both in Markdown."""
    lines = [
        "| setting | waiting | served | nodes: DFTSP (most) | not pruned | subsets "
        "| ms: DFTSP | not pruned | subsets |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        nodes, ms = row["nodes"], row["ms"]
        without = (
            (f"{nodes['unpruned']:,.0f}", f"{ms['unpruned']:.2f}") if "unpruned" in nodes else ("-", "-")
        )
        lines.append(
            f"| {row['setting']} | {row['requests']} | {row['mean_size']:.1f} | {nodes['dftsp']:.0f} "
            f"({row['most_nodes']}) | {without[0]} | {nodes['subsets']:,.0f} "
            f"| {ms['dftsp']:.2f} | {without[1]} | {ms['subsets']:.2f} |"
        )
    lines += [
        "",
        "| setting | waiting | proven | largest gap | greedy below the bound "
        "| nodes, median (most) | ms, median (most) |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['setting']} | {row['requests']} | {row['proven']} of {row['instances']} "
        f"| {row['largest_gap']} | {row['greedy_below_bound']} "
        f"| {row['median_nodes']:,.0f} ({row['most_nodes']:,}) "
        f"| {row['median_ms']:.1f} ({row['most_ms']:.0f}) |"
        for row in others
    ]
    return "\n".join(lines)


def main() -> None:
    """Count, print the tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--instances", type=int, default=20)
    options = parser.parse_args()
    rows = [small(setting, count, options.instances) for setting in NAMES for count in SMALL]
    others = [large(setting, count, options.instances) for setting in NAMES for count in LARGE]
    print(table(rows, others))
    report = {"machine": platform.processor() or platform.machine(), "small": rows, "large": others}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "nodes.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    cuts = {f"{row['setting']}, {row['requests']}": row["cut"] for row in rows}
    print(json.dumps({"least_cut": min(min(cut.values()) for cut in cuts.values()), "cut": cuts}))


if __name__ == "__main__":
    main()
