"""`taper tune`: find the cheapest schedule of bits whose loss on a task is surely within a limit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from taper.cli.options import SHARE, WidthList, json_option, set_threads, threads_option
from taper.cli.terminal import progress_bar, table
from taper.errors import CorruptFileError, UsageError

if TYPE_CHECKING:
    from taper.tune.report import Row, TuneReport

_LOSSES = ("likelihood", "kl", "rouge", "rouge-model")
_OBJECTIVES = ("time", "bits", "energy")


@click.command("tune")
@click.argument("model", metavar="FILE")
@click.option(
    "--task",
    metavar="[NAME=]PATH",
    help="Prompts: a text (.txt, .txt.xz) to continue, or JSON lines (.jsonl, .jsonl.xz).",
)
@click.option(
    "--learned", is_flag=True, help="Train the policy `learned` on --text instead (docs/learned.md)."
)
@click.option(
    "--activations",
    is_flag=True,
    help="Find bits of activations and KV cache on --text instead (docs/anda.md).",
)
@click.option(
    "--search",
    type=click.Choice(["paper", "joint"]),
    default="paper",
    show_default=True,
    help="With --activations: Anda's, by bit operations; or with keys, values and bands, by time and bytes.",
)
@click.option(
    "--text",
    multiple=True,
    metavar="TEXT",
    help="Generic text for --learned; one or more domains for --activations (.txt, .txt.xz), which without "
    "any reads what the model writes itself.",
)
@click.option("--max-loss", type=SHARE, default="1%", show_default=True, help="Limit of the loss.")
@click.option(
    "--loss",
    type=click.Choice(_LOSSES),
    default="likelihood",
    show_default=True,
    help="What the limit is of (docs/tuning.md).",
)
@click.option(
    "--objective",
    type=click.Choice(_OBJECTIVES),
    default="time",
    show_default=True,
    help="What to save: measured time, bits, or measured energy.",
)
@click.option("--high", type=float, metavar="B", help="Uniform width to compare with; default: the largest.")
@click.option("--widths", type=WidthList(), help="Widths to choose from; default: all whole ones up to it.")
@click.option("--segments", type=click.IntRange(1), default=8, show_default=True, help="Of an answer.")
@click.option(
    "--search-prompts", type=click.IntRange(1), default=32, show_default=True, help="To find schedules with."
)
@click.option(
    "--prompts",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Held out, to test schedules with.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Of a prompt; of JSON lines, at most.",
)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest answer.")
@click.option("--against", metavar="HF_DIR", help="Float checkpoint to compare with (kl, rouge-model).")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the prompts.")
@click.option("--work", metavar="DIR", help="Unfinished work; default: FILE.tune-NAME.partial.")
@click.option("--dry-run", is_flag=True, help="Report only; leave FILE as it is.")
@threads_option
@json_option
def command(
    model: str,
    task: str | None,
    learned: bool,
    activations: bool,
    search: str,
    text: tuple[str, ...],
    max_loss: float,
    loss: str,
    objective: str,
    high: float | None,
    widths: tuple[float, ...] | None,
    segments: int,
    search_prompts: int,
    prompts: int,
    prompt_tokens: int,
    max_tokens: int,
    against: str | None,
    seed: int,
    work: str | None,
    dry_run: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Find the cheapest schedule of bits for a task and store it in FILE under the task's name.

    A schedule is accepted only if the 95 % upper confidence bound of its loss on held-out prompts is below
    the limit. An interrupted run goes on where it was. Then: taper run FILE --policy NAME.
    """
    set_threads(threads)
    if activations:
        from taper.cli.tune_activations import tune_activations_of
        from taper.cli.tune_learned import given_options

        return tune_activations_of(model, given_options(), text, search, max_loss, dry_run, as_json)
    if learned:
        from taper.cli.tune_learned import learn_from

        if len(text) > 1:
            raise UsageError(f"--learned takes one text, not {len(text)}")
        return learn_from(model, text[0] if text else None, widths, dry_run, as_json)
    if task is None or text:
        raise UsageError(
            "--task says what to tune for; --text belongs to --learned",
            hint="give --task [NAME=]PATH, or --learned --text TEXT",
        )
    name, path = _named(task)
    _check_storable(model, name, dry_run)
    from taper.tune.tuner import TuneOptions, tune

    options = TuneOptions(
        task=name,
        path=path,
        work=Path(work if work is not None else f"{model}.tune-{name}.partial"),
        max_loss=max_loss,
        loss=loss,
        objective=objective,
        high_bits=None if high is None else (int(high) if high == int(high) else high),
        widths=widths,
        num_segments=segments,
        search_prompts=search_prompts,
        held_out_prompts=prompts,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        against=None if against is None else Path(against),
        seed=seed,
    )
    with progress_bar("tune") as update:
        report = tune(model, options, update)
    click.echo(json.dumps(report.to_dict()) if as_json else _text(report))
    if report.winner is not None and not dry_run:
        _store(model, report)
        click.echo(f"{model}: stored as {name}: taper run {model} --policy {name}", err=True)


