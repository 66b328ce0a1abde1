"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class CountList(click.ParamType[tuple[int, ...]]):
    """Comma-separated whole numbers, as in 0,1024."""

    name = "N,N,..."

    def __init__(self, least: int) -> None:
        self._least = least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """A tuple without repetition, in the order given."""
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")]
        numbers = [int(word) for word in words if re.fullmatch(r"[0-9]{1,9}", word, re.ASCII)]
        if len(numbers) < len(words) or min(numbers) < self._least:
            self.fail(f"{value!r} is not a list of whole numbers from {self._least} on", param, ctx)
        return tuple(dict.fromkeys(numbers))


class WidthList(click.ParamType[tuple[float, ...]]):
    """Comma-separated widths, as in 4,3.3,2."""

    name = "B,B,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """A tuple without repetition; whole numbers as ints."""
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")]
        if not all(re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", word, re.ASCII) for word in words):
            self.fail(f"{value!r} is not a list of widths, as in 4,3.3,2", param, ctx)
        numbers = (float(word) for word in words)
        return tuple(dict.fromkeys(int(bits) if bits.is_integer() else bits for bits in numbers))


class FileSize(click.ParamType[int]):
    """A number of bytes with a unit, as in 600MB or 1.5GiB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, rounded down."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kKMG]i?)?B?", str(value), re.ASCII)
        if found is None:
            self.fail(f"{value!r} is not a size, as in 600MB, 1.5GiB or 6000000", param, ctx)
        return int(float(found[1]) * _UNITS[(found[2] or "").upper()])


class MemoryBudgetSize(click.ParamType["int | str"]):
    """A size, or `auto`."""

    name = "SIZE|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Bytes, or `auto` as it is."""
        return "auto" if value == "auto" else FILE_SIZE.convert(value, param, ctx)


class Share(click.ParamType[float]):
    """A share in percent or as a number of at most 1, as in 2% or 0.02."""

    name = "SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share as a number; a bare number above 1 is most likely a forgotten %, so it is refused."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(%?)", str(value), re.ASCII)
        if found is None or (not found[2] and Decimal(found[1]) > 1):
            self.fail(f"{value!r} is not a share, as in 2% or 0.02", param, ctx)
        # Decimal: 0.45% and 0.0045 are one number, or a resumed run would differ.
        return float(Decimal(found[1]) / (100 if found[2] else 1))


FILE_SIZE = FileSize()
MEMORY_BUDGET = MemoryBudgetSize()
SHARE = Share()
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def threads_option(function: F) -> F:
    """--threads, for commands that compute."""
    option = click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        metavar="N",
        help="Threads; default: as many as there are cores.",
    )
    return option(function)


def kv_option(function: F) -> F:
    """--kv, for commands that run a model."""
    option = click.option(
        "--kv",
        metavar="KV",
        help="KV cache: float16, or planes such as 7, k7v5, 7,4@128; default: the file's.",
    )
    return option(function)


def json_option(function: F) -> F:
    """--json, for results that a program reads."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")(function)


def set_threads(threads: int | None) -> None:
    """Apply --threads."""
    if threads is not None:
        from taper.kernels import set_num_threads

        set_num_threads(threads)


def model_path(model: str | None) -> Path:
    """The file or folder of a MODEL argument; without one, the model in the package."""
    from taper.engine import embedded_model

    return embedded_model() if model is None else Path(model)
