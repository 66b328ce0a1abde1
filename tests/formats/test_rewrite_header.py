"""Another header over the same tensors: whole or not at all, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from taper.errors import CorruptFileError, DoesNotFitError
from taper.formats.container import TaperFile
from taper.formats.writer import rewrite_header

CARD = {"reference": "float", "widths": [{"bits": 2, "kl_mean": 0.25}]}

KILLED = """
import dataclasses, os, shutil, signal, sys
from taper.formats.container import TaperFile
from taper.formats import writer

def die(old, file, chunk):
    file.write(old.read(1000))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

shutil.copyfileobj = die
header = TaperFile.open(sys.argv[1]).header
writer.rewrite_header(sys.argv[1], dataclasses.replace(header, card={"widths": []}))
"""


@pytest.fixture
def path(taper_file: Path, tmp_path: Path) -> Path:
    """A copy of the tiny file that may be changed."""
    return Path(shutil.copy(taper_file, tmp_path / "model.taper"))


def with_card(path: Path, text: str = "") -> None:
    header = TaperFile.open(path).header
    rewrite_header(path, dataclasses.replace(header, card={**CARD, "text": text}))


def test_tensors_and_digests_stay(path: Path, taper_file: Path) -> None:
    path.chmod(0o640)
    with_card(path, "x" * 5000)  # the header grows by more than its padding
    old, new = TaperFile.open(taper_file), TaperFile.open(path, verify=True)
    assert new.card == {**CARD, "text": "x" * 5000}
    assert dataclasses.replace(new.header, card={}, codebook=old.codebook) == old.header
    np.testing.assert_array_equal(new.matrix("head").planes, old.matrix("head").planes)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in path.parent.iterdir()] == ["model.taper"]
    rewrite_header(path, old.header)
    assert path.read_bytes() == taper_file.read_bytes()


def test_damage_stays_visible(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with_card(path)
    # Digests counted anew would call the damaged plane right.
    assert TaperFile.open(path).verify() == ["head.plane3"]


def test_a_file_cut_off_is_refused(path: Path) -> None:
    file = TaperFile.open(path)
    path.write_bytes(path.read_bytes()[: file.bytes_at(3)])
    before = path.read_bytes()
    with pytest.raises(CorruptFileError, match=r"is cut off at .* only a whole file"):
        rewrite_header(path, file.header)
    assert path.read_bytes() == before


def test_a_header_of_other_tensors_is_refused(path: Path) -> None:
    before = path.read_bytes()
    header = TaperFile.open(path).header
    narrow = dataclasses.replace(header, config=dataclasses.replace(header.config, vocab_size=299))
    with pytest.raises(ValueError, match="does not describe the tensors"):
        rewrite_header(path, narrow)
    assert path.read_bytes() == before
    assert len([*path.parent.iterdir()]) == 1


def test_a_link_is_followed(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.taper"
    link.symlink_to(path)
    with_card(link)
    assert link.is_symlink()
    assert TaperFile.open(path).card["reference"] == "float"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_failed_write_leaves_the_old_file(path: Path, monkeypatch, error) -> None:
    before = path.read_bytes()

    def broken(old, file, chunk):
        file.write(old.read(1000))
        raise error

    monkeypatch.setattr(shutil, "copyfileobj", broken)
    with pytest.raises(type(error)):
        with_card(path)
    assert path.read_bytes() == before
    assert len([*path.parent.iterdir()]) == 1


def test_full_disk_is_refused_before_writing(path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(DoesNotFitError, match="1,000 free"):
        with_card(path)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_killed_while_copying_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)], env={**os.environ}, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    TaperFile.open(path, verify=True)
