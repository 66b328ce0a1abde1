"""PMPD's NPU figures (arXiv 2410.13461) from bytes alone: speed-up over fp16 of three models on three tasks.

python benchmarks/pmpd/npu.py [--plot npu.png]

A decode step reads every linear layer once and the keys and values of its context once, so

    tokens/s = bandwidth / (P * bits / 8 + KV bytes of a token * context)

with P the weights of the linear layers, head included. One bandwidth holds for all cells, and one prompt
length for a task; nothing is tuned by cell. `docs/pmpd.md` says what the figures mean.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "llama_cpp"))

from common import BenchmarkError, run_main
from gguf_models import optional_package

# LPDDR class. Both absolute speeds that are known give it: 2.43 tokens/s * 13.2 GB = 32.1, 12.5 * 2.6 = 32.5.
BANDWIDTH = 32e9
FP16_BITS = 16.0
FP16_BYTES = 2
TOLERANCE = 0.10
# A token is about 3/4 of an English word in vocabularies of 32,000 to 51,200 tokens.
TOKENS_PER_WORD = 4 / 3
# The chat template and a one-line instruction.
INSTRUCTION_TOKENS = 30
# Context scales that the fit tries, in steps of a hundredth.
SCALES = tuple(step / 100 for step in range(0, 151))
KINDS = ("uniform", "static", "learned")


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's published dimensions.

    Attributes:
        layers, hidden, ffn, vocab: as in the model's config.json; every head has its own keys and values.
        ffn_matrices: 3 with a gate, 2 without.
        high, low: the paper's pair of widths, p_h and p_l.
        source: where the dimensions are from.
    """

    layers: int
    hidden: int
    ffn: int
    ffn_matrices: int
    vocab: int
    high: int
    low: int
    source: str

    @property
    def weights(self) -> int:
        """Of all linear layers, head included."""
        layer = 4 * self.hidden**2 + self.ffn_matrices * self.hidden * self.ffn
        return self.layers * layer + self.vocab * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in fp16."""
        return 2 * self.layers * self.hidden * FP16_BYTES


@dataclass(frozen=True, slots=True)
class Task:
    """What a task asks of every model.

    Attributes:
        document_tokens: of the text in the prompt.
        source: of that number.
    """

    document_tokens: float
    source: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One model on one task, as published.

    Attributes:
        limit: the task's token limit for this model, L.
        switch: s, the decode forwards at p_h of the static schedule.
        static_bits, learned_bits: average bits as the paper's code logs them.
        speedups: over fp16: uniform p_h, static, learned.
        circular: schedules whose bits are known from the speed-ups alone, so that theirs test nothing.
    """

    model: str
    task: str
    limit: int
    switch: int
    static_bits: float
    learned_bits: float
    speedups: tuple[float, float, float]
    circular: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A speed-up, published and computed.

    Attributes:
        logged_bits: average as published; bits: over all decode forwards, the first one included.
        is_circular: bits known from the speed-up alone.
        from_facts: speed-up with the context of the task's statistics; deviation of it from the published.
        fitted: the same with all contexts times one number; fitted_deviation likewise.
    """

    model: str
    task: str
    kind: str
    logged_bits: float
    bits: float
    context: float
    is_circular: bool
    published: float
    from_facts: float
    deviation: float
    fitted: float
    fitted_deviation: float


SHAPES = {
    "Vicuna-7B": Shape(32, 4096, 11008, 3, 32000, 3, 2, "config.json of lmsys/vicuna-7b-v1.5"),
    "MobileLLaMA-1.4B": Shape(24, 2048, 5632, 3, 32000, 4, 3, "MobileVLM, arXiv 2312.16886, table 2"),
    "Phi-1.5": Shape(24, 2048, 8192, 2, 51200, 4, 3, "config.json of microsoft/phi-1_5"),
}
TASKS = {
    "CNN/DM": Task(781 * TOKENS_PER_WORD, "781 words an article, dataset card"),
    "Dialogsum": Task(129 * TOKENS_PER_WORD, "129 words a dialogue, counted in the validation split"),
    "IWSLT": Task(60, "the paper's filter: more than 60 tokens; a lower bound"),
}
# Average bits that only the speed-ups tell are good to 0.05 or 0.1 ("3.1 to 3.2" counts as 3.15).
CELLS = (
    Cell("Vicuna-7B", "CNN/DM", 120, 40, 2.39, 2.43, (4.9, 6.1, 5.9)),
    Cell("Vicuna-7B", "Dialogsum", 33, 0, 2.00, 2.74, (5.2, 8.0, 5.9)),
    Cell("Vicuna-7B", "IWSLT", 60, 40, 2.65, 2.30, (5.3, 6.0, 6.9), ("static", "learned")),
    Cell("MobileLLaMA-1.4B", "CNN/DM", 256, 85, 3.37, 3.19, (3.5, 4.1, 4.3)),
    Cell("MobileLLaMA-1.4B", "Dialogsum", 33, 0, 3.00, 3.15, (3.9, 5.2, 5.0), ("static", "learned")),
    Cell("MobileLLaMA-1.4B", "IWSLT", 60, 40, 3.65, 3.50, (4.0, 4.4, 4.6), ("learned",)),
    Cell("Phi-1.5", "CNN/DM", 256, 170, 3.71, 3.10, (3.5, 3.8, 4.4), ("learned",)),
    Cell("Phi-1.5", "Dialogsum", 33, 11, 3.30, 3.52, (3.9, 4.8, 4.5)),
)
# Tokens per second in fp16, and the greatest gain over uniform p_h (Vicuna-7B on Dialogsum, static).
FP16_SPEEDS = {"Vicuna-7B": 2.43, "MobileLLaMA-1.4B": 12.5}
HEADLINE = 1.54


def context_of(cell: Cell) -> float:
    """Mean tokens that a decode step attends to: the prompt, and half of an answer of full length."""
    return INSTRUCTION_TOKENS + TASKS[cell.task].document_tokens + cell.limit / 2


def tokens_per_second(shape: Shape, bits: float, context: float) -> float:
    """Of one sequence that decodes."""
    return BANDWIDTH / (shape.weights * bits / 8 + shape.kv_bytes * context)


def speedup(shape: Shape, bits: float, context: float) -> float:
    """Over fp16 weights at the same context. Time is linear in bits, so average bits give average time."""
    fp16 = tokens_per_second(shape, FP16_BITS, context)
    return tokens_per_second(shape, bits, context) / fp16


def real_bits(logged: float, high: int, forwards: int) -> float:
    """Average over all decode forwards of what the paper's code logs.

    Its first decode forward always runs at p_h and is not logged: s forwards at p_h are s - 1 in the log.
    """
    return (high + (forwards - 1) * logged) / forwards


def schedule_bits(cell: Cell) -> float:
    """Average over the decode forwards of the static schedule where the answer runs to the limit."""
    shape = SHAPES[cell.model]
    high = max(1, cell.switch)
    return (high * shape.high + (cell.limit - high) * shape.low) / cell.limit


def bits_of(cell: Cell, kind: str) -> tuple[float, float]:
    """Logged and real average bits."""
    high = SHAPES[cell.model].high
    logged = {"uniform": float(high), "static": cell.static_bits, "learned": cell.learned_bits}[kind]
    return logged, real_bits(logged, high, cell.limit)


def predictions(scale: float) -> list[float]:
    """Speed-ups of all cells and kinds, contexts times `scale`."""
    return [
        speedup(SHAPES[cell.model], bits_of(cell, kind)[1], scale * context_of(cell))
        for cell in CELLS
        for kind in KINDS
    ]


def published() -> list[float]:
    """The paper's speed-ups in the same order."""
    return [value for cell in CELLS for value in cell.speedups]


