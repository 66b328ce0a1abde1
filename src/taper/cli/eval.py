"""`taper eval`: perplexity of several widths of one file, each protocol labelled with its numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from taper.cli.options import WidthList, json_option, model_path, set_threads, threads_option
from taper.cli.terminal import progress_bar, table

if TYPE_CHECKING:
    from taper.evaluate import PerplexityReport, WidthResult

# Names on the command line to those of taper.evaluate.
PROTOCOLS = {"windows": ("llama.cpp",), "blocks": ("blocks",), "both": ("llama.cpp", "blocks")}
FLOAT_BITS = 32


@click.command("eval")
@click.argument("model", required=False)
@click.option("--text", required=True, metavar="TEXT", help="Held-out text, .txt or .txt.xz.")
@click.option("--bits", type=WidthList(), help="Widths to measure; default: all in the file.")
@click.option(
    "--protocol",
    type=click.Choice(list(PROTOCOLS)),
    default="windows",
    show_default=True,
    help="windows: llama.cpp's 512 tokens, second half scored; blocks: 2048 tokens, all scored.",
)
@click.option(
    "--against", metavar="HF_DIR", help="Float checkpoint to compare with: increase, KL, agreement."
)
@click.option(
    "--max-blocks", type=click.IntRange(1), metavar="N", help="Only the first N blocks of the text."
)
@threads_option
@json_option
def command(
    model: str | None,
    text: str,
    bits: tuple[int, ...] | None,
    protocol: str,
    against: str | None,
    max_blocks: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure the perplexity of MODEL (a .taper file or a Hugging Face folder; default: the one in the
    package)."""
    from taper.evaluate import measure_perplexity

    set_threads(threads)
    path = model_path(model)
    reports = []
    for name in PROTOCOLS[protocol]:
        with progress_bar(name) as update:
            reports.append(
                measure_perplexity(
                    path,
                    text,
                    bits=bits,
                    protocol=name,
                    against=against,
                    max_blocks=max_blocks,
                    progress=_in_blocks(update),
                )
            )
    if as_json:
        results = [dataclasses.asdict(report) for report in reports]
        click.echo(json.dumps({"model": str(path), "text": text, "reports": results}))
    else:
        click.echo("\n\n".join(_text(report) for report in reports))


def _in_blocks(update: Callable[[str, float, float | None], None]) -> Callable[[int, int, float], None]:
    """Translate taper.evaluate's progress to the bar's."""
    return lambda done, total, left_s: update(f"block {done} of {total}", done / total, left_s)


def _text(report: PerplexityReport) -> str:
    header = ["bits", "perplexity", "+-", "bits/byte"]
    has_reference = any(result.increase_frac is not None for result in report.results)
    if has_reference:
        header += ["increase", "+-", "top-1", "KL (nats)"]
    rows = [_row(result, has_reference) for result in report.results]
    scored = f"{report.num_blocks} blocks, {report.num_scored:,} tokens scored"
    return f"{report.label}: {scored}\n{table(header, rows)}"


def _row(result: WidthResult, has_reference: bool) -> list[str]:
    name = "float" if result.bits == FLOAT_BITS else str(result.bits)
    cells = [
        name,
        f"{result.perplexity:.4f}",
        _optional(result.standard_error, "{:.4f}"),
        f"{result.bits_per_byte:.4f}",
    ]
    if has_reference:
        cells += [
            _optional(result.increase_frac, "{:+.2%}"),
            _optional(result.increase_standard_error, "{:.2%}"),
            _optional(result.top1_agreement, "{:.2%}"),
            _optional(result.mean_kl, "{:.5f}"),
        ]
    return cells


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
