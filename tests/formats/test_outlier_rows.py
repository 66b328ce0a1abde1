"""Outliers in a file: written, read back, and refused when their bytes are forged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from taper.errors import CorruptFileError
from taper.formats.container import TaperFile
from taper.formats.outliers import OutlierRows
from taper.formats.writer import write_taper
from taper.models import Decoder


def some_outliers(out_features: int, in_features: int) -> OutlierRows:
    """Two in every third row."""
    starts = 2 * np.cumsum(np.arange(out_features + 1) % 3 == 1)
    columns = np.tile([1, in_features - 1], int(starts[-1]) // 2)
    return OutlierRows(
        starts.astype(np.int32),
        columns.astype(np.uint16),
        np.linspace(-1, 1, len(columns)).astype(np.float16),
    )


@pytest.fixture
def with_outliers(taper_file: Path, tmp_path: Path) -> Path:
    """The tiny file with outliers in two of its matrices, its embedding among them."""
    file, path = TaperFile.open(taper_file), tmp_path / "outliers.taper"
    matrices = [file.matrix(spec.name) for spec in file.matrices]
    for index in (0, 2):
        spec = matrices[index].spec
        kept = some_outliers(spec.out_features, spec.in_features)
        matrices[index] = replace(matrices[index], outliers=kept)
    write_taper(path, file.header, matrices, {"norm.final": file.tensor("norm.final")})
    return path


def test_outliers_come_back_and_count(taper_file: Path, with_outliers: Path) -> None:
    plain, file = TaperFile.open(taper_file), TaperFile.open(with_outliers, verify=True)
    spec = file.matrices[2]
    found, expected = file.matrix(spec.name).outliers, some_outliers(spec.out_features, spec.in_features)
    assert found is not None
    for name in ("starts", "columns", "values"):
        assert getattr(found, name).tobytes() == getattr(expected, name).tobytes()
    assert file.matrix(file.matrices[1].name).outliers is None
    decoders = [Decoder.from_taper(each) for each in (plain, file)]
    logits = [decoder.forward([1, 2, 3], decoder.new_cache(8), 3, "all") for decoder in decoders]
    assert not np.array_equal(logits[0], logits[1])
    added = decoders[1].bytes_per_pass(3) - decoders[0].bytes_per_pass(3)
    layer = sum(getattr(expected, name).nbytes for name in ("starts", "columns", "values"))
    # A layer's outliers are read whole; of the embedding a mean row of two thirds of an outlier and a start.
    assert added == layer + (2 * 4) // 3 + 4


@pytest.mark.parametrize(
    ("part", "index", "value", "message"),
    [
        ("starts", 1, -1, "starts do not rise"),
        ("starts", 0, 1, "starts do not rise"),
        ("starts", -1, 2**31 - 1, "starts do not rise"),
        ("columns", 0, 65535, "column 65535"),
        ("columns", 1, 1, "columns do not rise at entry 1"),
        ("values", 3, 0x7C00, "not a finite number"),
    ],
)
def test_forged_bytes_are_refused(
    with_outliers: Path, part: str, index: int, value: int, message: str
) -> None:
    # Nothing but the checks at opening stands between these bytes and a read outside the activations.
    file = TaperFile.open(with_outliers)
    entry = file._frame.entries[f"{file.matrices[2].name}.outliers.{part}"]
    size = 4 if part == "starts" else 2
    place = file._frame.data_begin + entry.begin + (index % entry.shape[0]) * size
    data = bytearray(with_outliers.read_bytes())
    data[place : place + size] = value.to_bytes(size, "little", signed=value < 0)
    with_outliers.write_bytes(data)
    with pytest.raises(CorruptFileError, match=message):
        TaperFile.open(with_outliers)


def test_rows_need_no_outliers() -> None:
    empty = OutlierRows(np.zeros(4, np.int32), np.zeros(0, np.uint16), np.zeros(0, np.float16))
    empty.check(5)
    assert not empty.dense(5).any()
    split = OutlierRows(
        np.array([0, 0, 2, 3, 3], np.int32), np.array([0, 4, 2], np.uint16), np.ones(3, np.float16)
    )
    split.check(5)  # 4 to 2 goes from row 1 to row 2
    assert np.argwhere(split.dense(5)).tolist() == [[1, 0], [1, 4], [2, 2]]
    with pytest.raises(ValueError, match="rise"):
        replace(split, starts=np.array([0, 0, 3, 3, 3], np.int32)).check(5)
