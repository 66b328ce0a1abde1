"""`taper tune --learned`: train the policy that chooses a schedule for each prompt, and store it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from taper.cli.terminal import progress_bar, table
from taper.errors import UsageError

if TYPE_CHECKING:
    from taper.formats.learned import LearnedScheduler

# Options of `taper tune` that a training reads; each keeps LearnOptions' own default unless it is given.
_FIELDS = {
    "segments": "num_segments",
    "prompts": "num_prompts",
    "prompt_tokens": "prompt_tokens",
    "max_tokens": "max_tokens",
    "seed": "seed",
}
_OTHERS = frozenset({"model", "learned", "text", "widths", "dry_run", "threads", "as_json"})


def learn_from(
    model: str, text: str | None, widths: tuple[float, ...] | None, dry_run: bool, as_json: bool
) -> None:
    """Train on a text, and store the scheduler unless it is a dry run.

    Args:
        model: the file.
        text: generic text.
        widths: of the answers; without them 4 and 3, PMPD's for models below 7 B, or the nearest that the
            file holds.
        dry_run: leave the file as it is.
        as_json: print the record as one JSON object.

    Raises:
        UsageError: no text, or an option that belongs to --task; else as `taper.tune.learned.learn`.
    """
    given = given_options()
    if stray := sorted(given.keys() - _FIELDS.keys() - _OTHERS):
        raise UsageError(f"--{stray[0].replace('_', '-')} does not go with --learned", hint="leave it out")
    if text is None:
        raise UsageError("--learned needs a text to train on", hint="add --text TEXT")
    from taper.tune.learned import LearnOptions, learn

    fields = {_FIELDS[name]: value for name, value in given.items() if name in _FIELDS}
    options = LearnOptions(Path(text), _widths(model) if widths is None else widths, **fields)
    with progress_bar("tune") as update:
        scheduler = learn(model, options, lambda what, done: update(what, done, None), dry_run)
    record = {"widths": list(scheduler.widths), "prefill_bits": scheduler.prefill_bits} | scheduler.record
    click.echo(json.dumps(record) if as_json else _text(scheduler))
    if not dry_run:
        click.echo(f"{model}: stored: taper run {model} --policy learned", err=True)


def given_options() -> dict[str, Any]:
    """Options on the command line, defaults left out."""
    context = click.get_current_context()
    return {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


def _widths(model: str) -> tuple[float, ...]:
    from taper.formats.container import TaperFile

    file = TaperFile.open(model)
    high = min(max(4, file.min_bits + 1), file.max_bits)
    if high == file.min_bits:
        raise UsageError(f"{model} holds {high} bits alone; a schedule needs two widths")
    return high, high - 1


def _text(scheduler: LearnedScheduler) -> str:
    record = scheduler.record
    rows = [
        [
            " to ".join(f"{bits:g}" for bits in pair["widths"]),
            f"{pair['tolerance_nats']:.5f}",
            " ".join(map(str, pair["label_counts"])),
            f"{pair['loss']:.3f}",
            f"{pair['chance_loss']:.3f}",
        ]
        for pair in record["pairs"]
    ]
    header = ["switch", "tolerance, nats", "labels, first segment to never", "loss", "without looking"]
    size = sum(array.size for weights in scheduler.predictors for array in weights.arrays.values())
    return (
        f"{record['num_prompts']} prompts of {record['text']}, answers of {record['max_tokens']} tokens\n"
        f"{table(header, rows)}\n{size:,} weights, {2 * size:,} bytes"
    )
