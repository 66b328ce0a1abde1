"""Plain text for calibration and measurement: .txt files, or the same compressed with xz."""

from __future__ import annotations

import lzma
from pathlib import Path

from taper.errors import CorruptFileError, UsageError


def read_text(path: str | Path) -> str:
    """The whole text of a UTF-8 file; a name that ends in .xz is decompressed.

    Raises:
        UsageError: no such file, or one that is empty.
        CorruptFileError: not UTF-8, or damaged xz data.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is not a file", hint="name a text file, .txt or .txt.xz")
    try:
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        text = raw.decode("utf-8")
    except (lzma.LZMAError, EOFError) as error:
        raise CorruptFileError(f"{path} cannot be decompressed: {error}") from error
    except UnicodeDecodeError as error:
        raise CorruptFileError(
            f"{path} is not UTF-8 at byte {error.start}", hint="convert it to UTF-8"
        ) from error
    if not text.strip():
        raise UsageError(f"{path} holds no text", hint="name a file with text in it")
    return text
