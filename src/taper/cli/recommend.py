"""`taper recommend`: which bits fit this memory or this loss, and what they cost."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from taper.cli.card import with_error
from taper.cli.options import FILE_SIZE, SHARE, json_option, model_path
from taper.cli.terminal import file_size, memory_size, note, table

if TYPE_CHECKING:
    from taper.evaluate.recommend import Choice, Limits
    from taper.formats.container import TaperFile

# A chat of some length; the model's own where that is shorter.
DEFAULT_CONTEXT = 2048


@click.command("recommend")
@click.argument("model", required=False)
@click.option(
    "--memory", type=FILE_SIZE, metavar="SIZE", help="Memory that may be used, as in 2GiB or 600MB."
)
@click.option("--max-loss", type=SHARE, help="Perplexity over the float model's, as in 2%.")
@click.option("--max-kl", type=click.FloatRange(0), metavar="NATS", help="Mean KL from the float model.")
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="N",
    help=f"Tokens of prompt and answer together; default: {DEFAULT_CONTEXT:,}, or the model's.",
)
@json_option
def command(
    model: str | None,
    memory: int | None,
    max_loss: float | None,
    max_kl: float | None,
    context: int | None,
    as_json: bool,
) -> None:
    """Say which bits of MODEL (a .taper file; default: the one in the package) to use.

    With --max-loss or --max-kl: the fewest bytes within it. With --memory alone: the most bits that fit.
    Memory is the peak of a process: weights read, KV cache, and a surplus that is measured now. Loss is the
    quality card's.
    """
    from taper.evaluate.recommend import Limits, recommend
    from taper.formats.container import TaperFile

    file = TaperFile.open(model_path(model))
    note(file.notice())
    limits = Limits(memory, max_loss, max_kl)
    context, choices = _choices(file, context)
    if not as_json:
        click.echo(_text(file, choices, limits, context))
    chosen = recommend(choices, limits)
    if as_json:
        record = {
            "file": str(file.path),
            "context_tokens": context,
            "limits": dataclasses.asdict(limits),
            "choices": [dataclasses.asdict(choice) for choice in choices],
            "recommended_bits": None if chosen is None else chosen.bits,
        }
        click.echo(json.dumps(record))
    elif chosen is None:
        click.echo("\nfor one answer, say --memory SIZE, --max-loss 2% or --max-kl NATS")
    else:
        click.echo(f"\n{chosen.bits:g} bits: taper run {file.path} --bits {chosen.bits:g}")


def _choices(file: TaperFile, context: int | None) -> tuple[int, list[Choice]]:
    """The context, and every reading of the card and every whole width with its memory."""
    from taper.evaluate.footprint import footprint, measure_surplus
    from taper.evaluate.recommend import Choice
    from taper.models import Decoder

    decoder = Decoder.from_taper(file)
    tokens = min(DEFAULT_CONTEXT, decoder.context_length) if context is None else context
    decoder.new_cache(tokens)  # refuses a context beyond the model's before anything is measured
    surplus = measure_surplus(file.path, decoder)
    card = {width["bits"]: width for width in file.card.get("widths", [])}
    readable = {bits for bits in card if decoder.min_bits <= bits <= decoder.max_bits}
    bits = sorted({*range(decoder.min_bits, decoder.max_bits + 1), *readable})
    choices = [
        Choice(b, decoder.reading_bytes(b), footprint(decoder, b, tokens, surplus).peak_bytes, card.get(b))
        for b in bits
    ]
    return tokens, choices


def _text(file: TaperFile, choices: list[Choice], limits: Limits, context: int) -> str:
    rows = [
        (
            f"{choice.bits:g}",
            file_size(choice.total_bytes),
            memory_size(choice.peak_bytes),
            *_quality(choice),
            "yes" if limits.accepts_memory(choice) and limits.accepts_loss(choice) else "no",
        )
        for choice in choices
    ]
    title = f"{file.path.name}, {context:,} tokens of context"
    measured = (
        f"; loss against {file.card['reference']} on {file.card['text']}" if file.card.get("widths") else ""
    )
    header = ("bits", "file", "memory", "increase", "KL mean, nats", "top-1", "fits")
    return f"{title}{measured or '; no quality card'}\n{table(header, rows)}"


def _quality(choice: Choice) -> tuple[str, str, str]:
    card = choice.card
    if card is None:
        return "?", "?", "?"
    return (
        with_error(card["increase_frac"], card.get("increase_se"), "+.2%"),
        with_error(card["kl_mean"], card.get("kl_mean_se"), ".5f"),
        with_error(card["top1_agreement"], card.get("top1_se"), ".2%"),
    )
