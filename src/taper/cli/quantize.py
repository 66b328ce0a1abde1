"""`taper quantize`: a Hugging Face checkpoint becomes one nested file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from taper.cli.options import FILE_SIZE, SHARE, set_threads, threads_option
from taper.cli.terminal import file_size, progress_bar
from taper.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from taper.cli.card import Update
    from taper.quantize import QuantizeOptions, QuantizeReport
    from taper.quantize.progress import Progress
    from taper.quantize.shrink import Budget


# Left in the header for the card, where the file's size is given: seven widths take 5 KB.
CARD_BYTES = 8192
# Those of taper.quantize.methods, which --help is not to import.
CODEBOOKS = ("shared", "uniform", "row", "row-greedy")
METHODS = ("nested", "nearest", "gptq")


@click.command("quantize")
@click.argument("hf_dir")
@click.option("-o", "--out", required=True, metavar="FILE", help="The .taper file to write.")
@click.option(
    "--bits", default="2-8", show_default=True, metavar="MIN-MAX", help="Widths that the file holds."
)
@click.option(
    "--calibration",
    metavar="TEXT",
    help="Text (.txt, .txt.xz) like what the model will read; default: the model writes its own, slowly.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="How much of it to read; default: 16384.",
)
@click.option(
    "--card/--no-card",
    "has_card",
    default=True,
    help="Measure every width against HF_DIR on text that calibration does not read, and store it.",
)
@click.option("--card-text", metavar="TEXT", help="Measure the card on this text instead.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the rotation's signs.")
@click.option(
    "--bits-per-weight", type=float, metavar="B", help="Keep only the planes that fit B bits per weight."
)
@click.option(
    "--target-size",
    type=FILE_SIZE,
    metavar="SIZE",
    help="Keep only the planes that fit a file of SIZE, as in 600MB.",
)
@click.option("--no-sensitivity", is_flag=True, help="Do not measure where bits help; no fractions then.")
@click.option(
    "--codebook",
    type=click.Choice(CODEBOOKS),
    default="shared",
    show_default=True,
    help="Values: shared by all rows (rotated), a uniform grid, or tables of each row.",
)
@click.option(
    "--method", type=click.Choice(METHODS), help="How codes are chosen; default: the codebook's own."
)
@click.option(
    "--outliers", type=SHARE, default=0.0, metavar="SHARE", help="Weights kept in float16, as in 0.45%."
)
@click.option("--fisher", metavar="FILE", help="Weigh row tables by this file of taper.quantize.fisher.")
@threads_option
def command(
    hf_dir: str,
    out: str,
    bits: str,
    calibration: str | None,
    calibration_tokens: int | None,
    has_card: bool,
    card_text: str | None,
    seed: int,
    bits_per_weight: float | None,
    target_size: int | None,
    no_sensitivity: bool,
    codebook: str,
    method: str | None,
    outliers: float,
    fisher: str | None,
    threads: int | None,
) -> None:
    """Quantise the checkpoint in HF_DIR (config.json, safetensors, tokenizer.json) to nested bit planes.

    Stopped work is kept in FILE.partial; the same command goes on from there and gives the same bytes.
    """
    from dataclasses import replace

    from taper.cli.card import card_step
    from taper.formats.spec import parse_widths
    from taper.quantize import QuantizeOptions
    from taper.quantize.fisher_file import FisherFile
    from taper.quantize.methods import MethodOptions

    set_threads(threads)
    budget = _budget(bits_per_weight, target_size, has_card)
    if budget is not None and no_sensitivity:
        raise UsageError("a budget is spent by the sensitivity", hint="leave --no-sensitivity out")
    options = QuantizeOptions(
        bits=parse_widths(bits),
        seed=seed,
        sensitivity=not no_sensitivity,
        budget=budget,
        method=MethodOptions(codebook, method, outliers),
        fisher=None if fisher is None else FisherFile(fisher),
    )
    if calibration_tokens is not None:
        options = replace(options, calibration_tokens=calibration_tokens)
    step = card_step(hf_dir, calibration, options.calibration_tokens, card_text) if has_card else None
    result = _quantised(hf_dir, out, calibration, options, step)
    size = file_size(_checked_bytes(out, target_size))
    tokens = f"{result.calibration_tokens:,} calibration tokens"
    click.echo(f"{out}: {size}, {_widths(out)}, {tokens}, {result.seconds:.0f} s")


def _quantised(
    hf_dir: str,
    out: str,
    calibration: str | None,
    options: QuantizeOptions,
    step: Callable[[Update, Path], None] | None,
) -> QuantizeReport:
    """Quantise below a progress bar, which the card's step moves on."""
    from functools import partial

    from taper.quantize import quantize

    with progress_bar("quantize") as update:

        def report(progress: Progress) -> None:
            update(f"{progress.stage} {progress.name}", progress.done_frac, progress.eta_s)

        return quantize(
            hf_dir,
            out,
            calibration=calibration,
            options=options,
            progress=report,
            after_write=None if step is None else partial(step, update),
        )


def _budget(bits_per_weight: float | None, target_size: int | None, has_card: bool) -> Budget | None:
    from taper.quantize import Budget

    if bits_per_weight is None and target_size is None:
        return None
    return Budget(bits_per_weight, target_size, CARD_BYTES if has_card and target_size is not None else 0)


def _widths(out: str) -> str:
    """The widths that the file holds; a budget may have left fewer than asked for."""
    from taper.formats.container import TaperFile
    from taper.precision import describe_widths

    file = TaperFile.open(out)
    return describe_widths(file.min_bits, file.max_bits)


def _checked_bytes(out: str, target_size: int | None) -> int:
    """Size of the written file, which its card may have made too large."""
    num_bytes = Path(out).stat().st_size
    if target_size is not None and num_bytes > target_size:
        raise DoesNotFitError(
            f"{out} takes {num_bytes:,} bytes with its quality card, more than {target_size:,}",
            hint="leave the card out: --no-card",
        )
    return num_bytes
