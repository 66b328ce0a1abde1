"""Values that were measured, on disk: a search that is interrupted goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taper.errors import UsageError
from taper.formats.work_folder import WorkFolder, unreadable, write_text
from taper.tune.costs import Costs

_COSTS_FILE = "costs.json"


class ValueStore(WorkFolder):
    """`NAME.partial/`: one JSON file for each prompt and stage."""

    def values(self, stage: str, index: int) -> dict[str, float]:
        """Schedule key to value, of one prompt in one stage."""
        path = self._file(stage, index)
        return {key: float(value) for key, value in _read(path).items()} if path.is_file() else {}

    def save(self, stage: str, index: int, values: Mapping[str, float]) -> None:
        """Keep the values of one prompt in one stage."""
        write_text(self._file(stage, index), json.dumps(values))

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
        write_text(self.path / _COSTS_FILE, json.dumps(record))

    def _file(self, stage: str, index: int) -> Path:
        return self.path / f"{stage}-{index:05d}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no record of values", hint=f"remove it and run again: rm {path}")
    return found
