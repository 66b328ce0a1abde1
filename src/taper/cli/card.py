"""The step of `taper quantize` that measures the quality card, and the card as a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taper.cli.terminal import note, table

if TYPE_CHECKING:
    from taper.formats.huggingface import HfCheckpoint

Update = Callable[[str, float, float | None], None]

_QUANTILES = ("median", "99.9 %")
SKIPPED = "no quality card: {}; taper eval FILE --text TEXT --against HF_DIR --write-card measures one"


def card_step(
    hf_dir: str, calibration: str | None, calibration_tokens: int, card_text: str | None
) -> Callable[[Update, Path], None]:
    """What `taper quantize` does with the written file: measure every width, put the card into the header.

    The result is called as step(update, file), `update` being that of a progress bar.

    Args:
        hf_dir: the float checkpoint.
        calibration: the calibration text; what it does not read of it is measured on.
        calibration_tokens: as given to `quantize`.
        card_text: another text to measure on instead.

    Raises:
        UsageError: before the quantisation, for a text or a SOURCE_DATE_EPOCH that cannot be used.
    """
    from taper.evaluate.card import num_card_blocks, source_date
    from taper.formats.container import TaperFile
    from taper.formats.huggingface import HfCheckpoint
    from taper.formats.text import read_text
    from taper.quantize.heldout import held_out_passages, spaced_passages

    source_date()
    text = card_text or calibration
    if text is None:
        note(SKIPPED.format("without --calibration or --card-text there is no text to measure on"))
        return lambda update, out: None
    content = read_text(text)
    checkpoint = HfCheckpoint.open(hf_dir)
    name = Path(text).name if card_text else f"{Path(text).name}, not calibrated on"

    def step(update: Update, out: Path) -> None:
        file = TaperFile.open(out)
        count = num_card_blocks(file.num_weights, file.max_bits - file.min_bits + 1)
        if card_text is None:
            passages = held_out_passages(checkpoint, content, calibration_tokens, count)
        else:
            passages = spaced_passages(checkpoint, content, count)
        if passages:
            _measure(update, out, checkpoint, passages, name)
        else:
            note(SKIPPED.format("calibration reads the whole text"))

    return step


def _measure(
    update: Update, out: Path, checkpoint: HfCheckpoint, passages: list[str], text_name: str
) -> None:
    """Read the passages with the float model, then with every width; store the card."""
    from taper.evaluate.card import card_blocks, measure_card, write_card
    from taper.quantize.heldout import ReferenceRun

    blocks = card_blocks(out, passages)
    update("card, float model", 0.0, None)
    card = measure_card(
        out,
        blocks,
        ReferenceRun(checkpoint, blocks.tokens).logits(blocks.first_scored),
        against=checkpoint.folder,
        text_name=text_name,
        progress=lambda done, total, left_s: update(f"card, block {done} of {total}", done / total, left_s),
    )
    write_card(out, card)


def card_text(card: dict[str, Any]) -> str:
    """A card as a title line and a table."""
    header = ("bits", "bytes", "bytes/token", "perplexity", "increase", "top-1", "KL mean, nats", *_QUANTILES)
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
