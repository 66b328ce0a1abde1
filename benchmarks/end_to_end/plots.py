"""Pictures of recorded rounds: decode speed over bits with the peers as points, and over the context.

python benchmarks/end_to_end/plots.py rounds.jsonl --out docs
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "llama_cpp"))

from common import BenchmarkError, run_main
from compare import recorded
from gguf_models import SHAPES, optional_package, weights_per_token
from report import Sample, Summary, summaries

PROGRAMS = {"llama.cpp": ("tab:orange", "s"), "ik_llama.cpp": ("tab:green", "^")}
OURS = "tab:blue"
SAME_BITS = 0.05  # the same format of two programs: one label above, one below
SIZE_INCHES = (7.0, 4.5)
DOTS_PER_INCH = 120


def bits_per_weight(samples: list[Sample], name: str) -> float:
    """Bits that a figure's program reads for each weight."""
    num_bytes = next(s.bytes_per_token for s in samples if s.name == name and s.bytes_per_token)
    return 8 * num_bytes / weights_per_token(SHAPES["1.1b"])


def error(row: Summary) -> list[list[float]]:
    """Least and most as the distance from the median, as matplotlib wants it."""
    return [[row.median - row.least], [row.most - row.median]]


def plot_bits(pyplot: Any, samples: list[Sample], path: Path) -> None:
    """Tokens per second over bits per weight."""
    chosen = [sample for sample in samples if sample.group == "decode"]
    figure, axes = pyplot.subplots(figsize=SIZE_INCHES)
    rows = {row.name: row for row in summaries("decode", chosen)}
    ours = [(bits_per_weight(chosen, name), row) for name, row in rows.items() if name.startswith("taper")]
    axes.plot([x for x, _ in ours], [row.median for _, row in ours], "o-", color=OURS, label="Taper")
    for x, row in ours:
        axes.errorbar(x, row.median, error(row), color=OURS, capsize=3)
    places = [(bits_per_weight(chosen, name), row.median) for name, row in rows.items()]
    for program, (colour, marker) in PROGRAMS.items():
        theirs = [row for name, row in rows.items() if name.startswith(f"{program} ")]
        if not theirs:
            continue
        xs = [bits_per_weight(chosen, row.name) for row in theirs]
        axes.plot(xs, [row.median for row in theirs], marker, color=colour, label=program)
        for x, row in zip(xs, theirs, strict=True):
            axes.errorbar(x, row.median, error(row), color=colour, capsize=3)
            label = row.name.removeprefix(program).strip()
            below = any(abs(other - x) < SAME_BITS and speed > row.median for other, speed in places)
            axes.annotate(
                label, (x, row.median), (4, -11 if below else 5), textcoords="offset points", fontsize=8
            )
    axes.set(
        xlabel="bits read per weight, scales and wider tensors included",
        ylabel="tokens per second",
        title="Decoding, 1.1 B shape, 2 threads",
    )
    save(figure, axes, path)


def plot_depth(pyplot: Any, samples: list[Sample], path: Path) -> None:
    """Tokens per second over the tokens in the cache."""
    figure, axes = pyplot.subplots(figsize=SIZE_INCHES)
    lines: dict[str, list[tuple[int, Summary]]] = {}
    deepest = [row for row in summaries("attention", samples) if " @ d" in row.name]
    for row in [*summaries("depth", samples), *deepest]:
        name, _, depth = row.name.partition(" @ d")
        lines.setdefault(name, []).append((int(depth or 0), row))
    for name, points in lines.items():
        style = "o-" if name.startswith("taper") else "s--"
        label = re.sub("^taper", "Taper", name)
        axes.plot([x for x, _ in points], [row.median for _, row in points], style, label=label)
    axes.set(
        xlabel="tokens of context",
        ylabel="tokens per second",
        title="Decoding behind a context, 1.1 B shape, 2 threads",
    )
    save(figure, axes, path)


def save(figure: Any, axes: Any, path: Path) -> None:
    """Finish a picture."""
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=DOTS_PER_INCH)


def main() -> None:
    """Write the pictures that the record has samples for."""
    parser = argparse.ArgumentParser(description="Draw recorded rounds.")
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, default=Path(), help="folder")
    args = parser.parse_args()
    optional_package("matplotlib").use("Agg")
    pyplot = optional_package("matplotlib.pyplot")
    samples = recorded(args.record)
    groups = {sample.group for sample in samples}
    drawings = {"decode": (plot_bits, "decode_bits.png"), "depth": (plot_depth, "decode_depth.png")}
    if not groups & set(drawings):
        raise BenchmarkError(f"{args.record} holds no round of {' or '.join(drawings)}")
    for group, (draw, name) in drawings.items():
        if group in groups:
            draw(pyplot, samples, args.out / name)
            print(args.out / name)


if __name__ == "__main__":
    run_main(main)
