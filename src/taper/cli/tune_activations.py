"""`taper tune --activations`: bits of activations and KV cache that hold a loss, found, tested and stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taper.cli.terminal import progress_bar, table
from taper.errors import CorruptFileError, UsageError

if TYPE_CHECKING:
    from taper.tune.activations import ActivationReport
    from taper.tune.anda_search import Evaluation


def tune_activations_of(
    model: str,
    given: dict[str, Any],
    texts: tuple[str, ...],
    search: str,
    max_loss: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Search and store.

    Args:
        model: the file.
        given: other options that were given, by parameter name; those of schedules are refused.
        texts: of one domain each; none, and the model writes its own.
        search: `paper` or `joint`.
        max_loss: limit of the loss.
        dry_run: leave the file as it is.
        as_json: print the record as one JSON object.

    Raises:
        UsageError: an option that does not belong here; else as `taper.tune.activations.tune_activations`.
    """
    stray = sorted(given.keys() - {"model", "activations", "text", "search", "max_loss", "widths", "dry_run",
                                   "threads", "as_json"})  # fmt: skip
    if stray:
        raise UsageError(f"--{stray[0].replace('_', '-')} does not go with --activations", "leave it out")
    from taper.formats.container import TaperFile
    from taper.tune.activation_spaces import ActivationOptions
    from taper.tune.activations import tune_activations

    if TaperFile.open(model).is_truncated and not dry_run:
        raise CorruptFileError(f"{model} is cut off: only a whole file takes bits", hint="add --dry-run")
    options = ActivationOptions(tuple(map(Path, texts)), max_loss, _width(given.get("widths")), search)
    shown = _Trace(as_json)
    with progress_bar("tune") as update:
        report = tune_activations(model, options, shown, lambda what, done: update(what, done, None))
    click.echo(json.dumps(report.to_dict()) if as_json else _text(report, max_loss))
    if report.chosen is None:
        raise UsageError("no combination is surely within the limit", "allow a larger --max-loss")
    if not dry_run:
        _store(model, report)
        click.echo(f"{model}: stored; every command reads it with these bits", err=True)


def _width(widths: tuple[float, ...] | None) -> int | None:
    if widths is None:
        return None
    if len(widths) != 1 or widths[0] != int(widths[0]):
        raise UsageError(
            f"--activations takes one whole width of the weights, not {len(widths)}", "as in --widths 4"
        )
    return int(widths[0])


class _Trace:
    """Prints each evaluation as it is made."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._count = quiet, 0

    def __call__(self, tried: Evaluation) -> None:
        self._count += 1
        if not self._quiet:
            bits = " ".join(map(str, tried.bits))
            verdict = "best so far" if tried.is_best else ""
            click.echo(
                f"{self._count:3}  {bits}  cost {tried.cost:.4g}  loss {tried.loss:+.3%}  {verdict}", err=True
            )


def _text(report: ActivationReport, max_loss: float) -> str:
    rows = [
        [
            " ".join(map(str, tested.bits)),
            f"{tested.loss:+.3%}",
            f"{tested.bound:+.3%}",
            "yes" if tested.bound <= max_loss else "no",
        ]
        for tested in report.tested
    ]
    limit = "" if report.result.is_finished else " (the limit)"
    calibrated, held_out = report.num_tokens
    lines = [
        f"{', '.join(report.names)}; weights at {report.bits} bits; "
        f"{len(report.result.evaluations)} evaluations{limit} on {calibrated:,} tokens "
        f"of {' and '.join(report.texts)}",
        table(["best so far", f"loss on {held_out:,} held-out tokens", "95 % bound", "within"], rows),
    ]
    if report.winner is not None and report.saving is not None:
        what = (
            "bit operations than float16 activations" if len(report.names) == 4 else "cost than the reference"
        )
        lines.append(
            f"chosen: {' '.join(map(str, report.winner.bits))}, {report.saving:.2f} times less {what}"
        )
    return "\n".join(lines)


def _store(model: str, report: ActivationReport) -> None:
    from taper.formats.container import TaperFile
    from taper.formats.writer import rewrite_header

    assert report.chosen is not None
    rewrite_header(model, replace(TaperFile.open(model).header, activations=report.chosen))
