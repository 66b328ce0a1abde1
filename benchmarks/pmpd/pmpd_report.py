"""Tables and pictures of what `quality.py` and `speed.py` measured.

python benchmarks/pmpd/pmpd_report.py quality.json --speed speed.json --plot quality.png

All intervals are 95 %, from a bootstrap that draws the documents that the prompts were cut from, the same
draws for every policy; differences are paired, prompt by prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parent.parent / "llama_cpp"))

from common import BenchmarkError, run_main
from gguf_models import optional_package
from schedules import COMPARISONS, FULL, resolve

Floats = NDArray[np.float64]
NUM_RESAMPLES = 2000
SEED = 0
LEAST_KL = 1e-5
STYLES = {
    "full": ("black", "*"),
    "uniform": ("tab:gray", "o-"),
    "uniform, by layer": ("tab:gray", "o"),
    "phase": ("tab:blue", "s"),
    "phase, by layer": ("tab:cyan", "s"),
    "falling, by layer": ("tab:cyan", "v"),
    "reverse, by layer": ("tab:cyan", "^"),
    "static": ("tab:purple", "^"),
    "falling": ("tab:green", "v"),
    "mixed": ("tab:olive", "x"),
    "reverse": ("tab:red", "^"),
    "opposite": ("tab:orange", "D"),
}


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the mean differs from 0."""
        return self.low * self.high > 0

    def text(self, digits: int, scale: float = 1.0, sign: str = "") -> str:
        """`value ± half of the interval's width`, times `scale`."""
        half = scale * (self.high - self.low) / 2
        return f"{scale * self.value:{sign}.{digits}f} ± {half:.{digits}f}"

    def difference(self, digits: int, scale: float) -> str:
        """`value (low to high)`, times `scale`; bold where the mean differs from 0."""
        value, low, high = (f"{scale * x:+.{digits}f}" for x in (self.value, self.low, self.high))
        text = f"{value} ({low} to {high})"
        return f"**{text}**" if self.excludes_zero else text


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Draws of documents, shared by all policies of a task.

    Attributes:
        members: float64 (documents, prompts), 1 where the prompt is of the document.
        draws: float64 (resamples, documents), how often each document is drawn.
    """

    members: Floats
    draws: Floats

    @classmethod
    def of(cls, documents: Sequence[int]) -> Bootstrap:
        """For prompts that were cut from these documents."""
        names = sorted(set(documents))
        members = np.array([[float(one == name) for one in documents] for name in names])
        generator = np.random.default_rng(SEED)
        chosen = generator.integers(0, len(names), (NUM_RESAMPLES, len(names)))
        draws = np.array([np.bincount(row, minlength=len(names)) for row in chosen], dtype=np.float64)
        return cls(members, draws)

    def interval(self, values: Sequence[float] | Floats, of: Callable[[Any], Any] = lambda x: x) -> Interval:
        """Of a monotone function `of` the mean over prompts."""
        wide = np.asarray(values, dtype=np.float64)
        counts = self.draws @ self.members.sum(axis=1)
        means = (self.draws @ (self.members @ wide)) / counts
        low, high = np.quantile(means, (0.025, 0.975))
        return Interval(float(of(wide.mean())), float(of(low)), float(of(high)))


@dataclass(frozen=True, slots=True)
class Line:
    """One policy on one task.

    Attributes:
        bits, answer_bits: mean over the decode passes of the reference and of the greedy answer.
        loss: perplexity of the reference over that of all planes, minus 1.
        kl: from all planes, in nats.
        rouge_full, rouge_reference: of the greedy answer, None where none is made.
        decode_ms, prefill_ms: measured, None without.
    """

    family: str
    policy: str
    bits: float
    loss: Interval
    kl: Interval
    answer_bits: float | None
    rouge_full: Interval | None
    rouge_reference: Interval | None
    decode_ms: float | None
    prefill_ms: float | None


def lines(record: dict[str, Any], speeds: dict[str, Any], name: str) -> list[Line]:
    """All policies of one task; the time is that of the task, or of the one task that was timed."""
    task = record["tasks"][name]
    bootstrap = Bootstrap.of(task["documents"])
    timed = speeds.get(name) or (next(iter(speeds.values())) if speeds else {})
    full = np.array(task["samples"][FULL]["nll"])
    found = []
    for text, samples in task["samples"].items():
        at = timed.get("policies", {}).get(text, {})

        def interval(score: str, samples: dict[str, list[float]] = samples) -> Interval | None:
            return bootstrap.interval(samples[score]) if score in samples else None

        kl = interval("kl")
        assert kl is not None
        found.append(
            Line(
                family=record["families"][text],
                policy=resolve(text, record["top"], task["limit"]),
                bits=float(np.mean(samples["bits"])),
                loss=bootstrap.interval(np.array(samples["nll"]) - full, np.expm1),
                kl=kl,
                answer_bits=float(np.mean(samples["answer_bits"])) if "answer_bits" in samples else None,
                rouge_full=interval("rouge_full"),
                rouge_reference=interval("rouge_reference"),
                decode_ms=at.get("decode_ms"),
                prefill_ms=at.get("prefill_ms"),
            )
        )
    return found


def table(found: Sequence[Line]) -> str:
    """Markdown of one task, sorted by bits."""
    has_answers = any(line.rouge_full for line in found)
    has_times = any(line.decode_ms for line in found)
    heads = ["family", "policy", "bits", "perplexity over all planes, %", "KL, millinats"]
    heads += ["bits of the answer", "ROUGE-L to all planes", "to the reference"] if has_answers else []
    heads += ["ms/token", "tok/s", "prompt, ms"] if has_times else []
    rows = [heads, ["---"] * len(heads)]
    for line in sorted(found, key=lambda one: (one.bits, one.family)):
        row = [line.family, f"`{line.policy}`", f"{line.bits:.2f}"]
        row += [line.loss.text(2, 100, "+"), line.kl.text(1, 1e3)]
        if has_answers:
            row += ["" if line.answer_bits is None else f"{line.answer_bits:.2f}"]
            row += ["" if x is None else x.text(3) for x in (line.rouge_full, line.rouge_reference)]
        if has_times:
            ms, prefill = line.decode_ms, line.prefill_ms
            row += [f"{ms:.3f}", f"{1e3 / ms:.0f}"] if ms else ["", ""]
            row += [f"{prefill:.1f}" if prefill else ""]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def overview(record: dict[str, Any], tasks: dict[str, list[Line]], timed: Sequence[str]) -> str:
    """Markdown of all tasks: loss of perplexity over all planes in %, ROUGE-L to all planes, and time."""
    answered = [name for name, found in tasks.items() if found[0].rouge_full]
    timed = [name for name in timed if name in tasks]
    heads = ["family", "policy", "bits", *(f"{name}, %" for name in tasks)]
    heads += [f"{name}, ROUGE-L" for name in answered]
    heads += [f"{name}, {what}" for name in timed for what in ("ms/token", "prompt, ms")]
    rows = []
    for index, text in enumerate(record["families"]):
        by_task = {name: found[index] for name, found in tasks.items()}
        first = next(iter(by_task.values()))
        row = [first.family, f"`{text}`", f"{first.bits:.2f}"]
        row += [line.loss.text(2, 100, "+") for line in by_task.values()]
        row += [line.rouge_full.text(3) for name in answered if (line := by_task[name]).rouge_full]
        for name in timed:
            times = (by_task[name].decode_ms, by_task[name].prefill_ms)
            row += [f"{ms:.{digits}f}" if ms else "" for ms, digits in zip(times, (2, 0), strict=True)]
        rows.append((first.bits, first.family, row))
    body = [row for _, _, row in sorted(rows, key=lambda one: one[:2])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *body])


def comparisons(record: dict[str, Any], name: str) -> list[tuple[str, dict[str, Interval]]]:
    """First policy minus second of every comparison that was measured, by score."""
    task = record["tasks"][name]
    bootstrap = Bootstrap.of(task["documents"])
    found = []
    for label, first, second in COMPARISONS:
        one, other = task["samples"].get(first), task["samples"].get(second)
        if one is None or other is None:
            continue
        scores = [score for score in ("nll", "kl", "rouge_full", "rouge_reference") if score in one]
        differences = {
            score: bootstrap.interval(np.array(one[score]) - np.array(other[score])) for score in scores
        }
        found.append((label, differences))
    return found


def comparison_table(record: dict[str, Any], score: str, scale: float, digits: int) -> str:
    """Markdown: comparisons down, tasks across; an interval without zero is bold."""
    names = [name for name, task in record["tasks"].items() if score in next(iter(task["samples"].values()))]
    by_task = {name: dict(comparisons(record, name)) for name in names}
    rows = [["first, not second", *names], ["---"] * (1 + len(names))]
    for label in next(iter(by_task.values()), {}):
        cells = [by_task[name][label][score].difference(digits, scale) for name in names]
        rows.append([label, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(tasks: dict[str, list[Line]], path: Path, title: str) -> None:
    """KL from all planes over bits and, below, over measured time per token; a column for each task."""
    optional_package("matplotlib").use("Agg")
    pyplot = optional_package("matplotlib.pyplot")
    has_times = any(line.decode_ms for found in tasks.values() for line in found)
    rows = ["bits", "decode_ms"] if has_times else ["bits"]
    figure, grid = pyplot.subplots(
        len(rows), len(tasks), figsize=(4 * len(tasks), 4.2 * len(rows)), sharey="col", squeeze=False
    )
    for row, field in zip(grid, rows, strict=True):
        for axes, (name, found) in zip(row, tasks.items(), strict=True):
            _draw(axes, found, field)
            axes.set_xlabel("bits, mean over decode passes" if field == "bits" else "ms per decoded token")
            axes.set_title(name)
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
        row[0].set_ylabel("KL from all planes, nats")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, loc="lower center", ncols=6)
    figure.suptitle(title, fontsize="medium")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    try:
        figure.savefig(path, format="png", dpi=100)
    except OSError as error:
        raise BenchmarkError(f"cannot write {path}: {error.strerror}; choose another place") from error


def _draw(axes: Any, found: Sequence[Line], field: str) -> None:
    for family in dict.fromkeys(line.family for line in found):
        shown = [line for line in found if line.family == family and line.kl.value > LEAST_KL]
        shown = sorted((line for line in shown if getattr(line, field)), key=lambda line: line.bits)
        if not shown:
            continue
        colour, marker = STYLES.get(family, ("tab:brown", "P"))
        xs, ys = [getattr(line, field) for line in shown], [line.kl.value for line in shown]
        errors = [
            [line.kl.value - line.kl.low for line in shown],
            [line.kl.high - line.kl.value for line in shown],
        ]
        axes.errorbar(
            xs, ys, yerr=errors, fmt=marker, color=colour, markersize=4, elinewidth=0.7, label=family
        )


def report(record: dict[str, Any], tasks: dict[str, list[Line]], timed: Sequence[str]) -> Iterator[str]:
    """The tables."""
    yield f"## All tasks\n\n{overview(record, tasks, timed)}\n"
    for name, found in tasks.items():
        task = record["tasks"][name]
        count, documents = len(task["documents"]), len(set(task["documents"]))
        yield f"## {name}\n\n{count} prompts of {documents} documents, at most {task['limit']} tokens.\n"
        yield table(found) + "\n"
    yield "## Comparisons\n"
    yield "Difference of the reference's loss, millinats a token (below 0: the first is better)\n"
    yield comparison_table(record, "nll", 1e3, 1) + "\n"
    yield "Difference of KL from all planes, millinats a token (below 0: the first is better)\n"
    yield comparison_table(record, "kl", 1e3, 1) + "\n"
    yield "Difference of ROUGE-L to the answer of all planes (above 0: the first is better)\n"
    yield comparison_table(record, "rouge_full", 1.0, 3) + "\n"


def main() -> None:
    """Print the tables and, as the last line, the comparisons as JSON."""
    parser = argparse.ArgumentParser(description="Tables and pictures of measured policies.")
    parser.add_argument("quality", type=Path, nargs="+", help="of one model; each with other tasks")
    parser.add_argument("--speed", type=Path, nargs="+", default=[], help="each with other tasks")
    parser.add_argument("--plot", type=Path, help="write a PNG")
    args = parser.parse_args()
    record = merged([read(path) for path in args.quality])
    speeds = {name: task for path in args.speed for name, task in read(path)["tasks"].items()}
    tasks = {name: lines(record, speeds, name) for name in record["tasks"]}
    print("\n".join(report(record, tasks, list(speeds))))
    if args.plot:
        plot(tasks, args.plot, f"{record['model']}, {record['date']}")
    found = {name: comparisons(record, name) for name in record["tasks"]}
    plain = {
        name: {
            label: {score: [x.value, x.low, x.high] for score, x in scores.items()} for label, scores in rows
        }
        for name, rows in found.items()
    }
    kept = {key: record[key] for key in ("date", "model", "version", "processor")}
    print(json.dumps({**kept, "comparisons": plain}))


def merged(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record with the tasks of all and the policies that all hold; tasks not begun are left out.

    Raises:
        BenchmarkError: records of different models, or nothing in them.
    """
    first = records[0]
    if any(record["model"] != first["model"] for record in records):
        raise BenchmarkError("the records are of different models; give those of one")
    families = {
        text: family
        for text, family in first["families"].items()
        if all(text in record["families"] for record in records)
    }
    tasks = {name: task for record in records for name, task in record["tasks"].items() if task["documents"]}
    if not tasks:
        raise BenchmarkError("the records hold no prompt; measure first")
    for task in tasks.values():
        task["samples"] = {text: task["samples"][text] for text in families}
    return {**first, "families": families, "tasks": tasks}


def read(path: Path) -> Any:
    """A JSON file of this folder's scripts."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} cannot be read: {error}; measure first") from error


if __name__ == "__main__":
    run_main(main)
