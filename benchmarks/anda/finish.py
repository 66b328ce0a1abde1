"""How the scripts that measure end: one line of JSON, and the same in a file where one is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def finish(found: dict[str, Any], path: Path | None) -> None:
    """Write and print."""
    line = json.dumps(found)
    if path is not None:
        path.write_text(line + "\n", encoding="utf-8")
    print(line)