def _named(task: str) -> tuple[str, Path]:
    """Name and path; without a name, that of the file up to its first dot."""
    name, equals, path = task.partition("=")
    if not equals:
        name, path = Path(task).name.split(".")[0], task
    from taper.precision.parse import KINDS

    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", name, re.ASCII) or name in KINDS:
        raise UsageError(
            f"{name!r} cannot name a policy; it takes letters, digits, _ . - and begins with a letter, and "
            f"{', '.join(KINDS)} are taken",
            hint="name it: --task NAME=PATH",
        )
    return name, Path(path)


def _check_storable(model: str, name: str, dry_run: bool) -> None:
    """Refuse before the search what cannot be done after it."""
    from taper.formats.container import TaperFile

    file = TaperFile.open(model)
    if file.is_truncated and not dry_run:
        raise CorruptFileError(
            f"{model} is cut off: only a whole file takes a policy",
            hint="copy or download the file again, or add --dry-run",
        )


def _store(model: str, report: TuneReport) -> None:
    """Add the winner's policy and its evidence to the header; the tensors stay what they are."""
    from taper.formats.container import TaperFile
    from taper.formats.writer import rewrite_header

    assert report.winner is not None
    assert report.winner.policy is not None
    header = TaperFile.open(model).header
    tuned = header.provenance.get("tuned", {}) | {report.task: report.evidence()}
    rewrite_header(
        model,
        dataclasses.replace(
            header,
            policies=header.policies | {report.task: report.winner.policy},
            provenance=header.provenance | {"tuned": tuned},
        ),
    )


def _text(report: TuneReport) -> str:
    num = report.num_schedules
    lines = [
        f"{report.task}: answers of {report.max_tokens} tokens to prompts of {report.prompt_tokens}, "
        f"{num:,} schedules of {report.num_segments} segments searched on {report.search_prompts} prompts",
        f"loss: {report.loss_summary}; {report.held_out_prompts} held-out prompts of "
        f"{report.held_out_documents} documents, compared with {report.reference}",
        "",
        _costs(report),
        "",
        _candidates(report),
    ]
    rows = [*([report.shown] if report.shown else []), *report.controls]
    header = ["", "bits", "mean bits", "cost", "saved", "in engine", "loss", "95 % bound", "beyond"]
    lines += ["", table(header, [_cells(row, report) for row in rows]), "", _verdict(report)]
    return "\n".join(lines)


def _costs(report: TuneReport) -> str:
    rows = [
        [f"{bits:g}", f"{report.prefill_costs[bits]:.3g}", f"{cost:.3g}"]
        for bits, cost in sorted(report.decode_costs.items(), reverse=True)
    ]
    return table(["bits", f"prompt, {report.unit}", f"decode pass, {report.unit}"], rows)


def _candidates(report: TuneReport) -> str:
    """The ladder as it was climbed."""
    if not report.candidates:
        return "no schedule but uniform high is within the limit on the search prompts"
    rows = [
        [
            row.bits,
            f"{row.saved_frac:.1%}",
            f"{row.search_loss:.3%}" if row.search_loss is not None else "",
            f"{row.loss:.3%} ± {row.standard_error:.3%}",
            f"{row.upper:.3%}",
            "yes" if row.upper < report.max_loss else "no",
        ]
        for row in report.candidates
    ]
    return table(["candidate", "saved", "in search", "loss", "95 % bound", "passed"], rows)


def _cells(row: Row, report: TuneReport) -> list[str]:
    beyond = ""
    if row.beyond_winner is not None and row.beyond_winner_error is not None:
        beyond = f"{row.beyond_winner:+.3%} ± {row.beyond_winner_error:.3%}"
    return [
        row.role,
        row.bits if len(row.bits) <= 40 else f"{row.bits[:37]}...",
        f"{row.average_bits:.2f}",
        f"{row.cost:.3f} {report.unit}",
        f"{row.saved_frac:.1%}",
        "" if row.token_ms is None else f"{row.token_ms:.3f} ms",
        f"{row.loss:+.3%} ± {row.standard_error:.3%}",
        f"{row.upper:.3%}",
        beyond,
    ]


def _verdict(report: TuneReport) -> str:
    if report.winner is None:
        return (
            f"no schedule holds the limit of {report.max_loss:.2%} with confidence: "
            f"stay at {report.high_bits:g} bits, give more prompts, or allow more"
        )
    row, in_engine = report.winner, report.engine_saved_frac
    timed = "" if in_engine is None else f" ({in_engine:.1%} of its time in the engine)"
    return (
        f"{row.policy} saves {row.saved_frac:.1%} of {report.high_bits:g} bits' {report.objective}{timed}; "
        f"loss {row.loss:+.3%}, with {report.confidence:.0%} confidence below {row.upper:.3%}"
    )
