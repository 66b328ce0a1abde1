"""What bits per layer buy: KL divergence of allocated widths against the same width in every matrix.

    python benchmarks/quality/allocation.py HF_DIR --calibration TEXT --text TEXT

Quantises once, measures the sensitivity on the calibration text, and reads whole widths and budgets of the
one file over the same blocks of another text. Every reading holds its own planes only, so the embedding
look-up takes no others either. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from taper.errors import TaperError
from taper.evaluate import PROTOCOLS, PerplexityReport, Reader, WidthResult, cut, measure_blocks
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.formats.text import read_text
from taper.models import Decoder
from taper.models.parts import FLOAT_BITS
from taper.precision.allocation import allocate, bits_per_weight, predicted_loss
from taper.quantize import QuantizeOptions, quantize
from taper.tokenizer import Tokenizer

Widths = Mapping[str, int]


def readings(file: TaperFile, budgets: Sequence[float]) -> list[tuple[str, Widths]]:
    """Name and widths of each reading: whole widths alike in all matrices, then the budgets."""
    assert file.sensitivity is not None
    losses = file.sensitivity.losses(file.min_bits)
    weights = {spec.name: spec.num_weights for spec in file.matrices}
    alike = [
        (f"{bits} in every matrix", dict.fromkeys(weights, bits))
        for bits in range(file.min_bits, file.max_bits + 1)
    ]
    total = sum(weights.values())
    return alike + [(f"{bits:g} allocated", allocate(losses, weights, bits * total)) for bits in budgets]


def measure(
    arguments: argparse.Namespace, checkpoint: HfCheckpoint, path: Path
) -> tuple[PerplexityReport, list[dict[str, object]]]:
    """All readings over the same blocks, with what the sensitivity had predicted for each."""
    file = TaperFile.open(path)
    assert file.sensitivity is not None
    losses = file.sensitivity.losses(file.min_bits)
    weights = {spec.name: spec.num_weights for spec in file.matrices}
    reference = Decoder.from_hf(checkpoint)
    tokenizer = Tokenizer(checkpoint.tokenizer_json or "")
    blocks = cut(read_text(arguments.text), tokenizer, reference.context_length, arguments.protocol)
    # Evenly spaced: the first blocks would be one document.
    chosen = np.linspace(0, len(blocks.tokens) - 1, min(arguments.blocks, len(blocks.tokens))).astype(int)
    blocks = dataclasses.replace(blocks, tokens=blocks.tokens[chosen])
    named = readings(file, arguments.budgets)
    readers = [Reader(Decoder.from_taper(file, widths), file.max_bits) for _, widths in named]
    report = measure_blocks([Reader(reference, FLOAT_BITS), *readers], blocks, True, _progress)
    rows = [
        {
            "reading": name,
            "bits_per_weight": bits_per_weight(widths, weights),
            "predicted_kl": predicted_loss(losses, widths),
            **_figures(result),
        }
        for (name, widths), result in zip(named, report.results[1:], strict=True)
    ]
    return report, rows


def _figures(result: WidthResult) -> dict[str, float | None]:
    return {
        "kl_mean": result.mean_kl,
        "kl_mean_se": result.mean_kl_standard_error,
        "increase_frac": result.increase_frac,
        "top1_agreement": result.top1_agreement,
    }


def interpolated(alike: Sequence[tuple[float, float]], bits: float) -> tuple[float, float]:
    """KL between the two whole widths around `bits`: on a straight line, and on a line of its logarithm.

    Args:
        alike: (bits, KL) of the whole widths, ascending.
        bits: within them.
    """
    for (low, left), (high, right) in itertools.pairwise(alike):
        if low <= bits <= high:
            share = (bits - low) / (high - low)
            straight = (1 - share) * left + share * right
            return straight, math.exp((1 - share) * math.log(left) + share * math.log(right))
    raise ValueError(f"{bits} bits are outside {alike[0][0]}..{alike[-1][0]}")


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Markdown; budgets are set against the whole widths around them."""
    lines = [
        "| reading | bits per weight | KL (nats) | predicted | perplexity | straight line | line of log KL |",
        "|---" * 7 + "|",
    ]
    alike = [_point(row) for row in rows if _is_alike(row)]
    for row in rows:
        bits, kl = _point(row)
        straight, logarithmic = interpolated(alike, bits)
        ratios = ["", ""] if _is_alike(row) else [f"{kl / straight:.2f} x", f"{kl / logarithmic:.2f} x"]
        cells = [
            str(row["reading"]),
            f"{bits:.3f}",
            f"{kl:.4f} +- {row['kl_mean_se'] or 0:.4f}",
            f"{row['predicted_kl']:.4f}",
            f"{row['increase_frac']:+.2%}",
            *ratios,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _is_alike(row: Mapping[str, object]) -> bool:
    return str(row["reading"]).endswith("every matrix")


def _point(row: Mapping[str, object]) -> tuple[float, float]:
    return float(str(row["bits_per_weight"])), float(str(row["kl_mean"]))


def _progress(done: int, total: int, left_s: float) -> None:
    print(f"\rblock {done} of {total}, {left_s:.0f} s left ", end="", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what bits per layer buy.")
    parser.add_argument("hf_dir", metavar="HF_DIR")
    parser.add_argument("--calibration", required=True, metavar="TEXT")
    parser.add_argument("--text", required=True, metavar="TEXT")
    parser.add_argument(
        "--file", metavar="FILE", help="made before by quantize with sensitivity; default: make one"
    )
    parser.add_argument("--bits", type=int, nargs=2, default=(2, 6), metavar=("MIN", "MAX"))
    parser.add_argument("--budgets", type=float, nargs="+", default=(2.5, 3.0, 3.5, 4.0, 4.5), metavar="B")
    parser.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0])
    parser.add_argument("--blocks", type=int, default=24, help="blocks, evenly spaced over the text")
    parser.add_argument("--calibration-tokens", type=int, default=QuantizeOptions().calibration_tokens)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> tuple[PerplexityReport, list[dict[str, object]]]:
    """Quantise where no file is given, and measure."""
    checkpoint = HfCheckpoint.open(arguments.hf_dir)
    if arguments.file is not None:
        return measure(arguments, checkpoint, Path(arguments.file))
    options = QuantizeOptions(
        tuple(arguments.bits), arguments.calibration_tokens, arguments.seed, sensitivity=True
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.taper"
        made = quantize(arguments.hf_dir, path, calibration=arguments.calibration, options=options)
        print(f"quantised and measured in {made.seconds:.0f} s", file=sys.stderr)
        return measure(arguments, checkpoint, path)


def main() -> int:
    """Command line. Returns the exit status."""
    arguments = _arguments()
    try:
        report, rows = run(arguments)
    except TaperError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(
        f"\n{report.label}, {report.num_blocks} blocks, {report.num_scored:,} tokens scored, "
        f"seed {arguments.seed}"
    )
    print(table(rows) + "\n")
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": Path(arguments.hf_dir).name,
        "text": Path(arguments.text).name,
        "calibration": Path(arguments.calibration).name,
        "seed": arguments.seed,
        "label": report.label,
        "rows": rows,
    }
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
