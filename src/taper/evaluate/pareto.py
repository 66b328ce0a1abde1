"""Quality against bytes: the points of one or more files, and their plot as PNG (extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taper.errors import UsageError
from taper.evaluate.perplexity import PerplexityReport
from taper.models import Decoder

_MEGABYTE = 1e6
# Below this a KL divergence is that of equal models, and a log axis has no place for it.
_LEAST_KL = 1e-9


@dataclass(frozen=True, slots=True)
class Point:
    """One width of one file.

    Attributes:
        bits: the width.
        bits_per_weight: planes read over weights.
        total_bytes: of the file that holds just this width.
        bytes_per_token: weights that a decode step reads.
        mean_kl, mean_kl_standard_error: in nats, from the float model.
    """

    bits: float
    bits_per_weight: float
    total_bytes: int
    bytes_per_token: int
    mean_kl: float | None
    mean_kl_standard_error: float | None


@dataclass(frozen=True, slots=True)
class Series:
    """The points of one file."""

    name: str
    points: tuple[Point, ...]


def points_of(report: PerplexityReport, decoder: Decoder) -> tuple[Point, ...]:
    """Points of every width of the report that the decoder holds; the reference has none."""
    return tuple(
        Point(
            bits=result.bits,
            bits_per_weight=decoder.bits_per_weight(result.bits),
            total_bytes=decoder.reading_bytes(result.bits),
            bytes_per_token=decoder.bytes_per_pass(result.bits),
            mean_kl=result.mean_kl,
            mean_kl_standard_error=result.mean_kl_standard_error,
        )
        for result in report.results
        if decoder.min_bits <= result.bits <= decoder.max_bits
    )


def plot(series: Sequence[Series], path: str | Path, title: str) -> None:
    """Write a PNG of two panels: mean KL (log axis) against total bytes and against bytes read per token.

    Args:
        series: one line each, points labelled with their bits, bars of one standard error.
        path: the file to write.
        title: text, protocol and reference.

    Raises:
        UsageError: matplotlib is not installed, no point has a KL, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"matplotlib cannot be imported: {error}", hint="install it: pip install 'taper[plots]'"
        ) from error
    drawn = [Series(one.name, _positive(one.points)) for one in series]
    if not any(one.points for one in drawn):
        raise UsageError("no width has a KL divergence to plot", hint="add --against HF_DIR")
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, field, label in zip(
        panels, ("total_bytes", "bytes_per_token"), ("file, MB", "weights read per token, MB"), strict=True
    ):
        for index, one in enumerate(drawn):
            _draw(axes, one, field, index)
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.04 * axes.get_xlim()[1])  # room for the last label
        axes.set_yscale("log")
        axes.grid(visible=True, which="major", alpha=0.4)
        axes.grid(visible=True, which="minor", alpha=0.15)
    panels[0].set_ylabel("mean KL from the float model, nats")
    panels[1].legend()
    figure.suptitle(title, fontsize="medium")
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint="choose another place") from error


def _positive(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points that a log axis can show, from few bytes to many."""
    shown = [point for point in points if point.mean_kl is not None and point.mean_kl > _LEAST_KL]
    return tuple(sorted(shown, key=lambda point: point.total_bytes))


def _draw(axes: Any, series: Series, field: str, index: int) -> None:
    """One line; the labels of every other series go below, so that close lines stay readable."""
    if not series.points:
        return
    colour, offset = f"C{index}", (-7, -12) if index % 2 else (5, 4)
    x = [getattr(point, field) / _MEGABYTE for point in series.points]
    y = [point.mean_kl for point in series.points]
    errors = [point.mean_kl_standard_error or 0.0 for point in series.points]
    axes.errorbar(x, y, yerr=errors, color=colour, marker="o", markersize=4, capsize=2, label=series.name)
    for point, at, height in zip(series.points, x, y, strict=True):
        axes.annotate(
            f"{point.bits:g}", (at, height), xytext=offset, textcoords="offset points", color=colour,
            fontsize="small",
        )  # fmt: skip
