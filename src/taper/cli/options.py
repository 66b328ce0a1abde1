"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from taper.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


class WidthList(click.ParamType[tuple[int, ...]]):
    """Comma-separated widths, as in 4,3,2."""

    name = "B,B,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """A tuple of ints without repetition."""
        if isinstance(value, tuple):
            return value
        words = str(value).split(",")
        if not all(word.strip().isdecimal() for word in words):
            self.fail(f"{value!r} is not a list of widths, as in 4,3,2", param, ctx)
        return tuple(dict.fromkeys(int(word) for word in words))


def threads_option(function: F) -> F:
    """--threads, for commands that compute."""
    option = click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        metavar="N",
        help="Threads; default: as many as there are cores.",
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


def check_widths(bits: tuple[int, ...], min_bits: int, max_bits: int) -> None:
    """Raise UsageError for a width outside the model."""
    for width in bits:
        if not min_bits <= width <= max_bits:
            raise UsageError(
                f"{width} bits are outside the model's {min_bits}..{max_bits}",
                hint=f"choose within {min_bits}..{max_bits}",
            )
