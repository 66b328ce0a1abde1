"""The quality card: what each width of a file costs and loses, measured once and kept in its header."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import taper
from taper.errors import UsageError
from taper.evaluate.perplexity import (
    PerplexityReport,
    Reader,
    StoredReader,
    WidthResult,
    checked_widths,
    measure_blocks,
    open_model,
)
from taper.evaluate.protocols import Blocks, passage_blocks
from taper.formats.container import TaperFile
from taper.formats.writer import rewrite_header
from taper.models import Decoder
from taper.models.parts import FLOAT_BITS

Float32 = npt.NDArray[np.float32]

# Multiply-accumulates that a card made by `taper quantize` may take: minutes on two cores at the 1.1 B shape
# (2 blocks at 7 widths and in float: 9e12, planes at 30e9 a second, float at 8e9), half a minute at 7 M (16).
_CARD_MACS = 5e12
_MIN_BLOCKS, _MAX_BLOCKS = 2, 16
_BLOCK_TOKENS = 512
# The card holds what was measured to this many digits: less than any error, and a third of the bytes.
_DIGITS = 6
# The card's own length moves the data by multiples of 64 bytes; the second writing settles it.
_MAX_WRITINGS = 4


def card_blocks(model: str | Path, passages: Sequence[str]) -> Blocks:
    """The blocks that a card is measured on: one 512-token window of each passage.

    Args:
        model: the `.taper` file.
        passages: texts that calibration did not read, each of a block's length or more.

    Raises:
        UsageError: no passage holds a block, or the model has no tokenizer.
    """
    decoder, tokenizer = open_model(model)
    return passage_blocks(passages, tokenizer, decoder.context_length)


def measure_card(
    model: str | Path,
    blocks: Blocks,
    reference_logits: Float32,
    *,
    against: str | Path,
    text_name: str,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """The card of every whole width of a file.

    Nothing of the moment is in it: the same file, checkpoint and blocks give the same card. Its date is that
    of SOURCE_DATE_EPOCH where that is set, else null.

    Args:
        model: a whole `.taper` file.
        blocks: of `card_blocks`.
        reference_logits: the float model's, float32 (blocks, scored, vocab).
        against: the float checkpoint's folder; its name is kept.
        text_name: what to call the text.
        progress: called as progress(blocks done, blocks in all, seconds left).

    Raises:
        UsageError: SOURCE_DATE_EPOCH is no number.
    """
    date = source_date()
    decoder, _ = open_model(model)
    reference = StoredReader(decoder, FLOAT_BITS, stored=reference_logits)
    readers = [Reader(decoder, width) for width in checked_widths(decoder, None)]
    report = measure_blocks([reference, *readers], blocks, True, progress)
    return card_of(report, decoder, against=against, text_name=text_name, date=date)


def num_card_blocks(num_weights: int, num_widths: int) -> int:
    """Blocks that `taper quantize` measures: as the work allows, 2 to 16 (510 to 4,080 scored tokens)."""
    allowed = int(_CARD_MACS / (num_weights * _BLOCK_TOKENS * (num_widths + 1)))
    return max(_MIN_BLOCKS, min(_MAX_BLOCKS, allowed))


def card_of(
    report: PerplexityReport, decoder: Decoder, *, against: str | Path, text_name: str, date: str | None
) -> dict[str, Any]:
    """The card from a report with a reference.

    Args:
        report: its first result is the reference's.
        decoder: the file's, for sizes.
        against: the reference's folder; its name is kept.
        text_name: name of the text.
        date: ISO 8601, or None.
    """
    reference, *widths = report.results
    return {
        "reference": Path(against).resolve().name,
        "reference_perplexity": _rounded(reference.perplexity),
        "text": text_name,
        "protocol": report.label,
        "num_scored": report.num_scored,
        "date": date,
        "version": taper.__version__,
        "widths": [_entry(result, decoder) for result in widths],
    }


def write_card(path: str | Path, card: dict[str, Any]) -> None:
    """Put a card into a file's header, sizes counted with the card itself.

    Raises:
        CorruptFileError: the file is cut off.
        DoesNotFitError, UsageError: as `rewrite_header`.
    """
    for _ in range(_MAX_WRITINGS):
        file = TaperFile.open(path)
        decoder = Decoder.from_taper(file)
        widths = [{**width, "total_bytes": decoder.reading_bytes(width["bits"])} for width in card["widths"]]
        card = {**card, "widths": widths}
        if file.card == card:
            return
        rewrite_header(path, dataclasses.replace(file.header, card=card))
    raise AssertionError("a card's length changes by a digit at most, so its sizes settle")


def source_date() -> str | None:
    """The date of SOURCE_DATE_EPOCH (reproducible-builds.org), ISO 8601, UTC; None where it is not set.

    Raises:
        UsageError: it is set to something else than seconds.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if text is None:
        return None
    if not text.isdecimal():
        raise UsageError(f"SOURCE_DATE_EPOCH is {text!r}; it must be a whole number of seconds")
    return datetime.datetime.fromtimestamp(int(text), datetime.UTC).date().isoformat()


def _entry(result: WidthResult, decoder: Decoder) -> dict[str, Any]:
    bits = result.bits
    figures = {
        "perplexity": result.perplexity,
        "perplexity_se": result.standard_error,
        "increase_frac": result.increase_frac,
        "increase_se": result.increase_standard_error,
        "kl_mean": result.mean_kl,
        "kl_mean_se": result.mean_kl_standard_error,
        "kl_median": result.median_kl,
        "kl_median_se": result.median_kl_standard_error,
        "kl_p999": result.p999_kl,
        "kl_p999_se": result.p999_kl_standard_error,
        "top1_agreement": result.top1_agreement,
        "top1_se": result.top1_standard_error,
    }
    return {
        "bits": bits,
        "bits_per_weight": _rounded(decoder.bits_per_weight(bits)),
        "total_bytes": decoder.reading_bytes(bits),
        "bytes_per_token": decoder.bytes_per_pass(bits),
        **{name: _rounded(value) for name, value in figures.items()},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