def fitted_scale() -> float:
    """The one factor on all contexts with the least sum of squared logarithms of computed over published."""

    def loss(scale: float) -> float:
        pairs = zip(predictions(scale), published(), strict=True)
        return math.fsum(math.log(have / want) ** 2 for have, want in pairs)

    return min(SCALES, key=loss)


def rows() -> list[Row]:
    """All speed-ups, published beside computed."""
    keys = [(cell, kind) for cell in CELLS for kind in KINDS]
    found = zip(keys, published(), predictions(1.0), predictions(fitted_scale()), strict=True)
    return [_row(cell, kind, *values) for (cell, kind), *values in found]


def _row(cell: Cell, kind: str, want: float, facts: float, fitted: float) -> Row:
    return Row(
        cell.model, cell.task, kind, *bits_of(cell, kind), context_of(cell), kind in cell.circular,
        want, facts, facts / want - 1, fitted, fitted / want - 1,
    )  # fmt: skip


def table(found: Sequence[Row]) -> str:
    """Markdown; a deviation beyond the tolerance is bold."""
    lines = [
        "| model | task | schedule | bits logged | bits | published | computed | off | fitted | off |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        logged = f"{'≈ ' if row.is_circular else ''}{row.logged_bits:.2f}"
        cells = [
            row.model, row.task, row.kind, logged, f"{row.bits:.2f}", f"{row.published:.1f}",
            f"{row.from_facts:.2f}", _percent(row.deviation),
            f"{row.fitted:.2f}", _percent(row.fitted_deviation),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(deviation: float) -> str:
    text = f"{100 * deviation:+.1f} %"
    return text if abs(deviation) <= TOLERANCE else f"**{text}**"


def absolute_table() -> str:
    """Tokens per second in fp16: published, without keys and values, and at the contexts of the tasks."""
    lines = [
        "| model | weights, fp16 | KV of a token | published tok/s | no context | shortest | longest |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shape in SHAPES.items():
        contexts = sorted(context_of(cell) for cell in CELLS if cell.model == name)
        want = FP16_SPEEDS.get(name)
        speeds = [tokens_per_second(shape, FP16_BITS, n) for n in (0.0, contexts[0], contexts[-1])]
        shown = [f"{v:.2f}" + (f" ({_percent(v / want - 1)})" if want else "") for v in speeds]
        size = shape.weights * FP16_BYTES / 1e9
        known = f"{want:g}" if want else ""
        lines.append(
            f"| {name} | {size:.2f} GB | {shape.kv_bytes / 1e3:.0f} kB | {known} | {' | '.join(shown)} |"
        )
    return "\n".join(lines)


def schedules_table() -> str:
    """What the published switch points come to, beside the published averages."""
    lines = ["| model | task | s of L | bits at full length | from the log |", "|---|---|---|---|---|"]
    for cell in CELLS:
        real = bits_of(cell, "static")[1]
        lines.append(
            f"| {cell.model} | {cell.task} | {cell.switch} of {cell.limit} | {schedule_bits(cell):.2f} "
            f"| {real:.2f} |"
        )
    return "\n".join(lines)


def summary(found: Sequence[Row]) -> dict[str, Any]:
    """How many figures are within the tolerance, how far the others are, and the headline."""
    vicuna = next(cell for cell in CELLS if cell.model == "Vicuna-7B" and cell.task == "Dialogsum")
    static, uniform = (
        next(r for r in found if (r.model, r.task, r.kind) == (vicuna.model, vicuna.task, kind))
        for kind in ("static", "uniform")
    )
    return {
        "num_figures": len(found),
        "num_circular": sum(row.is_circular for row in found),
        "within_from_facts": sum(abs(row.deviation) <= TOLERANCE for row in found),
        "within_from_facts_not_circular": sum(
            abs(row.deviation) <= TOLERANCE for row in found if not row.is_circular
        ),
        "within_fitted": sum(abs(row.fitted_deviation) <= TOLERANCE for row in found),
        "largest_deviation_from_facts": max((row.deviation for row in found), key=abs),
        "largest_deviation_fitted": max((row.fitted_deviation for row in found), key=abs),
        "median_deviation_from_facts": statistics.median(abs(row.deviation) for row in found),
        "median_deviation_fitted": statistics.median(abs(row.fitted_deviation) for row in found),
        "fitted_scale": fitted_scale(),
        "headline_published": HEADLINE,
        "headline": static.from_facts / uniform.from_facts,
        "headline_fitted": static.fitted / uniform.fitted,
    }


def plot(found: Sequence[Row], path: Path) -> None:
    """Computed over published, a panel for each of the two readings of the context."""
    optional_package("matplotlib").use("Agg")
    pyplot = optional_package("matplotlib.pyplot")
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    for axes, field, title in zip(
        panels, ("from_facts", "fitted"), ("contexts of the tasks", "one factor on all contexts"), strict=True
    ):
        for marker, task in zip("os^", TASKS, strict=True):
            for colour, kind in zip(("tab:gray", "tab:blue", "tab:orange"), KINDS, strict=True):
                chosen = [row for row in found if row.task == task and row.kind == kind]
                xs, ys = [row.published for row in chosen], [getattr(row, field) for row in chosen]
                axes.plot(xs, ys, marker, color=colour, label=f"{task}, {kind}")
        ends = (3, 8.5)
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.fill_between(ends, [0.9 * x for x in ends], [1.1 * x for x in ends], color="black", alpha=0.08)
        axes.set(title=title, xlabel="published speed-up over fp16", xlim=ends)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("computed")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise BenchmarkError(f"cannot write {path}: {error.strerror}; choose another place") from error


def report(found: Sequence[Row]) -> Iterator[str]:
    """What is printed before the JSON."""
    yield table(found)
    yield ""
    yield absolute_table()
    yield ""
    yield schedules_table()
    figures = summary(found)
    yield ""
    yield (
        f"{figures['within_from_facts']} of {figures['num_figures']} within {100 * TOLERANCE:.0f} %, "
        f"{figures['within_fitted']} with all contexts times {figures['fitted_scale']:g}; "
        f"headline {HEADLINE:g}: {figures['headline']:.2f} and {figures['headline_fitted']:.2f}"
    )


def main() -> None:
    """Print the tables and, as the last line, everything as JSON."""
    parser = argparse.ArgumentParser(description="PMPD's NPU figures from bytes.")
    parser.add_argument("--plot", type=Path, help="write a PNG")
    args = parser.parse_args()
    found = rows()
    print("\n".join(report(found)))
    if args.plot:
        plot(found, args.plot)
    record = {"bandwidth": BANDWIDTH, **summary(found), "rows": [asdict(row) for row in found]}
    record["shapes"] = {name: {**asdict(s), "weights": s.weights} for name, s in SHAPES.items()}
    record["tasks"] = {name: asdict(task) for name, task in TASKS.items()}
    print(json.dumps(record))


if __name__ == "__main__":
    run_main(main)
