"""`taper bench --serve`: goodput under load of the planner and of other policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taper.cli.terminal import table

if TYPE_CHECKING:
    from taper.planner.goodput import Row
    from taper.planner.traces import Arrivals

LOADS = (0.5, 1.0, 1.5, 2.0, 3.0)


def run(
    path: Path,
    policies: tuple[str, ...],
    loads: tuple[float, ...],
    seconds: float,
    seed: int,
    arrivals: Arrivals,
    where: str,
    trace_file: Path | None,
    save_trace_to: Path | None,
    kv: str,
    as_json: bool,
) -> None:
    """Measure saturation, then every policy at every load; the last line is JSON."""
    from taper.engine import load
    from taper.engine.batch import BatchSizes
    from taper.formats.container import TaperFile
    from taper.models import Decoder
    from taper.planner.calibration import step_time_of
    from taper.planner.goodput import Stand, named, report
    from taper.planner.traces import load_trace, save_trace

    given = None if trace_file is None else load_trace(trace_file)
    file = TaperFile.open(path)
    decoder = Decoder.from_taper(file, kv=kv)
    widths = tuple(float(bits) for bits in range(decoder.min_bits, decoder.max_bits + 1))
    chosen = named(policies, widths)
    stand = Stand(load(path, kv=kv), step_time_of(file, decoder), BatchSizes())
    if not as_json:
        host = stand.times
        click.echo(
            f"saturation: {stand.saturation:.1f} requests/s (FCFS at {widths[0]:g} bits); around a pass the "
            f"engine takes {1e6 * host.pass_s:.0f} us and {1e6 * host.row_s:.0f} us a token",
            err=True,
        )
    traces = {load_: stand.trace(load_, seconds, seed, arrivals) for load_ in loads}
    if given is not None:
        traces = {len(given) / max(given[-1].arrival_s, 1e-9) / stand.saturation: given}
    if save_trace_to is not None:
        save_trace(traces[max(traces)], save_trace_to)
    rows: list[Row] = []
    for place in ("engine", "simulator"):
        if where in (place, "both"):
            for row in stand.rows(chosen, traces, place):
                rows.append(row)
                if not as_json:
                    click.echo(_line(row), err=True)
    if not as_json:
        for place in sorted({row.where for row in rows}):
            click.echo(_text([row for row in rows if row.where == place], place))
    click.echo(json.dumps({"model": path.name, **report(stand, rows)}))


def _line(row: Row) -> str:
    return (
        f"{row.where} {row.load:.3g} x {row.policy}: {row.goodput:.1f} requests/s, {row.admitted} ran, "
        f"{row.violations_frac:.1%} of them late, planner {row.planner_frac:.2%} of the passes"
    )


def _text(rows: list[Row], where: str) -> str:
    """Goodput by policy and load, the share of broken promises behind it."""
    loads = sorted({row.load for row in rows})
    by_policy: dict[str, dict[float, Any]] = {}
    for row in rows:
        by_policy.setdefault(row.policy, {})[row.load] = f"{row.goodput:.1f} ({row.violations_frac:.1%})"
    cells = [[name, *(found[load] for load in loads)] for name, found in by_policy.items()]
    came = {row.load: f"{row.arrivals:.1f}" for row in rows}
    cells.append(["that came", *(came[load] for load in loads)])
    header = ["policy", *(f"{load:.3g} x" for load in loads)]
    title = f"requests/s that met deadline and floor on the {where} (late or cut, of those that ran)"
    return f"{title}\n{table(header, cells)}"
