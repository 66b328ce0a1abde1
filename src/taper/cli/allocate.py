"""`taper allocate`: measure what each matrix costs at each width, and spend a budget of bits by it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from taper.cli.options import FILE_SIZE, json_option, set_threads, threads_option
from taper.cli.terminal import file_size, progress_bar, table
from taper.errors import CorruptFileError, UsageError

if TYPE_CHECKING:
    from taper.formats.container import TaperFile
    from taper.quantize.shrink import Allocation


@click.command("allocate")
@click.argument("model", metavar="FILE")
@click.option(
    "--text",
    metavar="TEXT",
    help="Measure the sensitivity on this text (.txt, .txt.xz) and store it in FILE.",
)
@click.option("--against", metavar="HF_DIR", help="Measure against this float checkpoint, not FILE itself.")
@click.option(
    "--tokens", type=click.IntRange(1), metavar="N", help="Tokens of TEXT to read; default: by model size."
)
@click.option("--bits-per-weight", type=float, metavar="B", help="Show the widths for B bits per weight.")
@click.option(
    "--target-size", type=FILE_SIZE, metavar="SIZE", help="Show the widths for a file of SIZE, as in 600MB."
)
@click.option("-o", "--out", metavar="OUT", help="Write the file that holds just these planes.")
@threads_option
@json_option
def command(
    model: str,
    text: str | None,
    against: str | None,
    tokens: int | None,
    bits_per_weight: float | None,
    target_size: int | None,
    out: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Spend bits where they help most.

    With --text, measures the KL divergence that each matrix of FILE causes alone at each width and stores it
    in the file: fractions of bits can then be read. With --bits-per-weight or --target-size, shows the planes
    of each matrix with the least predicted loss; -o writes a file of only these.
    """
    set_threads(threads)
    has_budget = bits_per_weight is not None or target_size is not None
    _check(text, against, tokens, has_budget, out, model)
    if text is not None:
        _measure(model, text, against, tokens)
    if not has_budget:
        return
    from taper.formats.container import TaperFile
    from taper.quantize.shrink import Budget, Shrinker

    file = TaperFile.open(model)
    shrinker = Shrinker(file, Budget(bits_per_weight, target_size))
    allocation = shrinker.fit()
    if out is not None:
        shrinker.write(out, allocation.widths)
    click.echo(json.dumps(dataclasses.asdict(allocation)) if as_json else _text(file, allocation))
    if out is not None and not as_json:
        click.echo(f"{out}: {file_size(Path(out).stat().st_size)}")


def _check(
    text: str | None, against: str | None, tokens: int | None, has_budget: bool, out: str | None, model: str
) -> None:
    if text is None and not has_budget:
        raise UsageError(
            "nothing to do: neither --text nor a budget",
            hint="--text TEXT measures; --bits-per-weight B or --target-size SIZE allocates",
        )
    if text is None and (against is not None or tokens is not None):
        raise UsageError("--against and --tokens belong to --text", hint="add --text TEXT")
    if out is not None and not has_budget:
        raise UsageError("-o needs a budget", hint="add --bits-per-weight B or --target-size SIZE")
    if out is not None and Path(out).exists() and Path(model).exists() and Path(out).samefile(model):
        raise UsageError(f"{out} is the file to read", hint="name another output file")


def _measure(model: str, text: str, against: str | None, tokens: int | None) -> None:
    """Measure and store. The file's tensors stay what they are."""
    from taper.formats.container import TaperFile
    from taper.formats.huggingface import HfCheckpoint
    from taper.formats.text import read_text
    from taper.formats.writer import rewrite_header
    from taper.models import Decoder
    from taper.quantize.sensitivity import default_plan, measure_sensitivity, passages

    file = TaperFile.open(model)
    if file.is_truncated:
        raise CorruptFileError(
            f"{model} is cut off: only a whole file can be measured", hint="copy or download the file again"
        )
    plan = default_plan(file)
    ids = passages(file, read_text(text), tokens or plan.num_tokens)
    reference = None
    if against is not None:
        reference = (Decoder.from_hf(HfCheckpoint.open(against)), Path(against).resolve().name)
    with progress_bar("sensitivity") as update:
        found = measure_sensitivity(
            file, ids, plan.bits, Path(text).name, reference=reference, progress=update
        )
    rewrite_header(model, dataclasses.replace(file.header, sensitivity=found))
    widths = ", ".join(map(str, plan.bits))
    click.echo(f"{model}: sensitivity at {widths} bits over {ids.size:,} tokens", err=True)


def _text(file: TaperFile, allocation: Allocation) -> str:
    from taper.precision.allocation import predicted_loss

    assert file.sensitivity is not None
    losses = file.sensitivity.losses(file.min_bits)
    rows = [
        (
            spec.name,
            str(bits),
            f"{bits * spec.plane_bytes:,}",
            f"{predicted_loss(losses, {spec.name: bits}):.5f}",
        )
        for spec, bits in zip(file.matrices, allocation.widths.values(), strict=True)
    ]
    total = (
        f"{allocation.bits_per_weight:.3f} bits per weight, {allocation.file_bytes:,} bytes, "
        f"predicted KL {allocation.predicted_kl:.5f} nats"
    )
    return f"{table(('matrix', 'bits', 'bytes', 'KL, nats'), rows)}\n{total}"
