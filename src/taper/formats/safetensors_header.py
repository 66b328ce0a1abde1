"""The frame of a safetensors file: length field, JSON header, table of tensors.

Our own reader, because a `.taper` file that is cut off misses its last tensors, and because Hugging Face
shards hold BF16, which NumPy has no type for. Everything here comes from outside: each number is checked
before it is used.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taper.errors import CorruptFileError, ModelNotFoundError

LENGTH_FIELD_BYTES = 8
# The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000
DTYPE_BYTES = {"U8": 1, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4}

_MAGICS = {
    b"GGUF": "a GGUF file",
    b"ggjt": "an old llama.cpp file",
    b"PK\x03\x04": "a zip archive, perhaps a pickled PyTorch checkpoint",
    b"\x80\x02": "a Python pickle",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
    b"versio": "a Git LFS pointer; the file itself was not downloaded",
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Place of one tensor: bytes begin..end, counted from the first data byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The checked frame of a file.

    Attributes:
        raw: length field and header as they lie in the file.
        entries: by name, in the order of their data.
        data_begin: offset of the first data byte in the file.
        data_bytes: size of all tensors, whether or not the file holds them.
        file_bytes: size of the file.
    """

    raw: bytes
    metadata: dict[str, str]
    entries: dict[str, TensorEntry]
    data_begin: int
    data_bytes: int
    file_bytes: int


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header. The data may be shorter than the header says; it is never longer.

    Raises:
        ModelNotFoundError: no such file, not readable, or another format.
        CorruptFileError: the header contradicts itself or the file's length.
    """
    raw, file_bytes = _read_raw(path)
    parsed = _parse_json(path, raw[LENGTH_FIELD_BYTES:])
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFileError(f"{path}: __metadata__ is not a table of strings")
    entries = _contiguous(path, [_entry(path, name, value) for name, value in parsed.items()])
    data_bytes = max((entry.end for entry in entries.values()), default=0)
    if file_bytes > len(raw) + data_bytes:
        raise CorruptFileError(
            f"{path}: {file_bytes:,} bytes, but its header describes only {len(raw) + data_bytes:,}",
            hint="copy or download the file again",
        )
    return SafetensorsHeader(raw, metadata, entries, len(raw), data_bytes, file_bytes)


def _read_raw(path: Path) -> tuple[bytes, int]:
    """Length field with header, and the file's size."""
    if not path.exists():
        raise ModelNotFoundError(f"no such file: {path}", hint="check the path")
    if not path.is_file():
        raise ModelNotFoundError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(LENGTH_FIELD_BYTES)
            length = int.from_bytes(start, "little")
            _check_length(path, start + file.read(1), length, file_bytes)
            file.seek(LENGTH_FIELD_BYTES)
            return start + file.read(length), file_bytes
    except OSError as error:
        raise ModelNotFoundError(f"cannot read {path}: {error.strerror}") from error


def _check_length(path: Path, start: bytes, length: int, file_bytes: int) -> None:
    if not start:
        raise ModelNotFoundError(f"{path} is empty", hint="copy or download the file again")
    for magic, description in _MAGICS.items():
        if start.startswith(magic):
            raise ModelNotFoundError(
                f"{path} is not a .taper file: looks like {description}",
                hint="make one from a Hugging Face folder: taper quantize FOLDER -o FILE.taper",
            )
    if length > MAX_HEADER_BYTES or length < 2 or (len(start) > LENGTH_FIELD_BYTES and start[-1:] != b"{"):
        raise ModelNotFoundError(
            f"{path} is not a .taper file: it does not begin with a safetensors header",
            hint="make one from a Hugging Face folder: taper quantize FOLDER -o FILE.taper",
        )
    if LENGTH_FIELD_BYTES + length > file_bytes:
        raise CorruptFileError(
            f"{path}: cut off inside its header, at {file_bytes:,} of "
            f"{LENGTH_FIELD_BYTES + length:,} header bytes",
            hint="copy or download the file again",
        )


def _parse_json(path: Path, header: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{path}: header is not valid JSON: {error}", hint="copy or download the file again"
        ) from error
    if not isinstance(parsed, dict):
        raise CorruptFileError(f"{path}: header is not a JSON object")
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    """One line of the table; Python integers do not overflow, so a product of any shape is safe to
    compare."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFileError(f"{path}: tensor {name} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise CorruptFileError(
            f"{path}: tensor {name} has dtype {dtype!r}; only {', '.join(DTYPE_BYTES)} can be read",
            hint="convert the checkpoint to bfloat16 or float32",
        )
    if not _counts(shape) or len(shape) > 8 or not _counts(offsets) or len(offsets) != 2:
        raise CorruptFileError(f"{path}: tensor {name} has shape {shape} and data_offsets {offsets}")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise CorruptFileError(
            f"{path}: tensor {name} of shape {shape} and dtype {dtype} spans {end - begin:,} bytes"
        )
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _contiguous(path: Path, entries: list[TensorEntry]) -> dict[str, TensorEntry]:
    """By name in data order; refuses gaps and overlaps, as safetensors does."""
    position = 0
    ordered = sorted(entries, key=lambda entry: (entry.begin, entry.end))
    for entry in ordered:
        if entry.begin != position:
            raise CorruptFileError(
                f"{path}: tensor {entry.name} begins at {entry.begin:,}, expected {position:,}"
            )
        position = entry.end
    return {entry.name: entry for entry in ordered}
