"""Matrices that hold fewer planes than the file: layout, readings, truncation, refusals; stored
sensitivity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taper.errors import CorruptFileError
from taper.formats import writer
from taper.formats.container import TaperFile
from taper.formats.sensitivity import Sensitivity
from taper.formats.spec import FINAL_NORM, TaperHeader
from taper.formats.writer import described_bytes, write_taper
from taper.testing.tiny import tiny_taper

MIN_BITS, MAX_BITS = 2, 5
CEILINGS = {"embed": 4, "layers.0.down": 2, "layers.1.down": 3}


def header_with(file: TaperFile, **changes: Any) -> TaperHeader:
    return replace(file.header, **changes)


def write(path: Path, file: TaperFile, header: TaperHeader) -> Path:
    """`file` with another header, each matrix cut to its ceiling."""
    matrices = [
        replace(
            file.matrix(spec.name),
            spec=spec,
            planes=file.matrix(spec.name).planes[: spec.width_at(header.max_bits)],
        )
        for spec in header.matrices
    ]
    write_taper(path, header, matrices, {FINAL_NORM: file.tensor(FINAL_NORM)})
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TaperFile:
    return TaperFile.open(tiny_taper(tmp_path_factory.mktemp("whole") / "tiny.taper", MIN_BITS, MAX_BITS))


@pytest.fixture(scope="module")
def cut(whole: TaperFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cut") / "tiny.taper"
    return write(path, whole, header_with(whole, planes=CEILINGS, sensitivity=sensitivity(whole, CEILINGS)))


def sensitivity(file: TaperFile, ceilings: dict[str, int]) -> Sensitivity:
    rows = {
        spec.name: [0.5**bits for bits in range(MIN_BITS, ceilings.get(spec.name, MAX_BITS) + 1)]
        for spec in file.matrices
    }
    return Sensitivity(rows, (2, 3), "5 bits", "text.txt", 512)


def test_each_matrix_holds_its_own_planes(whole: TaperFile, cut: Path) -> None:
    file = TaperFile.open(cut, verify=True)
    assert (file.min_bits, file.max_bits) == (MIN_BITS, MAX_BITS)
    for spec in file.matrices:
        planes, all_planes = file.matrix(spec.name).planes, whole.matrix(spec.name).planes
        assert len(planes) == CEILINGS.get(spec.name, MAX_BITS)
        assert all(np.array_equal(one, other) for one, other in zip(planes, all_planes, strict=False))
    saved = sum(
        (MAX_BITS - CEILINGS[spec.name]) * spec.plane_bytes
        for spec in whole.matrices
        if spec.name in CEILINGS
    )
    assert saved > 0.9 * (whole.file_bytes - file.file_bytes) > 0


def test_a_level_ends_with_its_last_matrix(cut: Path) -> None:
    """Up to 2 bits all matrices have a plane; the last of level 5 is not the last matrix of the model."""
    file = TaperFile.open(cut)
    ends = [file.bytes_at(bits) for bits in range(1, MAX_BITS + 1)]
    assert ends == sorted(set(ends))
    assert ends[-1] == file.file_bytes


def test_a_truncated_file_keeps_lower_ceilings_only(whole: TaperFile, cut: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.taper"
    short.write_bytes(cut.read_bytes()[: TaperFile.open(cut).bytes_at(3)])
    file = TaperFile.open(short)
    assert file.max_bits == 3
    assert file.header.planes == {"layers.0.down": 2}
    assert {name: len(row) for name, row in file.sensitivity.kl.items()} == {  # type: ignore[union-attr]
        spec.name: spec.width_at(3) - MIN_BITS + 1 for spec in file.matrices
    }


def test_the_described_size_is_the_written_size(whole: TaperFile, cut: Path) -> None:
    header = TaperFile.open(cut).header
    rows = {spec.name: len(whole.tensor(f"{spec.name}.scales")) for spec in whole.matrices}
    assert described_bytes(header, rows) == cut.stat().st_size


def test_sensitivity_and_errors_come_back_as_written(whole: TaperFile, tmp_path: Path) -> None:
    known, errors = sensitivity(whole, {}), {spec.name: [0.1, 0.01, 0.0, 0.0] for spec in whole.matrices}
    path = write(tmp_path / "a.taper", whole, header_with(whole, sensitivity=known, relative_errors=errors))
    assert TaperFile.open(path).sensitivity == known
    assert TaperFile.open(path).header.relative_errors == errors


def with_metadata(monkeypatch: pytest.MonkeyPatch, key: str, change: Callable[[Any], Any]) -> None:
    """Let the writer write something else into one entry of the metadata."""
    original = writer._metadata

    def changed(header: TaperHeader, digests: Any) -> dict[str, str]:
        metadata = original(header, digests)
        return metadata | {key: json.dumps(change(json.loads(metadata[key])))}

    monkeypatch.setattr(writer, "_metadata", changed)


def first_kl(change: Callable[[list[Any]], list[Any]]) -> Callable[[Any], Any]:
    return lambda raw: raw | {"kl": raw["kl"] | {"embed": change(raw["kl"]["embed"])}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda raw: raw | {"kl": {}}, "sensitivity is not that of the matrices"),
        (first_kl(lambda row: row[1:]), "needs 4 figures"),
        (first_kl(lambda row: [-1.0, *row[1:]]), "holds -1.0"),
        (first_kl(lambda row: [math.nan, *row[1:]]), "holds nan"),
        (first_kl(lambda row: ["1", *row[1:]]), "not a number"),
        (first_kl(lambda row: [True, *row[1:]]), "not a number"),
        (lambda raw: raw | {"num_tokens": 0}, "num_tokens 0"),
        (lambda raw: raw | {"text": 3}, "not strings"),
        (lambda raw: raw | {"measured_bits": "2"}, "not a list"),
        (lambda raw: {"kl": raw["kl"]}, "'measured_bits' is missing"),
    ],
)
def test_a_wrong_sensitivity_is_refused(
    whole: TaperFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, reason: str
) -> None:
    with_metadata(monkeypatch, "sensitivity", change)
    path = write(tmp_path / "a.taper", whole, header_with(whole, sensitivity=sensitivity(whole, {})))
    with pytest.raises(CorruptFileError, match=reason):
        TaperFile.open(path)


@pytest.mark.parametrize(
    ("planes", "reason"),
    [(1, "outside 2..4"), (5, "outside 2..4"), ("3", "not an integer"), (3, "tensor|expected")],
)
def test_a_wrong_ceiling_is_refused(
    whole: TaperFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planes: Any, reason: str
) -> None:
    with_metadata(monkeypatch, "matrices", lambda raw: [raw[0] | {"planes": planes}, *raw[1:]])
    with pytest.raises(CorruptFileError, match=reason):
        TaperFile.open(write(tmp_path / "a.taper", whole, whole.header))


def test_some_matrix_has_all_planes(
    whole: TaperFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_metadata(monkeypatch, "matrices", lambda raw: [row | {"planes": 3} for row in raw])
    with pytest.raises(CorruptFileError, match="no matrix has the 5 planes"):
        TaperFile.open(write(tmp_path / "a.taper", whole, whole.header))
