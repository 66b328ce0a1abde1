"""Values that were measured, on disk: a search that is interrupted goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taper.errors import UsageError
from taper.tune.costs import Costs

_FINGERPRINT_FILE = "fingerprint.json"
_COSTS_FILE = "costs.json"


class ValueStore:
    """`NAME.partial/`: one JSON file for each prompt and stage, written atomically.

    Args:
        path: the folder; made if it is not there.
        fingerprint: everything that the values depend on; those of another fingerprint are never mixed in.

    Raises:
        UsageError: the folder holds the work of another fingerprint, or cannot be made.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = path
        text = json.dumps(fingerprint, sort_keys=True, indent=1)
        recorded = path / _FINGERPRINT_FILE
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not recorded.is_file():
                _write(recorded, text)
                return
            found = recorded.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"cannot keep unfinished work in {path}: {error.strerror}",
                hint="choose another --work folder",
            ) from error
        if found != text:
            raise UsageError(
                f"{path} holds unfinished work of another {_difference(found, fingerprint)}",
                hint=f"remove the folder to begin anew: rm -r {path}",
            )

    def values(self, stage: str, index: int) -> dict[str, float]:
        """Schedule key to value, of one prompt in one stage."""
        path = self._file(stage, index)
        return {key: float(value) for key, value in _read(path).items()} if path.is_file() else {}

    def save(self, stage: str, index: int, values: Mapping[str, float]) -> None:
        """Keep the values of one prompt in one stage."""
        _write(self._file(stage, index), json.dumps(values))

    def costs(self) -> Costs | None:
        """The costs of `save_costs`: a resumed search must rank as it did."""
        path = self.path / _COSTS_FILE
        if not path.is_file():
            return None
        raw = _read(path)
        prefill, decode = (
            {float(bits): float(cost) for bits, cost in raw[part].items()} for part in ("prefill", "decode")
        )
        return Costs(raw["objective"], prefill, decode)

    def save_costs(self, costs: Costs) -> None:
        """Keep the costs."""
        record = {"objective": costs.objective, "prefill": costs.prefill, "decode": costs.decode}
        _write(self.path / _COSTS_FILE, json.dumps(record))

    def remove(self) -> None:
        """Delete the folder and all that is in it."""
        shutil.rmtree(self.path)

    def _file(self, stage: str, index: int) -> Path:
        return self.path / f"{stage}-{index:05d}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}", hint=f"remove it and run again: rm {path}"
        ) from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no record of values", hint=f"remove it and run again: rm {path}")
    return found


def _write(path: Path, text: str) -> None:
    """Under a temporary name, then renamed: the name appears with all its bytes or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _difference(found: str, fingerprint: Mapping[str, Any]) -> str:
    """Names what differs, for the user."""
    try:
        old = json.loads(found)
    except ValueError:
        return "run"
    known = old if isinstance(old, dict) else {}
    return ", ".join(name for name in sorted(fingerprint) if known.get(name) != fingerprint[name]) or "run"
