"""`taper plan`: what the planner needs to know of this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taper.cli.options import WidthList, json_option, model_path, set_threads, threads_option
from taper.cli.terminal import note, table
from taper.errors import UsageError

if TYPE_CHECKING:
    from taper.planner.calibration import Calibration

# Of the table: passes that a server runs.
_SHOWN = ((1, 0), (4, 0), (8, 0), (16, 0), (32, 0), (0, 64), (16, 64))
_SHOWN_DEPTH = 128


@click.command("plan")
@click.option("--calibrate", metavar="FILE", help="Measure passes of a .taper file; `-`: the embedded one.")
@click.option("--bits", type=WidthList(), help="Widths to measure; default: all whole ones in the file.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON to write; default: in the user's cache.")
@threads_option
@json_option
def command(calibrate: str | None, threads: int | None, **options: Any) -> None:
    """Measure how long passes take on this machine, for a server that keeps deadlines.

    --calibrate times decoding, prompts and both together at each width, fits the step-time model, and keeps
    it where `taper serve` looks. The last line is JSON; --json prints only that.
    """
    if calibrate is None:
        raise UsageError("nothing to do", hint="give --calibrate FILE")
    set_threads(threads)
    _calibrate(None if calibrate == "-" else calibrate, **options)


def _calibrate(model: str | None, bits: tuple[float, ...] | None, out: Path | None, as_json: bool) -> None:
    from taper.formats.container import TaperFile
    from taper.models import Decoder
    from taper.planner.calibration import (
        MAX_MAPE,
        calibrate,
        calibration_key,
        calibration_path,
        save_calibration,
    )

    file = TaperFile.open(model_path(model))
    note(file.notice())
    decoder = Decoder.from_taper(file)
    widths = bits or tuple(range(decoder.min_bits, decoder.max_bits + 1))
    for width in widths:
        decoder.widths(width)
    key = calibration_key(file)
    found = calibrate(decoder, key, widths, _progress)
    path = out or calibration_path(key)
    save_calibration(found, path)
    if not as_json:
        click.echo(_text(found))
        verdict = "good" if found.mape <= MAX_MAPE else f"above {MAX_MAPE:.0%}: measure on a quieter machine"
        click.echo(
            f"error on passes that were held out: mean {found.mape:.1%} ({verdict}), worst {found.worst:.1%}"
        )
        click.echo(f"kept in {path}")
    report = {"path": str(path), "mape": found.mape, "worst": found.worst, "passes": len(found.measurements)}
    click.echo(json.dumps(report))


def _progress(done: int, total: int) -> None:
    # On a terminal one line that counts; in a log every fourth round and the last.
    if sys.stderr.isatty():
        click.echo(f"\rround {done} of {total}", nl=done == total, err=True)
    elif done % 4 == 0 or done == total:
        click.echo(f"round {done} of {total}", err=True)


def _text(found: Calibration) -> str:
    widths = list(found.step_time.coefficients)
    header = ["decode", "prefill", *(f"{bits:g} bits" for bits in widths)]
    rows = [
        [
            str(b),
            str(p),
            *(f"{found.step_time.seconds(bits, b, p, (b + p) * _SHOWN_DEPTH) * 1e3:.2f}" for bits in widths),
        ]
        for b, p in _SHOWN
    ]
    return f"milliseconds of a pass, {_SHOWN_DEPTH} entries before each token\n{table(header, rows)}"
