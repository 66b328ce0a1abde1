"""Finished matrices on disk beside the file to be: what makes a quantisation resumable at any moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from taper.errors import UsageError
from taper.formats.outliers import OUTLIER_PARTS, OutlierRows

U8 = NDArray[np.uint8]

_FINGERPRINT_FILE = "fingerprint.json"
_SENSITIVITY_FILE = "sensitivity.json"
_TOKENS_FILE = "calibration-tokens.safetensors"


class ShardFolder:
    """`OUT.partial/`: one safetensors file for each finished matrix, each written atomically.

    Args:
        path: the folder; made if it is not there.
        fingerprint: everything that the codes depend on; shards of another fingerprint are never mixed in.

    Raises:
        UsageError: the folder holds the work of another fingerprint, or cannot be made.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.path = path
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot make {path}: {error.strerror}", hint="choose another output folder"
            ) from error
        recorded = path / _FINGERPRINT_FILE
        text = json.dumps(fingerprint, sort_keys=True, indent=1)
        if recorded.is_file():
            found = recorded.read_text(encoding="utf-8")
            if found != text:
                raise UsageError(
                    f"{path} holds unfinished work of {_difference(found, fingerprint)}",
                    hint=f"remove the folder to begin anew: rm -r {path}",
                )
        else:
            _write_atomically(recorded, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def holds(self, name: str) -> bool:
        """Whether the matrix is finished."""
        return self._file(name).is_file()

    def save(
        self,
        name: str,
        planes: Sequence[U8],
        scales: NDArray[np.float16],
        errors: Sequence[float],
        extras: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        """Keep a finished matrix: planes, scales (levels, out_features), relative errors (levels), and what
        else it has by name: bias, gain, offsets, tables, outliers.
        """
        arrays: dict[str, NDArray[Any]] = {f"plane{index}": plane for index, plane in enumerate(planes)}
        arrays |= {"scales": scales, "errors": np.array(errors)} | dict(extras or {})
        _write_atomically(self._file(name), lambda temporary: save_file(arrays, temporary))

    def planes(self, name: str, num_planes: int) -> Sequence[U8]:
        """The planes of a finished matrix, each read when it is asked for."""
        return _StoredPlanes(self._file(name), num_planes)

    def scales(self, name: str) -> NDArray[np.float16]:
        """The scales of a finished matrix, float16 (levels, out_features)."""
        return _read(self._file(name), "scales")

    def errors(self, name: str) -> list[float]:
        """The relative error of each width."""
        return [float(error) for error in _read(self._file(name), "errors")]

    def extra(self, name: str, part: str) -> NDArray[Any] | None:
        """What `save` was given by the name `part` for a finished matrix, or None."""
        return _read(self._file(name), part) if part in _names(self._file(name)) else None

    def outliers(self, name: str) -> OutlierRows | None:
        """The outliers of a finished matrix, or None."""
        if "outliers.starts" not in _names(self._file(name)):
            return None
        return OutlierRows(*(_read(self._file(name), f"outliers.{part}") for part in OUTLIER_PARTS))

    def has_tokens(self) -> bool:
        """Whether calibration tokens are kept here."""
        return (self.path / _TOKENS_FILE).is_file()

    def save_tokens(self, tokens: NDArray[np.int32]) -> None:
        """Keep calibration tokens that the model wrote: int32 (sequences, tokens)."""
        _write_atomically(
            self.path / _TOKENS_FILE, lambda temporary: save_file({"tokens": tokens}, temporary)
        )

    def tokens(self) -> NDArray[np.int32]:
        """The tokens of `save_tokens`."""
        return _read(self.path / _TOKENS_FILE, "tokens")

    def save_sensitivity(self, rows: Mapping[str, Mapping[int, float]]) -> None:
        """Keep figures of the sensitivity: matrix name to width to KL."""
        text = json.dumps({name: {str(bits): kl for bits, kl in row.items()} for name, row in rows.items()})
        _write_atomically(
            self.path / _SENSITIVITY_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8")
        )

    def sensitivity(self) -> dict[str, dict[int, float]]:
        """The figures of `save_sensitivity`; none where nothing was kept."""
        path = self.path / _SENSITIVITY_FILE
        if not path.is_file():
            return {}
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {name: {int(bits): float(kl) for bits, kl in row.items()} for name, row in raw.items()}

    def remove(self) -> None:
        """Delete the folder and all that is in it."""
        shutil.rmtree(self.path)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"


class _StoredPlanes(Sequence[U8]):
    def __init__(self, path: Path, num_planes: int) -> None:
        self._path = path
        self._num_planes = num_planes

    def __len__(self) -> int:
        return self._num_planes

    def __getitem__(self, plane: int) -> U8:  # type: ignore[override]  # nothing slices it
        return _read(self._path, f"plane{plane}")


def _names(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="np") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _read(path: Path, name: str) -> NDArray[Any]:
    try:
        with safe_open(path, framework="np") as file:
            array: NDArray[Any] = file.get_tensor(name)
            return array
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} cannot be read: {error}", hint=f"remove it and run again: rm {path}")


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, sync, rename: the name appears with all its bytes or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _difference(found: str, fingerprint: dict[str, Any]) -> str:
    """Names what differs, for the user."""
    try:
        old = json.loads(found)
    except ValueError:
        return "an unknown run"
    known = old if isinstance(old, dict) else {}
    names = [name for name in sorted(fingerprint) if known.get(name) != fingerprint[name]]
    return "another " + ", ".join(names) if names else "an unknown run"
