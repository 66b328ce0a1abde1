"""`taper eval`: perplexity, KL divergence, generation agreement and tasks, at several widths of a file."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from taper.cli.evaluation import (
    PROTOCOLS,
    Evaluation,
    as_record,
    as_text,
    draw,
    in_blocks,
    store_card,
)
from taper.cli.options import WidthList, kv_option, model_path, set_threads, threads_option
from taper.cli.terminal import progress_bar
from taper.errors import UsageError

if TYPE_CHECKING:
    from taper.evaluate.choices import TaskReport
    from taper.evaluate.generation import GenerationReport

_STDOUT = "-"


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What the command line asks for."""

    model: Path
    others: tuple[str, ...]
    text: str | None
    bits: tuple[float, ...] | None
    protocol: str
    against: str | None
    max_blocks: int | None
    tasks: tuple[str, ...]
    max_items: int | None
    generation: int | None
    kv: str | None = None


@click.command("eval")
@click.argument("model", required=False)
@click.option("--text", metavar="TEXT", help="Held-out text, .txt or .txt.xz.")
@click.option("--bits", type=WidthList(), help="Widths to measure, as in 4,3.3,2; default: all whole ones.")
@click.option(
    "--protocol",
    type=click.Choice(list(PROTOCOLS)),
    default="windows",
    show_default=True,
    help="windows: llama.cpp's 512 tokens, second half scored; blocks: 2048 tokens, all scored.",
)
@click.option(
    "--against", metavar="HF_DIR", help="Float checkpoint to compare with: increase, KL, agreement."
)
@click.option("--max-blocks", type=click.IntRange(1), metavar="N", help="Only the first N blocks of TEXT.")
@click.option("--tasks", metavar="FILE,...", help="Multiple-choice files, .jsonl (docs/evaluation.md).")
@click.option("--max-items", type=click.IntRange(1), metavar="N", help="N items of each task, evenly spaced.")
@click.option(
    "--generation",
    type=click.IntRange(1),
    metavar="N",
    help="Compare greedy continuations of N prompts from TEXT with the float model's.",
)
@click.option(
    "--also",
    multiple=True,
    metavar="FILE",
    help="Another file at the same widths on the same text; repeatable.",
)
@click.option("--plot", "png", metavar="OUT.png", help="Draw KL against bytes (needs the extra plots).")
@click.option("--write-card", is_flag=True, help="Store the figures as MODEL's quality card.")
@click.option(
    "--json",
    "json_out",
    is_flag=False,
    flag_value=_STDOUT,
    metavar="[OUT]",
    help="Write JSON to OUT; without OUT, print it instead of text.",
)
@kv_option
@threads_option
def command(
    model: str | None,
    text: str | None,
    bits: tuple[float, ...] | None,
    protocol: str,
    against: str | None,
    max_blocks: int | None,
    tasks: str | None,
    max_items: int | None,
    generation: int | None,
    also: tuple[str, ...],
    png: str | None,
    write_card: bool,
    json_out: str | None,
    kv: str | None,
    threads: int | None,
) -> None:
    """Measure MODEL (a .taper file or a Hugging Face folder; default: the one in the package).

    With --text: perplexity, and with --against its increase, KL divergence and agreement, each with its
    standard error. With --tasks: accuracy by log-likelihood.
    """
    set_threads(threads)
    names = tuple(name for name in (tasks or "").split(",") if name)
    options = EvalOptions(
        model_path(model), also, text, bits, protocol, against, max_blocks, names, max_items, generation, kv
    )
    _check(options, png, write_card)
    found = _evaluate(options)
    if write_card:
        store_card(found, options.model, Path(options.text or "").name)
    if png is not None:
        draw(found, png)
    if json_out != _STDOUT:
        click.echo(as_text(found))
    if json_out is not None:
        line = json.dumps(as_record(found))
        if json_out == _STDOUT:
            click.echo(line)
        else:
            _write_text(json_out, line + "\n")


def _check(options: EvalOptions, png: str | None, write_card: bool) -> None:
    """Refuse what cannot be done before hours of measuring."""
    if options.text is None and not options.tasks:
        raise UsageError("nothing to measure: neither --text nor --tasks", hint="add --text TEXT")
    for name, is_asked in (("--plot", png is not None), ("--write-card", write_card),
                           ("--generation", options.generation is not None)):  # fmt: skip
        if is_asked and (options.text is None or options.against is None):
            raise UsageError(f"{name} needs --text and --against", hint="add the missing one")
    if write_card and (len(PROTOCOLS[options.protocol]) > 1 or options.model.is_dir()):
        raise UsageError(
            "--write-card takes one protocol and a .taper file", hint="choose --protocol windows or blocks"
        )
    if write_card and options.kv is not None:
        raise UsageError(
            "--write-card stores figures of the file as it is read by itself", hint="leave --kv out"
        )
    if png is not None and not Path(png).resolve().parent.is_dir():
        raise UsageError(f"folder {Path(png).parent} does not exist", hint="make it first")


def _evaluate(options: EvalOptions) -> Evaluation:
    """Run everything that was asked for."""
    from taper.evaluate import measure_perplexity

    files = [options.model, *map(Path, options.others)]
    reports = []
    if options.text is not None:
        for file in files:
            for name in PROTOCOLS[options.protocol]:
                with progress_bar(f"{file.name} {name}") as update:
                    report = measure_perplexity(
                        file,
                        options.text,
                        bits=options.bits,
                        protocol=name,
                        against=options.against,
                        max_blocks=options.max_blocks,
                        progress=in_blocks(update),
                        kv=options.kv,
                    )
                reports.append((file, report))
    return Evaluation(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=options.model,
        text=options.text,
        against=options.against,
        reports=tuple(reports),
        tasks=tuple(_tasks(options)),
        generation=_generation(options),
    )


def _tasks(options: EvalOptions) -> list[TaskReport]:
    if not options.tasks:
        return []
    from taper.evaluate.choices import measure_tasks
    from taper.evaluate.tasks import read_task

    tasks = [read_task(path, options.max_items) for path in options.tasks]
    with progress_bar("tasks") as update:
        return measure_tasks(
            options.model,
            tasks,
            bits=options.bits,
            against=options.against,
            progress=lambda what, done: update(what, done, None),
            kv=options.kv,
        )


def _generation(options: EvalOptions) -> GenerationReport | None:
    if options.generation is None:
        return None
    from taper.evaluate.generation import measure_generation

    assert options.text is not None
    assert options.against is not None
    with progress_bar("generation") as update:
        return measure_generation(
            options.model,
            options.text,
            options.against,
            num_prompts=options.generation,
            bits=options.bits,
            progress=lambda what, done: update(what, done, None),
            kv=options.kv,
        )


def _write_text(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint="choose another place") from error
