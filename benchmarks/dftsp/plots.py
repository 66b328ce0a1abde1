"""Pictures of throughput and of nodes, from the JSON of the other scripts.

python benchmarks/dftsp/plots.py --throughput DIR/throughput.json --nodes DIR/nodes.json --out docs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"bloom-3b": "#1f77b4", "bloom-7.1b": "#2ca02c", "opt-13b": "#d62728"}
LINES = {"dftsp": "-o", "fcfs": "--s", "stb": ":^", "nob": "-.x"}
LABELS = {"dftsp": "DFTSP", "fcfs": "first come, checked", "stb": "StB, best size", "nob": "NoB"}
QUANTIZERS = ("w16a16", "gptq-w8a16", "gptq-w4a16", "zq-local-w4a16")
SEARCHES = {
    "subsets": ("#444444", "all subsets"),
    "unpruned": ("#ff7f0e", "tree, not pruned"),
    "dftsp": ("#1f77b4", "DFTSP"),
}
STYLES = {"recalled": "-o", "scarce": "--s", "uncorrelated": ":^"}


def throughput(curves: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Served in time over rate, over bound, and by precision."""
    figure, ((rate, latency), (light, heavy)) = plt.subplots(2, 2, figsize=(10.5, 7.6))
    for axis, key, name in ((rate, "rate", "rate"), (latency, "max_latency_s", "latency")):
        for model, colour in COLOURS.items():
            rows = [row for row in curves[name] if row["model"] == model]
            for batching, line in LINES.items():
                axis.plot(
                    [row[key] for row in rows],
                    [row["served"][batching] for row in rows],
                    line,
                    color=colour,
                    linewidth=1.8 if batching == "dftsp" else 1.0,
                    markersize=4,
                )
        axis.set_ylim(0)
        axis.grid(alpha=0.3)
        axis.set_ylabel("served in time, requests / s")
    rate.set_xscale("log")
    rate.set_xlabel("arrivals, requests / s (bounds up to 2 s)")
    latency.set_xlabel("largest latency bound, s (20 requests / s)")
    rate.legend(handles=_legend(), fontsize=8, loc="upper left")
    _precisions(light, [row for row in curves["quantizer"] if row["rate"] == 2], "2 requests / s")
    _precisions(heavy, [row for row in curves["quantizer"] if row["rate"] == 80], "80 requests / s")
    figure.suptitle("simulated, settings recalled or assumed; upper row: gptq-w8a16", fontsize=10)
    save(figure, out / "dftsp_throughput.png")


def _legend() -> list[Any]:
    models = [plt.Line2D([], [], color=colour, label=model) for model, colour in COLOURS.items()]
    return models + [
        plt.Line2D(
            [], [], color="#444444", linestyle=line[:-1], marker=line[-1], markersize=4, label=LABELS[name]
        )
        for name, line in LINES.items()
    ]


def _precisions(axis: Any, rows: list[dict[str, Any]], title: str) -> None:
    """Bars of DFTSP by precision; above each the share of requests it is accurate enough for."""
    for place, model in enumerate(COLOURS):
        for step, quantizer in enumerate(QUANTIZERS):
            row = next(row for row in rows if row["model"] == model and row["quantizer"] == quantizer)
            at, height = place + 0.2 * (step - 1.5), row["served"]["dftsp"]
            axis.bar(at, height, 0.18, color=plt.get_cmap("viridis")(step / 3.5),
                     label=quantizer if place == 0 else None)  # fmt: skip
            axis.annotate(f"{row['admitted_frac']:.0%}", (at, height), ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(COLOURS)), list(COLOURS))
    axis.set_ylabel("DFTSP, served in time, requests / s")
    axis.set_title(f"{title}; above: requests it is accurate enough for", fontsize=9)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, axis="y")
    axis.margins(y=0.1)


def nodes(found: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Nodes and time against how many wait."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2))
    for setting, style in STYLES.items():
        rows = [row for row in found["small"] if row["setting"] == setting]
        for search, (colour, _) in SEARCHES.items():
            # All subsets are as many in every setting.
            if search == "subsets" and setting != "recalled":
                continue
            there = [row for row in rows if search in row["nodes"]]
            counts = [row["requests"] for row in there]
            left.plot(counts, [row["nodes"][search] for row in there], style, color=colour, markersize=4)
            right.plot(counts, [row["ms"][search] for row in there], style, color=colour, markersize=4)
    for axis in (left, right):
        axis.set_yscale("log")
        axis.set_xticks(sorted({row["requests"] for row in found["small"]}))
        axis.set_xlabel("requests that wait")
        axis.grid(alpha=0.3)
    left.set_ylabel("nodes or subsets, mean")
    right.set_ylabel("ms, median (subsets in NumPy, trees in Python)")
    handles = [plt.Line2D([], [], color=colour, label=label) for colour, label in SEARCHES.values()]
    handles += [
        plt.Line2D([], [], color="#888888", linestyle=style[:-1], marker=style[-1], markersize=4, label=name)
        for name, style in STYLES.items()
    ]
    left.legend(handles=handles, fontsize=8)
    save(figure, out / "dftsp_nodes.png")


def save(figure: Any, path: Path) -> None:
    """As a small PNG."""
    figure.tight_layout()
    figure.savefig(path, dpi=72)
    plt.close(figure)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    """Draw what is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--throughput", type=Path)
    parser.add_argument("--nodes", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    if options.throughput is not None:
        throughput(json.loads(options.throughput.read_text(encoding="utf-8"))["curves"], options.out)
    if options.nodes is not None:
        nodes(json.loads(options.nodes.read_text(encoding="utf-8")), options.out)


if __name__ == "__main__":
    main()
