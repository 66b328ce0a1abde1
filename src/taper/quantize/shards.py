"""Finished matrices on disk beside the file to be: what makes a quantisation resumable at any moment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from taper.formats.outliers import OUTLIER_PARTS, OutlierRows
from taper.formats.work_folder import WorkFolder, unreadable, write_atomically, write_text

U8 = NDArray[np.uint8]

_SENSITIVITY_FILE = "sensitivity.json"
_TOKENS_FILE = "calibration-tokens.safetensors"


class ShardFolder(WorkFolder):
    """`OUT.partial/`: one safetensors file for each finished matrix."""

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
        write_atomically(self._file(name), lambda temporary: save_file(arrays, temporary))

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
        write_atomically(self.path / _TOKENS_FILE, lambda temporary: save_file({"tokens": tokens}, temporary))

    def tokens(self) -> NDArray[np.int32]:
        """The tokens of `save_tokens`."""
        return _read(self.path / _TOKENS_FILE, "tokens")

    def save_sensitivity(self, rows: Mapping[str, Mapping[int, float]]) -> None:
        """Keep figures of the sensitivity: matrix name to width to KL."""
        text = json.dumps({name: {str(bits): kl for bits, kl in row.items()} for name, row in rows.items()})
        write_text(self.path / _SENSITIVITY_FILE, text)

    def sensitivity(self) -> dict[str, dict[int, float]]:
        """The figures of `save_sensitivity`; none where nothing was kept."""
        path = self.path / _SENSITIVITY_FILE
        if not path.is_file():
            return {}
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {name: {int(bits): float(kl) for bits, kl in row.items()} for name, row in raw.items()}

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
        raise unreadable(path, error) from error


def _read(path: Path, name: str) -> NDArray[Any]:
    try:
        with safe_open(path, framework="np") as file:
            array: NDArray[Any] = file.get_tensor(name)
            return array
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
