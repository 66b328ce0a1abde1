"""A `.taper` file whose planes come in one after another: from a cold disk, or while it is being written."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from taper.errors import CorruptFileError
from taper.formats.container import TaperFile
from taper.formats.safetensors_header import (
    LENGTH_FIELD_BYTES,
    MAX_HEADER_BYTES,
    SafetensorsHeader,
    read_header,
)
from taper.formats.spec import DIGEST_DIGITS, TaperHeader
from taper.formats.validate import validate

# 20 ms of a disk or network at 200 MB/s: a plane is known to be whole soon after its last byte, and each read
# is long enough for the disk's full rate.
CHUNK_BYTES = 4 << 20
# How long to wait before looking again whether a file has grown.
POLL_S = 0.02
# A file that has not grown for so long is taken as cut off.
STALL_S = 10.0
# What curl, browsers and most download tools write to until the file is whole.
PARTIAL_SUFFIX = ".part"

# (bytes that are there, bytes that are needed)
Progress = Callable[[int, int], None]


class Arrival:
    """Reads a file from front to back and knows which of its planes are whole in memory.

    A width counts as available when all bytes of its planes are in the page cache and, with `verify`, match
    their checksums. It is driven from outside, one `advance` at a time; nothing here waits but `wait`.

    Attributes:
        available_bits: planes that are whole; 0 until the first is.
        damaged: the first tensor that did not match its checksum; nothing is read after it.

    Args:
        path: the file; where it does not exist but PATH.part does, that one is followed, also after it is
            renamed.
        verify: compare the tensors' checksums as they come.

    Raises:
        ModelNotFoundError: no such file.
    """

    def __init__(self, path: str | Path, verify: bool = False) -> None:
        path = Path(path)
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._paths = (path, partial) if not path.exists() and partial.exists() else (path, renamed(path))
        self.available_bits = 0
        self.damaged: str | None = None
        self._verify = verify
        if not self.path.is_file():
            read_header(self.path)  # says what is wrong
        self._file: BinaryIO = self.path.open("rb", buffering=0)
        self._buffer = memoryview(bytearray(CHUNK_BYTES))
        self._position = 0
        self._frame: SafetensorsHeader | None = None
        self._header: TaperHeader | None = None
        self._ends: dict[int, int] = {}
        self._min_bits = 0
        self._checker: Checker | None = None

    @property
    def path(self) -> Path:
        """Where the file is now."""
        return next((path for path in self._paths if path.exists()), self._paths[0])

    @property
    def is_complete(self) -> bool:
        """Whether nothing more will come: every plane is there, or a damaged one was found."""
        return self.damaged is not None or (self._frame is not None and self._position == self._total_bytes)

    @property
    def is_whole(self) -> bool:
        """Whether every plane is available."""
        return self.is_complete and self.damaged is None

    @property
    def can_run(self) -> bool:
        """Whether the least width is available."""
        return 0 < self._min_bits <= self.available_bits

    def advance(self, only_cached: bool = False) -> bool:
        """Take in the next chunk. Returns whether there was anything new.

        Args:
            only_cached: take nothing that would have to be read from the disk.

        Raises:
            ModelNotFoundError, CorruptFileError: as `TaperFile.open`, as soon as the header is there; with
                `verify`, a tensor that every width needs does not match its checksum.
        """
        if self._frame is None and not self._read_frame():
            return False
        if self.is_complete:
            return False
        num_bytes = self._take_chunk(only_cached)
        self._position += num_bytes
        if self.damaged is not None:
            self._position = self._begin_of(self.damaged)
        self.available_bits = sum(end <= self._position for end in self._ends.values())
        if self.damaged is not None and not self.can_run:
            raise CorruptFileError(
                f"{self.path}: the bytes of {self.damaged} do not match their checksum",
                hint="copy or download the file again",
            )
        return num_bytes > 0

    def wait(
        self,
        progress: Progress = lambda there, needed: None,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Advance until the least width is available.

        Raises:
            CorruptFileError: the file has not grown for `STALL_S` and is still too short; what `advance`
                raises.
        """
        while not self.can_run:
            if self.advance():
                progress(self._position, self._ends.get(self._min_bits, self._position))
            elif self._has_stalled(now()):
                TaperFile.open(self.path)  # says where it is cut off
            else:
                sleep(POLL_S)

    def open(self) -> TaperFile:
        """The file with the planes that are available."""
        assert self._frame is not None
        assert self._header is not None
        frame = replace(self._frame, file_bytes=self._size())
        return TaperFile(self.path, frame, self._header, self.available_bits)

    def notice(self) -> str | None:
        """One line for people where the file is shorter than its header says, else None."""
        size = self._size()
        if size >= self._total_bytes:
            return None
        if self._has_stalled(time.time()):
            return self.open().notice()
        return (
            f"{size:,} of {self._total_bytes:,} bytes are there, {self.available_bits} of {len(self._ends)} "
            "planes; more are used as they arrive"
        )

    def close(self) -> None:
        """Read no more."""
        self._file.close()

    @property
    def _total_bytes(self) -> int:
        assert self._frame is not None
        return self._frame.data_begin + self._frame.data_bytes

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _has_stalled(self, now_s: float) -> bool:
        return now_s - os.fstat(self._file.fileno()).st_mtime > STALL_S

    def _begin_of(self, tensor: str) -> int:
        assert self._frame is not None
        return self._frame.data_begin + self._frame.entries[tensor].begin

    def _read_frame(self) -> bool:
        """Read and check the header once all of it is there."""
        self._file.seek(0)
        start = self._file.read(LENGTH_FIELD_BYTES)
        length = int.from_bytes(start, "little")
        size = self._size()
        if len(start) < LENGTH_FIELD_BYTES or size < LENGTH_FIELD_BYTES + length <= MAX_HEADER_BYTES:
            return False
        frame = read_header(self.path)
        self._header = validate(self.path, frame)
        self._min_bits = self._header.min_bits
        self._ends = plane_ends(frame)
        if self._verify:
            self._checker = Checker(frame)
        # The text of the header is megabytes, and nothing needs it any more.
        self._frame = replace(frame, raw=b"", metadata={})
        return True

    def _take_chunk(self, only_cached: bool) -> int:
        """Bytes of the next chunk that are in memory after the call."""
        size = min(self._size(), self._total_bytes)
        end = min(self._position + CHUNK_BYTES, size)
        if end <= self._position:
            return 0
        cached = is_cached(self._file, self._position, end)
        if self._checker is None and cached:
            return end - self._position
        if only_cached and not cached:
            return 0
        self._file.seek(self._position)
        chunk = self._buffer[: self._file.readinto(self._buffer[: end - self._position])]  # type: ignore[attr-defined]
        if self._checker is not None:
            self.damaged = self._checker.take(self._position, chunk)
        return len(chunk)


