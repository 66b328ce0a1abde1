"""Unfinished work on disk: a folder that belongs to one run, files that are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from taper.errors import UsageError

_FINGERPRINT_FILE = "fingerprint.json"


class WorkFolder:
    """A folder that an interrupted run goes on from.

    Attributes:
        path: the folder.

    Args:
        path: made if it is not there.
        fingerprint: everything that the work depends on; that of another fingerprint is never mixed in.

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
                write_text(recorded, text)
                return
            found = recorded.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"cannot keep unfinished work in {path}: {error.strerror}", hint="choose another folder"
            ) from error
        if found != text:
            raise UsageError(
                f"{path} holds unfinished work of another {_difference(found, fingerprint)}",
                hint=f"remove the folder to begin anew: rm -r {path}",
            )

    def remove(self) -> None:
        """Delete the folder and all that is in it."""
        shutil.rmtree(self.path)


def unreadable(path: Path, error: Exception) -> UsageError:
    """The error for a file of unfinished work that cannot be used."""
    return UsageError(f"{path} cannot be read: {error}", hint=f"remove it and run again: rm {path}")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, sync, rename: the name appears with all its bytes or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """`write_atomically` of UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _difference(found: str, fingerprint: Mapping[str, Any]) -> str:
    """Names what differs, for the user."""
    try:
        old = json.loads(found)
    except ValueError:
        return "run"
    known = old if isinstance(old, dict) else {}
    return ", ".join(name for name in sorted(fingerprint) if known.get(name) != fingerprint[name]) or "run"
