"""A file that comes in plane by plane: what is available when, checksums, waiting, renaming."""

from __future__ import annotations

import os

import pytest

from taper.errors import CorruptFileError, ModelNotFoundError
from taper.formats import arrival as module
from taper.formats.arrival import Arrival, is_cached, plane_ends
from taper.formats.container import TaperFile
from taper.formats.safetensors_header import read_header
from taper.testing.tiny import tiny_taper


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_taper(tmp_path_factory.mktemp("arrival") / "whole.taper")


@pytest.fixture
def growing(whole, tmp_path):
    """A file that `grow` brings to a size."""
    path = tmp_path / "model.taper"
    data = whole.read_bytes()

    def grow(size: int) -> None:
        path.write_bytes(data[:size])

    grow(0)
    return path, grow


def drain(arrival: Arrival) -> None:
    while arrival.advance():
        pass


def test_a_plane_is_available_with_its_last_byte_and_not_before(whole, growing):
    path, grow = growing
    arrival = Arrival(path)
    for bits in range(1, 9):
        end = TaperFile.open(whole).bytes_at(bits)
        grow(end - 1)
        drain(arrival)
        assert (arrival.available_bits, arrival.is_complete) == (bits - 1, False)
        grow(end)
        drain(arrival)
        assert (arrival.available_bits, arrival.is_whole) == (bits, bits == 8)


def test_can_run_from_the_least_width_on(whole, growing):
    path, grow = growing
    arrival = Arrival(path)
    for bits in (1, 2):
        grow(TaperFile.open(whole).bytes_at(bits))
        drain(arrival)
        assert arrival.can_run == (bits == 2)


@pytest.mark.parametrize("size", [0, 4, 8, 100])
def test_nothing_is_available_while_the_header_is_incomplete(growing, size):
    path, grow = growing
    arrival = Arrival(path)
    grow(size)
    assert not arrival.advance()
    assert (arrival.available_bits, arrival.can_run) == (0, False)


def test_opens_with_the_planes_that_are_available(whole, growing):
    path, grow = growing
    arrival = Arrival(path)
    grow(TaperFile.open(whole).bytes_at(5) + 70)
    drain(arrival)
    file = arrival.open()
    assert (file.max_bits, file.total_bits) == (5, 8)


def test_a_width_can_be_asked_of_a_whole_file(whole, growing):
    path, grow = growing
    grow(TaperFile.open(whole).bytes_at(3))
    cut, asked = TaperFile.open(path), TaperFile.open(whole, max_bits=3)
    assert (asked.max_bits, asked.total_bits, asked.is_truncated) == (3, 8, False)
    for name in ("embed", "layers.1.down"):
        for ours, theirs in zip(asked.matrix(name).planes, cut.matrix(name).planes, strict=True):
            assert ours.tobytes() == theirs.tobytes()


def test_chunks_follow_one_another(whole, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    arrival = Arrival(whole, verify=True)
    seen = []
    while arrival.advance():
        seen.append(arrival.available_bits)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1], len(seen)) == (0, 8, -(-whole.stat().st_size // 1000))
    assert arrival.is_whole


@pytest.mark.parametrize("chunk_bytes", [997, 1 << 20])
def test_a_damaged_plane_is_never_available(whole, tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    data = bytearray(whole.read_bytes())
    entry = read_header(whole).entries["layers.0.o.plane4"]
    data[read_header(whole).data_begin + entry.begin] ^= 1
    path = tmp_path / "damaged.taper"
    path.write_bytes(data)
    checked, unchecked = Arrival(path, verify=True), Arrival(path)
    drain(unchecked)
    drain(checked)
    assert unchecked.available_bits == 8
    assert (checked.damaged, checked.is_complete, checked.is_whole) == ("layers.0.o.plane4", True, False)
    assert checked.available_bits == 4


def test_damage_that_every_width_needs_is_an_error(whole, tmp_path):
    data = bytearray(whole.read_bytes())
    data[read_header(whole).data_begin] ^= 1
    path = tmp_path / "damaged.taper"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"norm\.final"):
        drain(Arrival(path, verify=True))


def test_wait_returns_when_the_least_width_is_there(whole, growing):
    path, grow = growing
    arrival = Arrival(path)
    enough = TaperFile.open(whole).bytes_at(2)
    sizes = iter([50, enough - 1, enough])
    told = []
    arrival.wait(lambda *progress: told.append(progress), lambda seconds: grow(next(sizes)))
    assert arrival.available_bits == 2
    assert told == [(enough - 1, enough), (enough, enough)]


def test_wait_gives_up_on_a_file_that_does_not_grow(whole, growing):
    path, grow = growing
    grow(TaperFile.open(whole).bytes_at(2) - 1)
    modified = path.stat().st_mtime
    slept = []
    times = iter([modified, modified + module.STALL_S, modified + module.STALL_S + 1])
    with pytest.raises(CorruptFileError, match="1 of 8 planes are whole"):
        Arrival(path).wait(sleep=slept.append, now=lambda: next(times))
    assert slept == [module.POLL_S] * 2


def test_other_files_are_refused_at_once(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelNotFoundError, match="GGUF"):
        Arrival(path).wait()
    with pytest.raises(ModelNotFoundError, match="no such file"):
        Arrival(tmp_path / "none.taper")


@pytest.mark.parametrize("asked", ["model.taper", "model.taper.part"])
def test_a_partial_file_is_followed_when_it_gets_its_name(whole, tmp_path, asked):
    partial, final = tmp_path / "model.taper.part", tmp_path / "model.taper"
    data = whole.read_bytes()
    partial.write_bytes(data[: TaperFile.open(whole).bytes_at(2)])
    arrival = Arrival(tmp_path / asked)
    drain(arrival)
    assert (arrival.available_bits, arrival.path) == (2, partial)
    with partial.open("ab") as file:
        file.write(data[partial.stat().st_size :])
    os.rename(partial, final)
    drain(arrival)
    assert (arrival.available_bits, arrival.open().path) == (8, final)


def test_nothing_is_read_from_the_disk_where_only_the_cache_is_asked_for(whole, monkeypatch):
    monkeypatch.setattr(module, "is_cached", lambda file, begin, end: False)
    arrival = Arrival(whole)
    assert not arrival.advance(only_cached=True)
    assert arrival.advance()


def test_cached_parts_are_not_copied(whole, monkeypatch):
    monkeypatch.setattr(module, "is_cached", lambda file, begin, end: True)
    arrival = Arrival(whole)
    arrival.advance()
    place = arrival._file.tell()
    drain(arrival)
    assert arrival.is_whole
    assert arrival._file.tell() == place


def test_a_file_just_written_is_cached_where_the_system_can_tell(whole):
    with whole.open("rb", buffering=0) as file:
        seen = is_cached(file, 0, whole.stat().st_size)
    assert seen in (True, False)
    if hasattr(os, "RWF_NOWAIT"):
        # EOPNOTSUPP on some file systems reads as "not cached"; past the end nothing is.
        with whole.open("rb", buffering=0) as file:
            assert not is_cached(file, whole.stat().st_size, whole.stat().st_size + 1)


def test_plane_ends_are_those_of_the_file(whole):
    file = TaperFile.open(whole)
    assert plane_ends(read_header(whole)) == {bits: file.bytes_at(bits) for bits in range(1, 9)}
