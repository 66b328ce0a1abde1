"""Numbers that a file keeps as float16: those beyond it are refused, never infinite."""

from __future__ import annotations

from taper.errors import TaperError

FLOAT16_MAX = 65504.0


def check_float16(value: float, what: str) -> None:
    """Raise TaperError for a value whose magnitude is beyond float16.

    Args:
        value: the largest magnitude; a value that is no number is refused, too.
        what: names it, as in `row 3 has a scale`.
    """
    if not value <= FLOAT16_MAX:
        raise TaperError(
            f"{what} of {value:.3g}, beyond float16's {FLOAT16_MAX:.0f}",
            hint="the checkpoint is damaged or is no trained model",
        )
