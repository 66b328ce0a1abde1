"""The comparison's figures, its table and its plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from taper.evaluate import WidthResult

# Ahead means this share of the peer's divergence or less.
RATIO_AHEAD = 0.8
HEADER = (
    "format",
    "bpw",
    "bytes",
    "KL mean ± se",
    "median",
    "p99.9",
    "top-1",
    "our bits",
    "our bytes",
    "our KL ± se",
    "our top-1",
    "ratio",
    "verdict",
)


@dataclass(frozen=True, slots=True)
class Point:
    """One quantised model as measured.

    Attributes:
        name: the format, or the bits of our reading.
        num_bytes: of the tensors that its weights come from.
        file_bytes: with vocabulary, metadata and padding.
        bits_per_weight: of `num_bytes`.
        result: against the float checkpoint.
    """

    name: str
    num_bytes: int
    file_bytes: int
    bits_per_weight: float
    result: WidthResult


@dataclass(frozen=True, slots=True)
class Row:
    """One of theirs, and our reading at no more bytes; None where our least width is larger.

    Attributes:
        format: without `imatrix`.
        best: whether it has the lower divergence of its format's variants.
    """

    format: str
    theirs: Point
    ours: Point | None
    best: bool

    @property
    def ratio(self) -> float | None:
        """Our mean divergence over theirs; below 1 we are closer to the float model."""
        if self.ours is None:
            return None
        return _kl(self.ours) / _kl(self.theirs)

    @property
    def verdict(self) -> str:
        """`ahead`, `behind`, or `even` in between; `no reading` where none is small enough."""
        if self.ours is None or self.ratio is None:
            return "no reading"
        ours, theirs = self.ours.result.top1_agreement, self.theirs.result.top1_agreement
        assert ours is not None
        assert theirs is not None
        if self.ratio <= RATIO_AHEAD and ours >= theirs:
            return "ahead"
        return "behind" if self.ratio > 1.0 else "even"


def rows(theirs: Sequence[tuple[str, Point]], ours: Sequence[Point | None]) -> list[Row]:
    """Pair each of theirs, given with its format, with ours, and mark the best of each format."""
    best = {}
    for name, point in theirs:
        best[name] = min(_kl(point), best.get(name, _kl(point)))
    paired = zip(theirs, ours, strict=True)
    return [Row(name, point, mine, _kl(point) == best[name]) for (name, point), mine in paired]


def table(measured: Sequence[Row]) -> str:
    """Markdown; the better variant of each format in bold."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in measured]
    return "\n".join(lines)


def summary(measured: Sequence[Row]) -> str:
    """How many formats we are ahead of, each taken at its better variant."""
    best = [row for row in measured if row.best]
    counts = {verdict: sum(row.verdict == verdict for row in best) for verdict in ("ahead", "even", "behind")}
    return f"of {len(best)} formats, each at its better variant: " + ", ".join(
        f"{verdict} of {count}" if verdict == "ahead" else f"{verdict} with {count}"
        for verdict, count in counts.items()
    )


def row_json(row: Row) -> dict[str, Any]:
    """One row as plain values."""
    return {**asdict(row), "ratio": row.ratio, "verdict": row.verdict}


def plot(measured: Sequence[Row], ours: Sequence[Point], title: str, path: Path) -> None:
    """Draw divergence over bits per weight: ours as lines, theirs as points, logarithmic upwards.

    Args:
        measured: whose peers become points.
        ours: every reading measured.
        title: model, text and number of tokens.
        path: PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for allocated, style in ((True, "-"), (False, ":")):
        line = [point for point in ours if (not float(point.name).is_integer()) == allocated]
        line.sort(key=lambda point: point.bits_per_weight)
        label = "one .taper file, " + ("allocated" if allocated else "one width in every matrix")
        errors = [_kl_error(point) for point in line]
        axes.errorbar(*_curve(line), yerr=errors, marker=".", linestyle=style, label=label)
    for imatrix, marker in ((False, "s"), (True, "^")):
        points = [row.theirs for row in measured if row.theirs.name.endswith("imatrix") == imatrix]
        label = "llama.cpp with importance matrix" if imatrix else "llama.cpp"
        axes.plot(*_curve(points), marker, label=label)
        for point in points:
            axes.annotate(
                point.name.split()[0],
                (point.bits_per_weight, _kl(point)),
                textcoords="offset points",
                xytext=(5, -10 if imatrix else 4),
                fontsize=7,
            )
    axes.set(yscale="log", xlabel="bits per weight, everything counted", ylabel="mean KL divergence (nats)")
    axes.set_title(title, fontsize=9)
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _cells(row: Row) -> list[str]:
    theirs = row.theirs
    name = f"**{theirs.name}**" if row.best else theirs.name
    cells = [name, f"{theirs.bits_per_weight:.3f}", f"{theirs.num_bytes:,}", _kl_text(theirs)]
    cells += [f"{theirs.result.median_kl:.5f}", f"{theirs.result.p999_kl:.3f}", _top1_text(theirs)]
    if row.ours is None:
        return [*cells, "", "", "", "", "", row.verdict]
    ours = [row.ours.name, f"{row.ours.num_bytes:,}", _kl_text(row.ours), _top1_text(row.ours)]
    return [*cells, *ours, f"{row.ratio:.3f}", row.verdict]


def _kl(point: Point) -> float:
    assert point.result.mean_kl is not None
    return point.result.mean_kl


def _kl_error(point: Point) -> float:
    return point.result.mean_kl_standard_error or 0.0


def _kl_text(point: Point) -> str:
    return f"{_kl(point):.5f} ± {_kl_error(point):.5f}"


def _top1_text(point: Point) -> str:
    return f"{point.result.top1_agreement:.2%} ± {point.result.top1_standard_error or 0.0:.2%}"


def _curve(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.bits_per_weight for point in points], [_kl(point) for point in points]
