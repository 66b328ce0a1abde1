"""Points count true bytes; the plot is a PNG of two panels."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from taper.errors import UsageError
from taper.evaluate.pareto import Point, Series, plot, points_of
from taper.evaluate.perplexity import PerplexityReport, WidthResult
from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.testing.tiny import tiny_taper


def test_points_are_those_of_the_file_without_the_reference(tmp_path: Path) -> None:
    file = TaperFile.open(tiny_taper(tmp_path / "t.taper", 2, 4))
    decoder = Decoder.from_taper(file)
    results = [WidthResult(32, 5.0, None, 1.0)]
    results += [WidthResult(bits, 5.0, None, 1.0, mean_kl=1 / bits) for bits in (2, 4)]
    points = points_of(PerplexityReport("x", 1, 9, tuple(results)), decoder)
    assert [point.bits for point in points] == [2, 4]
    assert points[1].total_bytes == file.file_bytes
    assert points[1].bytes_per_token == decoder.bytes_per_pass(4)
    assert [point.mean_kl for point in points] == [0.5, 0.25]


def series(name: str, *kl: float | None) -> Series:
    return Series(
        name, tuple(Point(2 + i, 2.0 + i, 10**6 * (2 + i), 10**6, k, 0.01) for i, k in enumerate(kl))
    )


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "p.png"
    plot([series("a", 0.3, 0.1, 0.0), series("b", None)], path, "title")
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", raw[16:24]) == (1650, 720)
    with pytest.raises(UsageError, match="no width has a KL"):
        plot([series("b", None, 0.0)], path, "title")
    with pytest.raises(UsageError, match="cannot write"):
        plot([series("a", 0.3)], tmp_path / "none" / "p.png", "title")
