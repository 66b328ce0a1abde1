"""The writer: same bytes each time, complete or absent, little memory, and refusals before the first byte."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections import namedtuple

import numpy as np
import pytest

from taper.errors import CorruptFileError, DoesNotFitError, UsageError
from taper.formats import writer
from taper.formats.container import TaperFile
from taper.formats.spec import FINAL_NORM, PlanedMatrix, TaperHeader
from taper.formats.writer import write_taper
from taper.testing.random_model import gaussian_quantiles
from taper.testing.tiny import tiny_taper


@pytest.fixture
def parts(taper_file):
    """Header, matrices and small tensors of the tiny file."""
    file = TaperFile.open(taper_file)
    header = TaperHeader(file.config, 2, 4, gaussian_quantiles(2, 4))
    return header, [file.matrix(spec.name) for spec in file.matrices], {FINAL_NORM: file.tensor(FINAL_NORM)}


def write(path, parts, matrices=None, tensors=None):
    header, own_matrices, own_tensors = parts
    write_taper(path, header, matrices or own_matrices, own_tensors if tensors is None else tensors)


def rewrite(file, path, header):
    tensors = {FINAL_NORM: file.tensor(FINAL_NORM)}
    write_taper(path, header, lambda: (file.matrix(spec.name) for spec in file.matrices), tensors)


def with_planes(parts, make):
    """The matrices, their planes replaced by make(planes)."""
    return [dataclasses.replace(matrix, planes=make(matrix.planes)) for matrix in parts[1]]


def test_same_input_gives_the_same_bytes(tmp_path, parts):
    write(tmp_path / "a.taper", parts)
    write(tmp_path / "b.taper", parts, matrices=lambda: iter(parts[1]))
    assert (tmp_path / "a.taper").read_bytes() == (tmp_path / "b.taper").read_bytes()
    first = tiny_taper(tmp_path / "c.taper", seed=1).read_bytes()
    assert tiny_taper(tmp_path / "d.taper", seed=1).read_bytes() == first
    assert tiny_taper(tmp_path / "e.taper", seed=2).read_bytes() != first


def with_tables(parts, max_bits=4):
    """Header and matrices, two of which have random values for every row, of 2..max_bits bits."""
    rng, names = np.random.default_rng(3), frozenset({"embed", "layers.0.o"})
    header = dataclasses.replace(parts[0], tables=names)
    matrices = [
        dataclasses.replace(
            m,
            spec=spec,
            tables=rng.integers(-127, 128, (spec.out_features, 2 ** (max_bits + 1) - 4)).astype(np.int8)
            if spec.has_tables
            else None,
        )
        for m, spec in zip(parts[1], header.matrices, strict=True)
    ]
    return header, matrices, parts[2]


def test_tables_of_rows_round_trip(tmp_path, parts):
    changed = with_tables(parts)
    write(tmp_path / "a.taper", changed)
    file = TaperFile.open(tmp_path / "a.taper", verify=True)
    assert file.header.tables == {"embed", "layers.0.o"}
    for matrix in changed[1]:
        found = file.matrix(matrix.spec.name).tables
        assert (found is None) == (matrix.tables is None)
        if found is not None:
            assert found.dtype == np.int8
            np.testing.assert_array_equal(found, matrix.tables)
    rewrite(file, tmp_path / "b.taper", file.header)
    assert (tmp_path / "a.taper").read_bytes() == (tmp_path / "b.taper").read_bytes()


def test_a_cut_off_file_keeps_the_tables_of_its_widths(tmp_path, parts):
    path = tmp_path / "cut.taper"
    changed = with_tables(parts)
    write(path, changed)
    with path.open("r+b") as handle:
        handle.truncate(TaperFile.open(path).bytes_at(3))
    file = TaperFile.open(path)
    np.testing.assert_array_equal(file.matrix("embed").tables, changed[1][0].tables[:, :12])
    rewrite(file, tmp_path / "whole.taper", file.header)
    assert TaperFile.open(tmp_path / "whole.taper", verify=True).max_bits == 3


def test_tables_that_do_not_fit_are_refused(tmp_path, parts):
    header, matrices, tensors = with_tables(parts)
    least = matrices[0].tables.copy()
    least[7, 3] = -128
    for table, message in (
        (None, "about tables"),
        (matrices[0].tables[:, 1:], "embed.tables"),
        (matrices[0].tables.astype(np.int16), "embed.tables"),
        (least, "embed.tables holds -128"),
    ):
        changed = [dataclasses.replace(matrices[0], tables=table), *matrices[1:]]
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "bad.taper", (header, changed, tensors))


def test_table_byte_below_the_range_is_named(tmp_path, parts):
    path = tmp_path / "model.taper"
    write(path, with_tables(parts))
    raw = bytearray(path.read_bytes())
    file = TaperFile.open(path)
    at = file._frame.data_begin + file._frame.entries["embed.tables"].begin
    raw[at] = 0x80
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError, match=r"embed.tables holds -128"):
        TaperFile.open(path)


def test_wide_codebook_round_trip(tmp_path, taper_file):
    file = tiny_taper(tmp_path / "eight.taper", 6, 8)
    opened = TaperFile.open(file)
    codebook = dataclasses.replace(
        opened.codebook,
        values=opened.codebook.values | {8: np.linspace(-16319, 16319, 256).astype(np.int16)},
        activation_bits={6: 12, 8: 14},
    )
    rewrite(opened, tmp_path / "wide.taper", dataclasses.replace(opened.header, codebook=codebook))
    found = TaperFile.open(tmp_path / "wide.taper").codebook
    assert found.activation_bits == {6: 12, 8: 14}
    assert {bits: values.dtype for bits, values in found.values.items()} == {
        6: np.int8,
        7: np.int8,
        8: np.int16,
    }
    np.testing.assert_array_equal(found.values[8], codebook.values[8])
    with (tmp_path / "wide.taper").open("r+b") as handle:
        handle.truncate(TaperFile.open(tmp_path / "wide.taper").bytes_at(7))
    cut = TaperFile.open(tmp_path / "wide.taper").codebook
    assert (cut.activation_bits, sorted(cut.values)) == ({6: 12}, [6, 7])


def test_a_row_of_scales_for_every_level(tmp_path, parts):
    rng = np.random.default_rng(0)
    matrices = [
        dataclasses.replace(m, scales=rng.uniform(0.5, 1, (3, m.spec.out_features)).astype(np.float16))
        for m in parts[1]
    ]
    path = tmp_path / "levels.taper"
    write(path, parts, matrices=matrices)
    file = TaperFile.open(path, verify=True)
    np.testing.assert_array_equal(file.matrix("head").scales, matrices[-1].scales)
    cut = tmp_path / "cut.taper"
    cut.write_bytes(path.read_bytes()[: file.bytes_at(3)])
    np.testing.assert_array_equal(TaperFile.open(cut).matrix("head").scales, matrices[-1].scales[:2])


def test_open_file_is_written_again_with_another_card(tmp_path, taper_file):
    file = TaperFile.open(taper_file)
    path = tmp_path / "card.taper"
    header = dataclasses.replace(
        file.header, card={"perplexity": {"4": 12.5}}, policies={"default": "fixed:3"}
    )
    rewrite(file, path, header)
    again = TaperFile.open(path, verify=True)
    assert (again.card, again.policies) == (header.card, header.policies)
    for spec in file.matrices:
        np.testing.assert_array_equal(again.matrix(spec.name).planes, file.matrix(spec.name).planes)
    same = tmp_path / "same.taper"
    rewrite(again, same, again.header)
    assert same.read_bytes() == path.read_bytes()


def test_one_plane_at_a_time_is_asked_for(tmp_path, parts):
    asked = []

    class Recorded(list):
        def __getitem__(self, plane):
            asked.append(plane)
            return super().__getitem__(plane)

    write(
        tmp_path / "a.taper",
        parts,
        matrices=with_planes(parts, Recorded),
    )
    assert asked == [plane for plane in range(4) for _ in parts[1]]


class Broken(list):
    """Planes whose second one cannot be had."""

    def __init__(self, planes, error):
        super().__init__(planes)
        self.error = error

    def __getitem__(self, plane):
        if plane == 1:
            raise self.error
        return super().__getitem__(plane)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, parts, error):
    path = tmp_path / "model.taper"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write(path, parts, matrices=with_planes(parts, lambda planes: Broken(planes, error)))
    assert [p.name for p in tmp_path.iterdir()] == ["model.taper"]
    assert path.read_bytes() == b"old"


def test_full_disk_is_refused_before_writing(tmp_path, parts, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 10**6 - 1000, 1000))
    monkeypatch.setattr(writer, "_write_data", lambda *_: pytest.fail("wrote"))
    with pytest.raises(DoesNotFitError, match=r"needs \d\d,\d{3} bytes; .* has 1,000 free"):
        write(tmp_path / "model.taper", parts)
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_while_writing(tmp_path, parts):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DoesNotFitError, match="no room left"):
        write(
            tmp_path / "model.taper",
            parts,
            matrices=with_planes(parts, lambda planes: Broken(planes, full)),
        )
    assert list(tmp_path.iterdir()) == []


def test_target_must_be_a_file_in_a_folder(tmp_path, parts):
    with pytest.raises(UsageError, match="is a folder"):
        write(tmp_path, parts)
    with pytest.raises(UsageError, match="does not exist"):
        write(tmp_path / "none" / "model.taper", parts)


def first(parts, **changes) -> list[PlanedMatrix]:
    return [dataclasses.replace(parts[1][0], **changes), *parts[1][1:]]


def test_arrays_that_do_not_fit_the_configuration_are_refused(tmp_path, parts):
    path, embed = tmp_path / "model.taper", parts[1][0]
    nan = embed.scales.copy()
    nan[0, 5] = np.nan
    cases = [
        ({"matrices": parts[1][:-1]}, "zip"),
        ({"matrices": parts[1][::-1]}, "expected"),
        ({"matrices": first(parts, planes=embed.planes[:3])}, "3 planes, expected 4"),
        ({"matrices": first(parts, planes=[p[:, :8] for p in embed.planes])}, "embed.plane0"),
        ({"matrices": first(parts, scales=embed.scales[:, :9])}, "embed.scales"),
        ({"matrices": first(parts, scales=nan)}, "not finite"),
        ({"matrices": first(parts, signs=embed.signs * 2)}, "something else than"),
        ({"matrices": first(parts, bias=np.zeros(300, np.float32))}, "about a bias"),
        ({"tensors": {}}, "norm.final"),
        ({"tensors": {FINAL_NORM: np.zeros(95, np.float32)}}, "norm.final"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            write(path, parts, **changes)
    with pytest.raises(TypeError, match="iterator"):
        write(path, parts, matrices=iter(parts[1]))
    assert list(tmp_path.iterdir()) == []
