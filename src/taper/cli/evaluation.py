"""What `taper eval` found, as text, as JSON, as a plot and as a card."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taper import __version__
from taper.cli.card import with_error
from taper.cli.terminal import table
from taper.errors import UsageError

if TYPE_CHECKING:
    from taper.evaluate import PerplexityReport, WidthResult
    from taper.evaluate.choices import TaskReport
    from taper.evaluate.generation import GenerationReport
    from taper.evaluate.pareto import Series

# Names on the command line to those of taper.evaluate.
PROTOCOLS = {"windows": ("llama.cpp",), "blocks": ("blocks",), "both": ("llama.cpp", "blocks")}
FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that one run of `taper eval` measured.

    Attributes:
        date: ISO 8601, UTC.
        model: the file or folder; tasks and generation are its.
        text, against: as given.
        reports: file and report, every protocol of one file before the next file.
        tasks, generation: where asked for.
    """

    date: str
    model: Path
    text: str | None
    against: str | None
    reports: tuple[tuple[Path, PerplexityReport], ...]
    tasks: tuple[TaskReport, ...]
    generation: GenerationReport | None


def as_record(found: Evaluation) -> dict[str, Any]:
    """The JSON object: figures with errors, sizes, and all that tells what was measured."""
    from taper.evaluate.statistics import BOOTSTRAP_SEED, NUM_RESAMPLES

    return {
        "model": str(found.model),
        "date": found.date,
        "version": __version__,
        "text": found.text,
        "against": found.against,
        "seed": BOOTSTRAP_SEED,
        "num_resamples": NUM_RESAMPLES,
        "reports": [{"file": str(file), **dataclasses.asdict(report)} for file, report in found.reports],
        "sizes": [dataclasses.asdict(series) for series in _series(found)],
        "tasks": [dataclasses.asdict(task) for task in found.tasks],
        "generation": None if found.generation is None else dataclasses.asdict(found.generation),
    }


def as_text(found: Evaluation) -> str:
    """Tables, each below a line that says what was measured."""
    several = len({file for file, _ in found.reports}) > 1
    parts = [(f"{file.name}: " if several else "") + report_text(report) for file, report in found.reports]
    if found.generation is not None:
        parts.append(_generation_text(found.generation))
    parts += [_task_text(task) for task in found.tasks]
    return "\n\n".join(parts)


def draw(found: Evaluation, png: str) -> None:
    """The Pareto plot of every file, by the first protocol that was measured."""
    from taper.evaluate.pareto import plot

    report = found.reports[0][1]
    reference = Path(found.against or "").resolve().name
    text = Path(found.text or "").name
    title = f"{text}, {report.num_scored:,} tokens scored ({report.label}), against {reference}"
    plot(_series(found), png, title)


def store_card(found: Evaluation, path: Path, text_name: str) -> None:
    """Make the report of `path` its quality card, with today's date."""
    from taper.evaluate.card import card_of, write_card
    from taper.evaluate.perplexity import open_model

    if found.against is None:
        raise UsageError("a card needs a reference", hint="add --against HF_DIR")
    report = next(report for file, report in found.reports if file == path)
    decoder, _ = open_model(path)
    card = card_of(report, decoder, against=found.against, text_name=text_name, date=found.date.split("T")[0])
    write_card(path, card)


def in_blocks(update: Callable[[str, float, float | None], None]) -> Callable[[int, int, float], None]:
    """Translate taper.evaluate's progress to the bar's."""
    return lambda done, total, left_s: update(f"block {done} of {total}", done / total, left_s)


def report_text(report: PerplexityReport) -> str:
    """A report's label and table."""
    header = ["bits", "perplexity", "bits/byte"]
    has_reference = any(result.increase_frac is not None for result in report.results)
    if has_reference:
        header += ["increase", "top-1", "KL mean, nats", "median", "99.9 %"]
    rows = [_row(result, has_reference) for result in report.results]
    scored = f"{report.num_blocks} blocks, {report.num_scored:,} tokens scored"
    return f"{report.label}: {scored}\n{table(header, rows)}"


def _row(result: WidthResult, has_reference: bool) -> list[str]:
    cells = [
        _bits(result.bits),
        with_error(result.perplexity, result.standard_error, ".4f"),
        f"{result.bits_per_byte:.4f}",
    ]
    if has_reference:
        cells += [
            with_error(result.increase_frac, result.increase_standard_error, "+.2%"),
            with_error(result.top1_agreement, result.top1_standard_error, ".2%"),
            with_error(result.mean_kl, result.mean_kl_standard_error, ".5f"),
            with_error(result.median_kl, result.median_kl_standard_error, ".5f"),
            with_error(result.p999_kl, result.p999_kl_standard_error, ".3f"),
        ]
    return cells


def _generation_text(report: GenerationReport) -> str:
    rows = [
        [
            _bits(result.bits),
            with_error(result.rouge_l, result.rouge_l_standard_error, ".4f"),
            with_error(result.prefix_tokens, result.prefix_tokens_standard_error, ".1f"),
            f"{result.identical_frac:.1%}",
        ]
        for result in report.results
    ]
    title = (
        f"greedy continuations: {report.num_prompts} prompts of {report.prompt_tokens} tokens, "
        f"{report.new_tokens} new ones, against the float model's"
    )
    return f"{title}\n{table(['bits', 'ROUGE-L F1', 'same tokens', 'identical'], rows)}"


def _task_text(report: TaskReport) -> str:
    rows = [
        [
            _bits(result.bits),
            with_error(result.accuracy, result.accuracy_standard_error, ".2%"),
            with_error(result.normalised_accuracy, result.normalised_accuracy_standard_error, ".2%"),
            with_error(result.agreement, result.agreement_standard_error, ".2%"),
        ]
        for result in report.results
    ]
    num_cut = max(result.num_cut for result in report.results)
    cut = f"; {num_cut} contexts lost their beginning to fit the model's" if num_cut else ""
    header = ["bits", "accuracy", "per character", "as float"]
    return f"{report.name}: {report.num_items:,} items{cut}\n{table(header, rows)}"


def _series(found: Evaluation) -> list[Series]:
    """Sizes and KL of every `.taper` file, by its first protocol."""
    from taper.evaluate.pareto import Series, points_of
    from taper.evaluate.perplexity import open_model

    first: dict[Path, PerplexityReport] = {}
    for file, report in found.reports:
        first.setdefault(file, report)
    return [
        Series(file.stem, points_of(report, open_model(file)[0]))
        for file, report in first.items()
        if not file.is_dir()
    ]


def _bits(bits: float) -> str:
    return "float" if bits == FLOAT_BITS else f"{bits:g}"
