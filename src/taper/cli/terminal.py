"""Text for people: units, colours of widths, notices on stderr. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO

import click

# 256-colour codes from few bits (cold) to many (warm); distinct on dark and light backgrounds.
_BITS_COLOURS = {1: 27, 2: 33, 3: 37, 4: 34, 5: 142, 6: 172, 7: 166, 8: 160}
_OTHER_COLOUR = 133
_MIB = 1 << 20


def is_coloured(stream: TextIO) -> bool:
    """Whether escape sequences belong there: a terminal, no NO_COLOR (no-color.org), not a dumb one."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def in_bits_colour(text: str, bits: float) -> str:
    """`text` in the colour of a width, a fraction in that of the nearest."""
    return in_colour(text, _BITS_COLOURS.get(round(bits), _OTHER_COLOUR))


def in_colour(text: str, colour: int) -> str:
    """`text` in one of 256 colours; line breaks stay outside the colour."""
    start = f"\x1b[38;5;{colour}m"
    return "\n".join(f"{start}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def dim(text: str) -> str:
    """`text` in a faint face."""
    return f"\x1b[2m{text}\x1b[0m"


def printable(text: str) -> str:
    """Text that a terminal shows instead of obeying: control characters but tab and line feed as U+FFFD."""
    return "".join(c if c in "\t\n" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def note(message: str | None) -> None:
    """A notice on stderr; None says nothing."""
    if message:
        click.echo(f"note: {message}", err=True)


def file_size(num_bytes: float) -> str:
    """Decimal units, as file sizes and bandwidths are given."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"


def memory_size(num_bytes: int | None) -> str:
    """MiB, as memory is given."""
    return "unknown" if num_bytes is None else f"{num_bytes / _MIB:,.0f} MiB"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Columns, the first to the left, numbers to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


@contextlib.contextmanager
def waiting_line(label: str) -> Iterator[Callable[[int, int], None]]:
    """A line on stderr that update(bytes there, bytes needed) writes over, gone at the end; silent off a
    terminal. Not the bar below: most loads wait for nothing, and rich takes longer to import than they."""
    is_shown = False

    def update(there: int, needed: int) -> None:
        nonlocal is_shown
        if sys.stderr.isatty():
            is_shown = True
            click.echo(f"\r{label}: {file_size(there)} of {file_size(needed)}  ", nl=False, err=True)

    try:
        yield update
    finally:
        if is_shown:
            click.echo("\r\x1b[K", nl=False, err=True)


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[str, float, float | None], None]]:
    """A bar on stderr, moved by update(what, done fraction, seconds left); silent off a terminal."""
    if not sys.stderr.isatty():
        yield lambda what, done_frac, left_s: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=1.0, left="")

        def update(what: str, done_frac: float, left_s: float | None) -> None:
            bar.update(task, description=f"{label}: {what}", completed=done_frac, left=_duration(left_s))

        yield update


def _duration(left_s: float | None) -> str:
    if left_s is None:
        return ""
    return f"{left_s / 60:.0f} min left" if left_s >= 90 else f"{left_s:.0f} s left"
