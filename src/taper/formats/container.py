"""Reader of the `.taper` file over one read-only memory map (docs/format.md)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from taper.config import ModelConfig
from taper.errors import CorruptFileError, ModelNotFoundError
from taper.formats.learned import LearnedScheduler
from taper.formats.outliers import OUTLIER_PARTS, OutlierRows
from taper.formats.safetensors_header import SafetensorsHeader, read_header
from taper.formats.sensitivity import Sensitivity
from taper.formats.spec import (
    DIGEST_DIGITS,
    F32,
    I8,
    MAX_BITS,
    U8,
    Codebook,
    MatrixSpec,
    PlanedMatrix,
    TaperHeader,
    expected_matrices,
    table_columns,
)
from taper.formats.validate import header_hash_matches, validate

_DTYPES: dict[str, type[np.generic]] = {
    "U8": np.uint8,
    "U16": np.uint16,
    "F16": np.float16,
    "I32": np.int32,
    "F32": np.float32,
}
_HASH_CHUNK_BYTES = 1 << 20


class TaperFile:
    """An open `.taper` file. Arrays are read-only views of the map and keep it alive.

    A file that is cut off opens with the planes that it holds whole, and any file with no more than it is
    asked for: `max_bits` counts those, `total_bits` the planes that the header names.
    """

    def __init__(
        self, path: Path, frame: SafetensorsHeader, header: TaperHeader, max_bits: int = MAX_BITS
    ) -> None:
        self.path = path
        self.total_bits = header.max_bits
        self.matrices: list[MatrixSpec] = header.matrices
        # The raw header with the tokenizer's text is megabytes; nothing needs it twice.
        self._frame = replace(frame, raw=b"", metadata={})
        self.max_bits = min(self._whole_planes(), max_bits)
        self._header = _usable(path, header, self.max_bits)
        self.matrices = self._header.matrices
        self._data = _map(path)
        for entry in frame.entries.values():
            if entry.dtype in ("F16", "F32"):
                _check_finite(path, entry.name, self.tensor(entry.name))
            elif entry.name.endswith(".tables"):
                _check_tables(path, entry.name, self.tensor(entry.name))
        for spec in self.matrices:
            if (outliers := self._outliers(spec.name)) is not None:
                _check_outliers(path, spec, outliers)

    @classmethod
    def open(cls, path: str | Path, verify: bool = False, max_bits: int = MAX_BITS) -> TaperFile:
        """Open and check a file. The header's checksum is always compared, the tensors' only with `verify`.

        Args:
            path: the file.
            verify: read it once and compare every checksum.
            max_bits: open it as if it were cut after so many planes.

        Raises:
            ModelNotFoundError: no such file, or another format.
            CorruptFileError: the bytes contradict the description, or too few planes are whole.
        """
        path = Path(path)
        if path.is_dir():
            raise ModelNotFoundError(
                f"{path} is a folder, not a .taper file",
                hint=f"make a file of a Hugging Face checkpoint: taper quantize {path} -o FILE.taper",
            )
        frame = read_header(path)
        file = cls(path, frame, validate(path, frame), max_bits)
        if verify and (damaged := file.verify()):
            raise CorruptFileError(
                f"{path}: the bytes of {_some(damaged)} do not match their checksums",
                hint="copy or download the file again",
            )
        return file

    @property
    def header(self) -> TaperHeader:
        """Everything that is no tensor, for widths up to `max_bits`; `write_taper` writes a changed one."""
        return self._header

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self._header.config

    @property
    def min_bits(self) -> int:
        """Least width that may be read."""
        return self._header.min_bits

    @property
    def codebook(self) -> Codebook:
        """Values of the widths min_bits..max_bits."""
        return self._header.codebook

    @property
    def tokenizer_json(self) -> str | None:
        """Text of tokenizer.json, or None."""
        return self._header.tokenizer_json

    @property
    def chat_template(self) -> str | None:
        """Jinja text, or None."""
        return self._header.chat_template

    @property
    def policies(self) -> dict[str, str]:
        """Policies that come with the model: name to policy text."""
        return self._header.policies

    @property
    def card(self) -> dict[str, Any]:
        """Quality card."""
        return self._header.card

    @property
    def provenance(self) -> dict[str, Any]:
        """How the file was made."""
        return self._header.provenance

    @property
    def sensitivity(self) -> Sensitivity | None:
        """What each matrix costs at each width, where it was measured."""
        return self._header.sensitivity

    @property
    def learned(self) -> LearnedScheduler | None:
        """What decides the widths of the policy `learned`, where it was trained."""
        return self._header.learned

    @property
    def file_bytes(self) -> int:
        """Size of the file as it is."""
        return self._frame.file_bytes

    @property
    def total_bytes(self) -> int:
        """Size that the header describes."""
        return self._frame.data_begin + self._frame.data_bytes

    @property
    def num_weights(self) -> int:
        """Weights of all matrices; a tied embedding counts once."""
        return sum(spec.num_weights for spec in self.matrices)

    @property
    def is_truncated(self) -> bool:
        """Whether the file ends before its last plane does."""
        return self.file_bytes < self.total_bytes

    def bytes_at(self, bits: int) -> int:
        """Bytes of the file's prefix that is the model at `bits`: header, small tensors and planes."""
        # The planes of a level lie one after another; a matrix with a lower ceiling has none.
        names = (f"{spec.name}.plane{bits - 1}" for spec in reversed(self.matrices))
        last = next(name for name in names if name in self._frame.entries)
        return self._frame.data_begin + self._frame.entries[last].end

    def memory_at(self, bits: int) -> int:
        """Bytes that the model keeps in memory at `bits`: those of `bytes_at`, and the embedding's other
        planes, of which every look-up reads a row."""
        others = (f"embed.plane{plane}" for plane in range(bits, self.total_bits))
        rows = sum(self._frame.entries[name].num_bytes for name in others if name in self._frame.entries)
        return self.bytes_at(bits) + rows

    @property
    def unplaned_bytes(self) -> int:
        """Bytes before the planes: header, scales, signs, biases, norm. Every reading needs them."""
        return self._frame.data_begin + self._frame.entries[f"{self.matrices[0].name}.plane0"].begin

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Read-only view of one tensor. Raises KeyError for a name or a plane that the file does not hold."""
        entry = self._frame.entries[name]
        if self._frame.data_begin + entry.end > self.file_bytes:
            raise KeyError(f"{name} lies beyond the end of the file")
        flat = np.frombuffer(
            self._data,
            dtype=_DTYPES[entry.dtype],
            count=entry.num_bytes // np.dtype(_DTYPES[entry.dtype]).itemsize,
            offset=self._frame.data_begin + entry.begin,
        )
        return flat.reshape(entry.shape)

    def matrix(self, name: str) -> PlanedMatrix:
        """One matrix with the planes that are whole. Raises KeyError for an unknown name."""
        spec = next((spec for spec in self.matrices if spec.name == name), None)
        if spec is None:
            raise KeyError(name)
        width = spec.width_at(self.max_bits)
        return PlanedMatrix(
            spec=spec,
            planes=[self.tensor(f"{name}.plane{plane}") for plane in range(width)],
            # A cut-off file has fewer levels than its scales have rows.
            scales=self.tensor(f"{name}.scales")[: width - self.min_bits + 1],
            bias=self.tensor(f"{name}.bias") if spec.has_bias else None,
            signs=unpack_signs(self.tensor(f"{name}.signs"), spec.in_features),
            outliers=self._outliers(name),
            tables=self._tables(spec, width) if spec.has_tables else None,
            gain=self.tensor(f"{name}.gain") if spec.has_gain else None,
            offsets=self.tensor(f"{name}.offsets")[: width - self.min_bits + 1] if spec.has_offsets else None,
        )

    def verify(self) -> list[str]:
        """Names of the tensors whose bytes do not match their digests, `header` among them; empty when all is
        well.

        Tensors that a cut-off file does not hold whole are not looked at. Reads the file, not the map, so
        that the resident memory stays small.
        """
        frame = read_header(self.path)
        damaged = [] if header_hash_matches(frame.raw) else ["header"]
        digests = json.loads(frame.metadata["digests"])
        with self.path.open("rb") as file:
            for entry in self._frame.entries.values():
                file.seek(self._frame.data_begin + entry.begin)
                whole = self._frame.data_begin + entry.end <= self.file_bytes
                if whole and _digest(file, entry.num_bytes) != digests[entry.name]:
                    damaged.append(entry.name)
        return damaged

    def release_planes(self, above_bits: int) -> None:
        """Give back the memory that the planes above a width take in this process.

        They stay readable: what is touched again comes back from the page cache, where the system keeps it
        as long as nothing else needs the room, or from the disk. Does nothing where the system has no
        `madvise`.
        """
        self._advise("MADV_DONTNEED", above_bits, self.max_bits)

    def restore_planes(self, bits: int) -> None:
        """Ask the system to read the planes up to a width ahead of their use."""
        self._advise("MADV_WILLNEED", self.min_bits, bits)

    def notice(self) -> str | None:
        """One line for people when the file is cut off, else None."""
        if not self.is_truncated:
            return None
        return (
            f"file is cut off at {self.file_bytes:,} of {self.total_bytes:,} bytes: {self.max_bits} of "
            f"{self.total_bits} planes are whole; running at up to {self.max_bits} bits"
        )

    def _advise(self, advice: str, low_bits: int, high_bits: int) -> None:
        """Advise the system about the pages of the planes above `low_bits` up to `high_bits`; a page that a
        lower plane shares is left alone."""
        begin = -(-self.bytes_at(low_bits) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = self.bytes_at(high_bits) - begin
        if hasattr(mmap, advice) and length > 0:
            self._data.madvise(getattr(mmap, advice), begin, length)

    def _outliers(self, name: str) -> OutlierRows | None:
        if f"{name}.outliers.starts" not in self._frame.entries:
            return None
        return OutlierRows(*(self.tensor(f"{name}.outliers.{part}") for part in OUTLIER_PARTS))

    def _tables(self, spec: MatrixSpec, width: int) -> I8:
        tables: I8 = self.tensor(f"{spec.name}.tables").view(np.int8)
        return tables[:, : table_columns(self.min_bits, width)]

    def _whole_planes(self) -> int:
        whole = 0
        while whole < self.total_bits and self.bytes_at(whole + 1) <= self.file_bytes:
            whole += 1
        return whole


def unpack_signs(packed: U8, in_features: int) -> F32:
    """Float32 (in_features) of +1 and -1 from bits, bit j of byte i being column 8i + j; 1 means -1."""
    bits = np.unpackbits(packed, bitorder="little")[:in_features]
    return np.float32(1) - np.float32(2) * bits.astype(np.float32)


def _usable(path: Path, header: TaperHeader, max_bits: int) -> TaperHeader:
    """The header of the model that a cut-off file still holds."""
    if max_bits < header.min_bits:
        raise CorruptFileError(
            f"{path} is cut off: {max_bits} of {header.max_bits} planes are whole, "
            f"at least {header.min_bits} are needed",
            hint="copy or download the file again",
        )
    planes = {name: planes for name, planes in header.planes.items() if planes < max_bits}
    matrices = expected_matrices(header.config, planes, header.rotated)
    num_widths = {spec.name: spec.width_at(max_bits) - header.min_bits + 1 for spec in matrices}
    return replace(
        header,
        max_bits=max_bits,
        codebook=header.codebook.cut(max_bits),
        planes=planes,
        sensitivity=header.sensitivity and header.sensitivity.cut(num_widths),
        relative_errors={name: row[: num_widths[name]] for name, row in header.relative_errors.items()},
    )


def _map(path: Path) -> mmap.mmap:
    """The file's bytes.

    A system with huge pages for files (Linux 6.18 on ext4, for one) reads what its cache lacks in pages of
    2 MiB: decoding at 4 bits is 1 to 8 % faster so (docs/performance.md, "Pages").
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelNotFoundError(f"cannot map {path}: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            data.madvise(mmap.MADV_HUGEPAGE)
    return data


def _check_finite(path: Path, name: str, values: npt.NDArray[Any]) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        index = [int(i) for i in np.argwhere(~finite)[0]]
        raise CorruptFileError(
            f"{path}: {name} at {index} is {values[tuple(index)]}, not a finite number",
            hint="copy or download the file again",
        )


def _check_outliers(path: Path, spec: MatrixSpec, outliers: OutlierRows) -> None:
    try:
        outliers.check(spec.in_features)
    except ValueError as error:
        raise CorruptFileError(
            f"{path}: {spec.name}.outliers: {error}", hint="copy or download the file again"
        ) from error


def _check_tables(path: Path, name: str, values: U8) -> None:
    # -128 has no counterpart: its product with a negated activation would leave int8.
    if (values == 0x80).any():
        raise CorruptFileError(
            f"{path}: {name} holds -128, outside -127..127", hint="copy or download the file again"
        )


def _digest(file: BinaryIO, num_bytes: int) -> str:
    sha = hashlib.sha256()
    while num_bytes > 0 and (chunk := file.read(min(num_bytes, _HASH_CHUNK_BYTES))):
        sha.update(chunk)
        num_bytes -= len(chunk)
    return sha.hexdigest()[:DIGEST_DIGITS]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
