"""The step of `taper quantize` that measures the quality card, and the card as a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from taper.cli.terminal import note, progress_bar, table

SKIPPED = "no quality card: {}; taper eval FILE --text TEXT --against HF_DIR --write-card measures one"


def card_step(
    hf_dir: str, calibration: str | None, calibration_tokens: int, card_text: str | None
) -> Callable[[Path], None]:
    """What `taper quantize` does with the written file: measure every width, put the card into the header.

    Args:
        hf_dir: the float checkpoint.
        calibration: the calibration text; what it does not read of it is measured on.
        calibration_tokens: as given to `quantize`.
        card_text: another text to measure on instead.
    """

    def step(out: Path) -> None:
        from taper.evaluate.card import card_blocks, measure_card, num_card_blocks, write_card
        from taper.formats.container import TaperFile
        from taper.formats.huggingface import HfCheckpoint
        from taper.formats.text import read_text
        from taper.quantize.heldout import ReferenceRun, held_out_passages, spaced_passages

        text = card_text or calibration
        if text is None:
            note(SKIPPED.format("without --calibration or --card-text there is no text to measure on"))
            return
        file = TaperFile.open(out)
        checkpoint = HfCheckpoint.open(hf_dir)
        num_blocks = num_card_blocks(file.num_weights, file.max_bits - file.min_bits + 1)
        if card_text is None:
            passages = held_out_passages(checkpoint, read_text(text), calibration_tokens, num_blocks)
        else:
            passages = spaced_passages(checkpoint, read_text(text), num_blocks)
        if not passages:
            note(SKIPPED.format("calibration reads the whole text"))
            return
        blocks = card_blocks(out, passages)
        with progress_bar("card") as update:
            update("float model", 0.0, None)
            card = measure_card(
                out,
                blocks,
                ReferenceRun(checkpoint, blocks.tokens).logits(blocks.first_scored),
                against=hf_dir,
                text_name=Path(text).name if card_text else f"{Path(text).name}, not calibrated on",
                progress=lambda done, total, left_s: update(f"block {done} of {total}", done / total, left_s),
            )
        write_card(out, card)

    return step


def card_text(card: dict[str, Any]) -> str:
    """A card as a title line and a table."""
    header = ("bits", "bytes", "read/token", "perplexity", "increase", "top-1", "KL mean", "median", "99.9 %")
    rows = [_row(width) for width in card["widths"]]
    scored = f"{card['num_scored']:,} tokens" if "num_scored" in card else "tokens"
    title = f"{card['protocol']}; {scored} of {card['text']}; against {card['reference']}"
    if card.get("date"):
        title += f"; {card['date']}"
    return f"{title}\n{table(header, rows)}"


def _row(width: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{width['bits']:g}",
        f"{width['total_bytes']:,}",
        f"{width['bytes_per_token']:,}",
        with_error(width["perplexity"], width.get("perplexity_se"), ".2f"),
        with_error(width["increase_frac"], width.get("increase_se"), "+.2%"),
        with_error(width["top1_agreement"], width.get("top1_se"), ".2%"),
        with_error(width["kl_mean"], width.get("kl_mean_se"), ".5f"),
        with_error(width["kl_median"], width.get("kl_median_se"), ".5f"),
        with_error(width["kl_p999"], width.get("kl_p999_se"), ".3f"),
    )


def with_error(value: float | None, error: float | None, form: str) -> str:
    """A figure with its standard error; nothing where there is none."""
    if value is None:
        return ""
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form.lstrip('+')}}"
