"""Writer of the `.taper` file: layout first, then a stream of tensors, then the header, under a temporary
name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from taper.errors import CorruptFileError, DoesNotFitError, UsageError
from taper.formats.outliers import MAX_COLUMNS, OUTLIER_PARTS, OutlierRows
from taper.formats.safetensors_header import LENGTH_FIELD_BYTES, MAX_HEADER_BYTES, TensorEntry, read_header
from taper.formats.spec import (
    ALIGNMENT,
    DIGEST_DIGITS,
    F32,
    FINAL_NORM,
    FORMAT,
    NARROW_VALUE,
    U8,
    MatrixSpec,
    PlanedMatrix,
    TaperHeader,
    layout,
    table_columns,
)
from taper.formats.validate import check_config, find_header_hash, validate

# A list, or a function that starts a new pass; each plane is one pass over all matrices.
MatrixSource = Callable[[], Iterable[PlanedMatrix]] | Iterable[PlanedMatrix]
_COPY_CHUNK_BYTES = 1 << 20


def write_taper(
    path: str | Path, header: TaperHeader, matrices: MatrixSource, tensors: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Write a file that appears under its name complete or not at all. The same input gives the same bytes.

    Makes max_bits + 1 passes over the matrices: one for scales, biases and signs, one for each plane. No more
    than one plane is held at a time beyond what the source holds.

    Args:
        path: the file; an old one of that name is replaced.
        header: everything that is no tensor.
        matrices: all matrices of the model in the order of docs/format.md, in every pass.
        tensors: `norm.final`, float32 (hidden).

    Raises:
        DoesNotFitError: the disk has too little room.
        UsageError: the folder is missing or not writable, or the name is a folder's.
        ValueError: an array does not have the shape or type that the header's configuration asks for.
    """
    path = Path(path)
    check_config(header.config)
    _check_target(path)
    source = _passes(matrices)
    small = _small_tensors(header, source, tensors)
    scale_rows = {spec.name: len(small[f"{spec.name}.scales"]) for spec in header.matrices}
    columns = {spec.name: small.get(f"{spec.name}.outliers.columns") for spec in header.matrices}
    num_outliers = {name: len(found) for name, found in columns.items() if found is not None}
    entries = layout(header, scale_rows, num_outliers)
    _write_file(path, header, entries, _arrays(header, source, small))


def described_bytes(
    header: TaperHeader, scale_rows: Mapping[str, int], num_outliers: Mapping[str, int] | None = None
) -> int:
    """Size of the file that `write_taper` makes of this header.

    Args:
        header: everything that is no tensor.
        scale_rows: matrix name to rows of its scales.
        num_outliers: matrix name to its outliers, of the matrices that have some.
    """
    entries = layout(header, scale_rows, num_outliers)
    return _data_begin(header, entries) + entries[-1].end


def rewrite_header(path: str | Path, header: TaperHeader) -> None:
    """Give a file another header (card, policies, tokenizer, ...) over the same tensors and digests.

    The file is written anew beside the old one and takes its name once it is whole and on the disk, so that
    a crash at any moment leaves either the old file or the new one. Open maps keep showing the old one.

    Args:
        path: a whole `.taper` file; a link to one is followed.
        header: describes exactly the tensors that the file holds.

    Raises:
        CorruptFileError: a file that ends early: its missing planes cannot be described anew.
        DoesNotFitError: the disk has no room for a second copy.
        UsageError: the folder is not writable, or the header would be too large.
        ValueError: the header describes other tensors than those in the file.
    """
    path = Path(path).resolve()
    frame = read_header(path)
    validate(path, frame)
    if frame.file_bytes < frame.data_begin + frame.data_bytes:
        raise CorruptFileError(
            f"{path} is cut off at {frame.file_bytes:,} of {frame.data_begin + frame.data_bytes:,} bytes: "
            "only a whole file takes another header",
            hint="copy or download the file again",
        )
    raw = _header_bytes(header, [*frame.entries.values()], json.loads(frame.metadata["digests"]))
    _check_disk(path, len(raw) + frame.data_bytes)
    with _replacing(path) as file, path.open("rb") as old:
        file.write(raw)
        old.seek(frame.data_begin)
        shutil.copyfileobj(old, file, _COPY_CHUNK_BYTES)
        file.flush()
        shutil.copymode(path, file.name)
        try:
            validate(path, read_header(Path(file.name)))
        except CorruptFileError as error:
            raise ValueError(f"the header does not describe the tensors in the file: {error}") from error


def pack_signs(signs: F32) -> U8:
    """Bits of +-1 signs; the inverse of `container.unpack_signs`."""
    return np.packbits(signs < 0, bitorder="little")


