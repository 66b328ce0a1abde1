"""Random models: sizes as named, widths parsed, files that verify."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from taper.errors import UsageError
from taper.formats.container import TaperFile
from taper.formats.spec import expected_matrices, parse_widths
from taper.testing import random_model
from taper.testing.random_model import SHAPES, gaussian_quantiles, write_random_model


@pytest.mark.parametrize(("shape", "billions"), [("1.1b", 1.1), ("135m", 0.1345)])
def test_shapes_have_their_size(shape, billions):
    weights = sum(spec.num_weights for spec in expected_matrices(SHAPES[shape]))
    assert weights / 1e9 == pytest.approx(billions, rel=0.01)


def test_quantiles_are_symmetric_and_use_the_whole_int8_range():
    codebook = gaussian_quantiles(2, 8)
    for bits, values in codebook.values.items():
        assert len(values) == 2**bits
        assert (values[0], values[-1]) == (-127, 127)
        np.testing.assert_array_equal(values, -values[::-1])


def test_command_writes_a_file_that_verifies(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.taper"
    monkeypatch.setattr(sys, "argv", ["random_model", "--shape", "tiny", "--out", str(path), "--bits", "3-5"])
    assert random_model.main() == 0
    file = TaperFile.open(path, verify=True)
    assert (file.min_bits, file.max_bits) == (3, 5)
    assert f"{path.stat().st_size:,} bytes" in capsys.readouterr().out


def test_bad_widths_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["random_model", "--shape", "tiny", "--out", str(tmp_path / "x"), "--bits", "8-2"]
    )
    assert random_model.main() == 2
    assert capsys.readouterr().err.startswith("error: bits '8-2'")


def test_planes_differ_between_matrices_and_planes(tmp_path):
    write_random_model(tmp_path / "a.taper", SHAPES["tiny"])
    matrix = TaperFile.open(tmp_path / "a.taper").matrix
    assert not np.array_equal(matrix("layers.0.qkv").planes[0], matrix("layers.1.qkv").planes[0])
    assert not np.array_equal(matrix("embed").planes[0], matrix("embed").planes[1])


def test_widths():
    assert parse_widths("2-8") == (2, 8)
    assert parse_widths("4") == (4, 4)
    for text in ("", "a-b", "0-4", "5-3", "2-9", "2-", "-4", "2-4-6"):
        with pytest.raises(UsageError, match="bits"):
            parse_widths(text)
