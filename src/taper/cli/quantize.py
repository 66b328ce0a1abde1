"""`taper quantize`: a Hugging Face checkpoint becomes one nested file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from taper.cli.options import set_threads, threads_option
from taper.cli.terminal import file_size, progress_bar

if TYPE_CHECKING:
    from taper.quantize.pipeline import Progress


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
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the rotation's signs.")
@threads_option
def command(
    hf_dir: str,
    out: str,
    bits: str,
    calibration: str | None,
    calibration_tokens: int | None,
    seed: int,
    threads: int | None,
) -> None:
    """Quantise the checkpoint in HF_DIR (config.json, safetensors, tokenizer.json) to nested bit planes.

    Stopped work is kept in FILE.partial; the same command goes on from there and gives the same bytes.
    """
    from pathlib import Path

    from taper.formats.spec import parse_widths
    from taper.quantize.pipeline import QuantizeOptions, quantize

    set_threads(threads)
    options = QuantizeOptions(bits=parse_widths(bits), seed=seed)
    if calibration_tokens is not None:
        options = QuantizeOptions(bits=options.bits, seed=seed, calibration_tokens=calibration_tokens)
    with progress_bar("quantize") as update:

        def report(progress: Progress) -> None:
            update(f"{progress.stage} {progress.name}", progress.done_frac, progress.eta_s)

        result = quantize(hf_dir, out, calibration=calibration, options=options, progress=report)
    size = file_size(Path(out).stat().st_size)
    tokens = f"{result.calibration_tokens:,} calibration tokens"
    click.echo(f"{out}: {size}, {bits} bits, {tokens}, {result.seconds:.0f} s")