class Checker:
    """Compares the checksums of tensors whose bytes come in file order."""

    def __init__(self, frame: SafetensorsHeader) -> None:
        self._digests: dict[str, str] = json.loads(frame.metadata["digests"])
        self._begin = frame.data_begin
        self._entries = iter(frame.entries.values())
        self._next()

    def take(self, position: int, chunk: memoryview) -> str | None:
        """Take the bytes at a position of the file; the name of a tensor that ends there and is damaged."""
        chunk = chunk[max(0, self._begin - position) :]
        while self._entry is not None:
            part = chunk[: self._left]
            self._sha.update(part)
            self._left -= len(part)
            chunk = chunk[len(part) :]
            if self._left:
                return None
            if self._sha.hexdigest()[:DIGEST_DIGITS] != self._digests[self._entry.name]:
                return self._entry.name
            self._next()
        return None

    def _next(self) -> None:
        self._entry = next(self._entries, None)
        self._left = 0 if self._entry is None else self._entry.num_bytes
        self._sha = hashlib.sha256()


def plane_ends(frame: SafetensorsHeader) -> dict[int, int]:
    """Number of planes to the offset in the file at which so many are whole."""
    ends = {}
    for entry in frame.entries.values():
        _, mark, plane = entry.name.rpartition(".plane")
        if mark:
            ends[int(plane) + 1] = frame.data_begin + entry.end
    return ends


def is_cached(file: BinaryIO, begin: int, end: int) -> bool:
    """Whether a part of a file is in the page cache, by its first and its last byte.

    The kernel reads ahead and drops pages in long runs; every page would be a system call each. A hole that
    this misses is read when it is used. False where the system cannot tell (other than Linux): then all is
    read, which costs a copy.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    byte = bytearray(1)
    try:
        return all(
            os.preadv(file.fileno(), [byte], offset, os.RWF_NOWAIT) == 1 for offset in (begin, end - 1)
        )
    except OSError:  # EAGAIN: not cached; EOPNOTSUPP: the file system cannot tell
        return False


def renamed(path: Path) -> Path:
    """What a partial file is called once it is whole; any other path stays."""
    return path.with_name(path.name.removesuffix(PARTIAL_SUFFIX))
