"""Roofline of recorded runs of planes.py: GOP/s over the operations on each byte of planes.

python benchmarks/kernels/planes.py --cache cold --bits 2,3,4 --tokens 1,2,5,8,16 > kernels.json
python benchmarks/kernels/roofline.py kernels.json --peak 467 --out docs/kernels.png

Needs matplotlib. The slope is the read bandwidth, the median of what was measured before the samples; the
flat roof, `--peak`, is what the multiply instruction does from registers on all threads of the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

COLOURS = (
    "tab:blue",
    "tab:orange",
    "tab:green",
    "tab:red",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:olive",
)
MARKERS = {"avx512": "o", "avx2": "s"}
SIZE_INCHES = (7.5, 5.0)
DOTS_PER_INCH = 120
Rows = list[dict[str, Any]]


def recorded(path: Path, threads: int) -> Rows:
    """Cold results of the file's last line on so many threads."""
    rows = json.loads(path.read_text().splitlines()[-1])["results"]
    return [row for row in rows if row["case"]["cold"] and row["case"]["threads"] == threads]


def intensity(row: dict[str, Any]) -> float:
    """Operations on each byte that a pass reads."""
    return float(row["gop_s"] / row["gb_s"])


def plot_roof(axes: Any, rows: Rows, peak_gop_s: float | None) -> None:
    """The slope of the memory and the roof of the arithmetic."""
    read_gb_s = statistics.median(row["read_gb_s"] for row in rows)
    ends = [0.8 * min(map(intensity, rows)), 1.3 * max(map(intensity, rows))]
    if peak_gop_s is None:
        slope = ends
    else:
        slope = [ends[0], min(ends[1], peak_gop_s / read_gb_s)]
        axes.plot([slope[1], ends[1]], [peak_gop_s] * 2, "k-", label=f"multiply, {peak_gop_s:.0f} GOP/s")
    axes.plot(slope, [x * read_gb_s for x in slope], "k--", label=f"memory, {read_gb_s:.1f} GB/s")


def plot_rows(axes: Any, rows: Rows) -> None:
    """A line for each instruction set and width, a point for each number of tokens."""
    widths = sorted({row["case"]["bits"] for row in rows})
    for isa in sorted({row["case"]["isa"] for row in rows}, reverse=True):
        for bits in widths:
            line = sorted(
                (row for row in rows if row["case"]["isa"] == isa and row["case"]["bits"] == bits),
                key=intensity,
            )
            style = {"color": COLOURS[widths.index(bits) % len(COLOURS)], "marker": MARKERS.get(isa, "^")}
            # Relative to the bandwidth of their own moment, so that a slow moment does not lower a point.
            read = statistics.median(row["read_gb_s"] for row in rows)
            points = [row["bandwidth_frac"] * read * intensity(row) for row in line]
            axes.plot([intensity(row) for row in line], points, label=f"{isa}, {bits} bits", **style)
            if isa == "avx512" and bits == widths[-1]:
                for row, y in zip(line, points, strict=True):
                    text = f"{row['case']['tokens']} tok"
                    axes.annotate(text, (intensity(row), y), (3, -12), textcoords="offset points", fontsize=8)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="stdout of planes.py")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", type=float, metavar="GOPS", help="of the multiply instruction, all threads")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    args = parser.parse_args()
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        sys.exit(f"error: matplotlib cannot be imported: {error}\nhint: pip install matplotlib")
    rows = recorded(args.results, args.threads)
    if not rows:
        sys.exit(f"error: {args.results} has no cold results on {args.threads} threads")
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    plot_roof(axes, rows, args.peak)
    plot_rows(axes, rows)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations on a byte of planes",
        ylabel="GOP/s",
        title=f"Linear layers over planes, weights cold, {args.threads} threads",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
