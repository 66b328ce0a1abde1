"""`taper plan`: what the planner needs to know of this machine, and the DFTSP paper's simulation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from taper.cli.options import WidthList, json_option, model_path, set_threads, threads_option
from taper.cli.terminal import note, table
from taper.errors import UsageError

if TYPE_CHECKING:
    from taper.planner.calibration import Calibration

T = TypeVar("T")

# Of the table: passes that a server runs.
_SHOWN = ((1, 0), (4, 0), (8, 0), (16, 0), (32, 0), (0, 64), (16, 64))
_SHOWN_DEPTH = 128
_OF_CALIBRATE = ("bits", "out", "threads")
_OF_SIMULATE = ("quantizer", "rate", "max_latency", "duration", "seed")


@click.command("plan")
@click.option("--calibrate", metavar="FILE", help="Measure passes of a .taper file; `-`: the embedded one.")
@click.option("--bits", type=WidthList(), help="Widths to measure; default: all whole ones in the file.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON to write; default: in the user's cache.")
@click.option("--simulate", metavar="MODEL", help="DFTSP's edge node with bloom-3b, bloom-7.1b or opt-13b.")
@click.option("--quantizer", metavar="NAME", help="Of --simulate; default: gptq-w8a16.")
@click.option("--rate", type=float, metavar="R", help="Of --simulate: requests a second; default: 10.")
@click.option("--max-latency", type=float, metavar="S", help="Of --simulate: bounds up to it; default: 2.")
@click.option("--duration", type=float, metavar="S", help="Of --simulate: seconds of arrivals; default: 60.")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Of --simulate; default: 0.")
@threads_option
@json_option
def command(calibrate: str | None, simulate: str | None, as_json: bool, **options: Any) -> None:
    """Measure how long passes take on this machine, for a server that keeps deadlines.

    --calibrate times decoding, prompts and both together at each width, fits the step-time model, and keeps
    it where `taper serve` looks. --simulate compares batchings of requests on the edge node of the DFTSP
    paper (docs/dftsp.md); nothing of this machine is measured. The last line is JSON; --json prints only
    that.
    """
    if (calibrate is None) == (simulate is None):
        raise UsageError(
            "nothing to do" if calibrate is None else "--calibrate and --simulate exclude each other",
            hint="give --calibrate FILE or --simulate MODEL",
        )
    mode, others = ("--calibrate", _OF_SIMULATE) if simulate is None else ("--simulate", _OF_CALIBRATE)
    for name in others:
        if options.pop(name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} does not go with {mode}", hint="leave it out")
    if simulate is not None:
        _simulate(simulate, as_json, **options)
        return
    set_threads(options.pop("threads"))
    _calibrate(None if calibrate == "-" else calibrate, as_json=as_json, **options)


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


def _simulate(
    name: str,
    as_json: bool,
    quantizer: str | None,
    rate: float | None,
    max_latency: float | None,
    duration: float | None,
    seed: int | None,
) -> None:
    from taper.planner.edge import MODELS, QUANTIZERS, EdgeCell
    from taper.planner.epochs import BATCHINGS, draw_requests, run_epochs

    cell = EdgeCell(_named(MODELS, name, "model"), _named(QUANTIZERS, quantizer or "gptq-w8a16", "quantizer"))
    requests = draw_requests(
        10.0 if rate is None else rate,
        2.0 if max_latency is None else max_latency,
        60.0 if duration is None else duration,
        seed or 0,
    )
    results = {
        batching: run_epochs(choose, cell, requests, seed or 0) for batching, choose in BATCHINGS.items()
    }
    admitted = results["dftsp"].admitted
    if not as_json:
        rows = [
            [batching, f"{one.throughput:.2f}", str(one.met), str(one.late), str(max(one.batches, default=0))]
            for batching, one in results.items()
        ]
        click.echo(f"{len(requests)} requests, {admitted} for which {cell.quantizer.name} is accurate enough")
        click.echo(table(["batching", "served a second", "in time", "late", "largest batch"], rows))
    served = {batching: one.throughput for batching, one in results.items()}
    click.echo(json.dumps({"requests": len(requests), "admitted": admitted, "throughput": served}))


def _named(known: dict[str, T], name: str, what: str) -> T:
    if name not in known:
        raise UsageError(f"no {what} {name!r}", hint=f"give one of {', '.join(known)}")
    return known[name]
