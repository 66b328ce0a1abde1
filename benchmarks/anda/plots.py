"""Pictures of the activation sweep, the search and the KV cache, from the JSON of the other scripts.

python benchmarks/anda/plots.py --sweep SWEEP.json --time TIME.json --out docs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

FLOOR = 1e-4  # losses below it are noise
COLOURS = {"qkv": "#1f77b4", "o": "#ff7f0e", "gate_up": "#2ca02c", "down": "#d62728"}
KV_COLOURS = {"float16": "#444444", "7": "#1f77b4", "5": "#17becf", "4": "#2ca02c", "7,4@128": "#d62728"}


def sensitivity(found: dict[str, Any], out: Path) -> None:
    """Loss against M of one type, the rest at 13."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for row in found["by_type"]:
        bits = [int(m) for m in row["loss"]]
        losses = [max(loss, FLOOR) for loss, _ in row["loss"].values()]
        solid = row["rounding"] == "nearest"
        errors = [error for _, error in row["loss"].values()]
        below = [min(error, loss - FLOOR) for loss, error in zip(losses, errors, strict=True)]
        axis.errorbar(
            bits,
            losses,
            [below, errors],
            fmt="-o" if solid else "--x",
            elinewidth=0.6,
            color=COLOURS[row["type"]],
            label=f"{row['type']}, {'to nearest' if solid else 'truncated'}",
            markersize=4,
        )
    limits(axis)
    axis.set_yscale("log")
    axis.set_xlabel("magnitude bits M of one tensor type (the others: 13)")
    axis.set_ylabel("loss: perplexity over the reference's, minus 1")
    axis.set_title(
        f"{found['model']}, weights at {found['weight_bits']} bits, groups of 64; bars: a standard error;\n"
        f"what is below {FLOOR:.2%}, or negative, is drawn there",
        fontsize=9,
    )
    axis.legend(fontsize=8, ncols=2)
    save(figure, out / "anda_sensitivity.png")


def search(found: dict[str, Any], out: Path) -> None:
    """What was tried at 1 %, and what became the best."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for row, colour in zip(
        (r for r in found["searches"] if r["limit"] == 0.01), ("#1f77b4", "#d62728"), strict=True
    ):
        steps = range(1, len(row["path"]) + 1)
        losses = [max(tried["loss"], FLOOR) for tried in row["path"]]
        axis.plot(steps, losses, "-", color=colour, linewidth=0.8)
        for step, loss, tried in zip(steps, losses, row["path"], strict=True):
            axis.plot(step, loss, "o" if tried["is_best"] else "x", color=colour)
            axis.annotate("".join(map(str, tried["bits"])), (step, loss), fontsize=6, xytext=(2, 4),
                          textcoords="offset points")  # fmt: skip
        axis.plot([], [], "-o", color=colour, label=f"{row['rounding']}: {'-'.join(map(str, row['bits']))}, "
                  f"{row['saving']:.2f} times fewer BOPs")  # fmt: skip
    limits(axis)
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("evaluation (dot: best so far, cross: not)")
    axis.set_ylabel("loss")
    axis.set_title("the paper's search at 1 %: bits of qkv, o, gate_up, down", fontsize=10)
    axis.legend(fontsize=8)
    save(figure, out / "anda_search.png")


def kv(found: dict[str, Any], out: Path) -> None:
    """Bytes held and attention time against context."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0))
    for name, colour in KV_COLOURS.items():
        rows = [row for row in found["rows"] if row["kv"] == name]
        contexts = [row["context"] for row in rows]
        left.plot(
            contexts, [row["bytes_held"] / 1e6 for row in rows], "-o", color=colour, label=name, markersize=4
        )
        right.plot(
            contexts, [row["attention_ms"] for row in rows], "-o", color=colour, label=name, markersize=4
        )
    left.set_ylabel("KV cache, MB")
    right.set_ylabel("attention of a decode step, ms")
    for axis in (left, right):
        axis.set_xlabel("entries")
        axis.set_xlim(0)
        axis.set_ylim(0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, title="KV format", title_fontsize=8)
    figure.suptitle(f"1.1 B shape, {found['isa']}, {found['threads']} threads", fontsize=10)
    save(figure, out / "kv_planes.png")


def limits(axis: Any) -> None:
    """Lines at the losses that are asked for."""
    for limit in (0.001, 0.01):
        axis.axhline(limit, color="#888888", linewidth=0.8, linestyle=":")
    axis.grid(alpha=0.3)


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
    parser.add_argument("--sweep", type=Path)
    parser.add_argument("--time", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    if options.sweep is not None:
        found = json.loads(options.sweep.read_text(encoding="utf-8"))
        sensitivity(found, options.out)
        search(found, options.out)
    if options.time is not None:
        kv(json.loads(options.time.read_text(encoding="utf-8")), options.out)


if __name__ == "__main__":
    main()