def _write_file(
    path: Path,
    header: TaperHeader,
    entries: list[TensorEntry],
    arrays: Iterable[tuple[str, npt.NDArray[Any]]],
) -> None:
    """Data first, under a temporary name; then the header, whose length the digests do not change."""
    data_begin = _data_begin(header, entries)
    _check_disk(path, data_begin + entries[-1].end)
    with _replacing(path) as file:
        file.write(bytes(data_begin))
        digests = _write_data(file, entries, arrays)
        file.seek(0)
        file.write(_header_bytes(header, entries, digests))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name once it is whole and on the disk; after any failure the old one is there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _passes(matrices: MatrixSource) -> Callable[[], Iterable[PlanedMatrix]]:
    if callable(matrices):
        return matrices
    if isinstance(matrices, Iterator):
        raise TypeError("matrices is an iterator, which ends after one pass; give a list or a function")
    return lambda: matrices


def _small_tensors(
    header: TaperHeader, source: Callable[[], Iterable[PlanedMatrix]], tensors: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """First pass: everything but planes, checked."""
    if set(tensors) != {FINAL_NORM}:
        raise ValueError(f"tensors {sorted(tensors)}; a .taper file has exactly {FINAL_NORM}")
    _check_array(FINAL_NORM, tensors[FINAL_NORM], np.float32, (header.config.hidden_size,))
    small = {FINAL_NORM: tensors[FINAL_NORM]}
    for matrix, spec in zip(source(), header.matrices, strict=True):
        levels = spec.width_at(header.max_bits) - header.min_bits + 1
        if matrix.spec != spec:
            raise ValueError(f"matrix {matrix.spec}, expected {spec}")
        rows = levels if len(matrix.scales) == levels else 1
        _check_array(f"{spec.name}.scales", matrix.scales, np.float16, (rows, spec.out_features))
        _check_array(f"{spec.name}.signs", matrix.signs, np.float32, (spec.in_features,))
        if not np.all(np.abs(matrix.signs) == 1):
            raise ValueError(f"{spec.name}.signs holds something else than +1 and -1")
        if (matrix.bias is not None) != spec.has_bias:
            raise ValueError(f"{spec.name}: the configuration and the matrix differ about a bias")
        small[f"{spec.name}.scales"] = matrix.scales
        small[f"{spec.name}.signs"] = pack_signs(matrix.signs)
        small |= _adjustments(spec, matrix, levels)
        if (matrix.tables is not None) != spec.has_tables:
            raise ValueError(f"{spec.name}: the header and the matrix differ about tables of its rows")
        if matrix.tables is not None:
            columns = table_columns(header.min_bits, spec.width_at(header.max_bits))
            _check_array(f"{spec.name}.tables", matrix.tables, np.int8, (spec.out_features, columns))
            if matrix.tables.min() < -NARROW_VALUE:
                raise ValueError(f"{spec.name}.tables holds -128, outside -{NARROW_VALUE}..{NARROW_VALUE}")
            small[f"{spec.name}.tables"] = matrix.tables
        if matrix.bias is not None:
            _check_array(f"{spec.name}.bias", matrix.bias, np.float32, (spec.out_features,))
            small[f"{spec.name}.bias"] = matrix.bias
        if matrix.outliers is not None:
            small |= _outlier_tensors(spec, matrix.outliers)
    return small


def _adjustments(spec: MatrixSpec, matrix: PlanedMatrix, levels: int) -> dict[str, npt.NDArray[Any]]:
    """Gain and offsets, where the header names them."""
    small: dict[str, npt.NDArray[Any]] = {}
    if (matrix.gain is not None) != spec.has_gain or (matrix.offsets is not None) != spec.has_offsets:
        raise ValueError(f"{spec.name}: the header and the matrix differ about a gain or offsets")
    if matrix.gain is not None:
        _check_array(f"{spec.name}.gain", matrix.gain, np.float32, (spec.in_features,))
        small[f"{spec.name}.gain"] = matrix.gain
    if matrix.offsets is not None:
        _check_array(f"{spec.name}.offsets", matrix.offsets, np.float16, (levels, spec.out_features))
        small[f"{spec.name}.offsets"] = matrix.offsets
    return small


def _outlier_tensors(spec: MatrixSpec, outliers: OutlierRows) -> dict[str, npt.NDArray[Any]]:
    if spec.in_features > MAX_COLUMNS:
        raise UsageError(
            f"{spec.name} has {spec.in_features:,} columns; outliers need at most {MAX_COLUMNS:,}",
            hint="quantise it without outliers",
        )
    at = f"{spec.name}.outliers"
    _check_array(f"{at}.starts", outliers.starts, np.int32, (spec.out_features + 1,))
    _check_array(f"{at}.columns", outliers.columns, np.uint16, (outliers.starts[-1],))
    _check_array(f"{at}.values", outliers.values, np.float16, (outliers.starts[-1],))
    outliers.check(spec.in_features)
    return {f"{at}.{part}": getattr(outliers, part) for part in OUTLIER_PARTS}


def _check_array(name: str, array: npt.NDArray[Any], dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} holds a value that is not finite")


def _arrays(
    header: TaperHeader, source: Callable[[], Iterable[PlanedMatrix]], small: Mapping[str, npt.NDArray[Any]]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Every array once: the small ones, then the planes, most significant first."""
    yield from small.items()
    for plane in range(header.max_bits):
        for matrix in source():
            spec = matrix.spec
            width = spec.width_at(header.max_bits)
            if len(matrix.planes) != width:
                raise ValueError(f"{spec.name} has {len(matrix.planes)} planes, expected {width}")
            if plane >= width:
                continue
            array = matrix.planes[plane]
            _check_array(f"{spec.name}.plane{plane}", array, np.uint8, (spec.out_features, spec.cols // 8))
            yield f"{spec.name}.plane{plane}", array


@dataclass(slots=True)
class _Sink:
    """Writes tensors at their places and keeps their digests."""

    file: BinaryIO
    data_begin: int
    digests: dict[str, str]

    def put(self, entry: TensorEntry, array: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self.file.seek(self.data_begin + entry.begin)
        self.file.write(data)
        self.digests[entry.name] = hashlib.sha256(data).hexdigest()[:DIGEST_DIGITS]


def _write_data(
    file: BinaryIO, entries: list[TensorEntry], arrays: Iterable[tuple[str, npt.NDArray[Any]]]
) -> dict[str, str]:
    """Digests by name, in the order of the layout."""
    sink = _Sink(file, file.tell(), {})
    by_name = {entry.name: entry for entry in entries}
    for name, array in arrays:
        sink.put(by_name.pop(name), array)
    for entry in by_name.values():  # what no array has is padding
        sink.put(entry, np.zeros(entry.shape, dtype=np.uint8))
    return {entry.name: sink.digests[entry.name] for entry in entries}


def _header_bytes(header: TaperHeader, entries: list[TensorEntry], digests: Mapping[str, str]) -> bytes:
    """Length field and header, spaces up to the alignment, with the header's own hash filled in."""
    table: dict[str, Any] = {"__metadata__": _metadata(header, digests)}
    for entry in entries:
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = _json(table).encode("utf-8")
    text += b" " * (-(LENGTH_FIELD_BYTES + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise UsageError(
            f"header of {len(text):,} bytes; a safetensors file allows {MAX_HEADER_BYTES:,}",
            hint="the tokenizer or the chat template is too large",
        )
    raw = len(text).to_bytes(LENGTH_FIELD_BYTES, "little") + text
    place = find_header_hash(raw)
    assert place is not None
    return raw[: place.start(1)] + hashlib.sha256(raw).hexdigest().encode() + raw[place.end(1) :]


def _data_begin(header: TaperHeader, entries: list[TensorEntry]) -> int:
    """Length of the field and header; the digests have one length whatever they are."""
    return len(_header_bytes(header, entries, {entry.name: "0" * DIGEST_DIGITS for entry in entries}))


def _metadata(header: TaperHeader, digests: Mapping[str, str]) -> dict[str, str]:
    metadata = {
        "format": FORMAT,
        "config": _json(header.config.to_dict()),
        "min_bits": str(header.min_bits),
        "max_bits": str(header.max_bits),
        "codebook": _json({"levels": header.codebook.to_levels()}),
        "matrices": _json([spec.to_dict() for spec in header.matrices]),
        "tokenizer": header.tokenizer_json,
        "chat_template": header.chat_template,
        "policies": _json(header.policies),
        "card": _json(header.card),
        "provenance": _json(header.provenance),
        "sensitivity": None if header.sensitivity is None else _json(header.sensitivity.to_dict()),
        "relative_errors": _json(header.relative_errors) if header.relative_errors else None,
        "learned": None if header.learned is None else _json(header.learned.to_dict()),
        "activations": _json(header.activations.to_dict()) if header.activations.to_dict() else None,
        "digests": _json(dict(digests)),
        "header_sha256": "0" * 64,
    }
    return {key: text for key, text in metadata.items() if text is not None}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _check_target(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint="name a file, as in -o model.taper")
    if not path.parent.is_dir():
        raise UsageError(
            f"folder {path.parent} does not exist", hint=f"make it first: mkdir -p {path.parent}"
        )


def _check_disk(path: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(path.parent).free
    if needed_bytes > free_bytes:
        raise DoesNotFitError(
            f"{path} needs {needed_bytes:,} bytes; {path.parent} has {free_bytes:,} free",
            hint="free some room, choose another folder, or keep fewer planes",
        )


def _explained(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DoesNotFitError(
            f"no room left while writing {path}", hint="free some room or choose another folder"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(f"cannot write {path}: {error.strerror}", hint="choose another folder")
    return error


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
