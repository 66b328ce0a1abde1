"""What each step of the quantiser buys: perplexity of one checkpoint, quantised in several ways.

    python benchmarks/quality/ablation.py HF_DIR --calibration TEXT --text TEXT

Every variant is written as a file and read back by the engine. The table compares with the float checkpoint
over the same blocks; its last row runs the float weights over the engine's int8 activations, the floor of any
width. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from taper.errors import TaperError
from taper.evaluate import PROTOCOLS, Blocks, PerplexityReport, Reader, WidthResult, cut, measure_blocks
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.formats.text import read_text
from taper.kernels import hadamard_block, padded_cols, prepare, rotate
from taper.layers.linear import FloatLinear
from taper.models import Decoder
from taper.models.parts import FLOAT_BITS, Parts, float_parts
from taper.quantize import QuantizeOptions, SolverOptions, quantize
from taper.tokenizer import Tokenizer

DEFAULT = SolverOptions()
WIDTHS = (2, 3, 4, 6)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to quantise, and the widths to read from its file."""

    name: str
    options: QuantizeOptions
    widths: tuple[int, ...]


def variants(bits: tuple[int, int], tokens: int, seed: int) -> Iterator[Variant]:
    """The steps one after another, then other weights of the widths, then each width without nesting."""

    def options(planes: tuple[int, int] = bits, **changes: object) -> QuantizeOptions:
        solver = dataclasses.replace(DEFAULT, **changes)  # type: ignore[arg-type]
        return QuantizeOptions(planes, tokens, seed, solver)

    widths = tuple(width for width in WIDTHS if bits[0] <= width <= bits[1])
    yield Variant("nearest codes", options(feedback=False, passes=0, refit_scales=False), widths)
    yield Variant("error feedback", options(passes=0, refit_scales=False), widths)
    yield Variant("+ scales per width", options(passes=0), widths)
    yield Variant(f"+ {DEFAULT.passes} passes (default)", options(), widths)
    for base in (1.0, 2.0, 4.0):
        if base != DEFAULT.importance_base:
            yield Variant(f"default, importance {base:g}^b", options(importance_base=base), widths)
    for width in widths:
        yield Variant(f"{width} bits alone", options((width, width)), (width,))


def int8_activations(parts: Parts, seed: int) -> Parts:
    """A float model whose matrices meet activations as the engine rounds them: rotated, int8, turned back."""
    linears = [getattr(block, name) for block in parts.blocks for name in ("qkv", "o", "gate_up", "down")]
    generator = np.random.default_rng(seed)
    for linear in (*linears, parts.head):
        assert isinstance(linear, FloatLinear)
        features = linear.in_features
        signs = generator.choice(np.array([-1, 1], dtype=np.float32), features)
        linear.product_input = _rounding(linear.product_input, features, signs)
    return parts


def _rounding(exact, features: int, signs):  # type: ignore[no-untyped-def]
    cols, block = padded_cols(features), hadamard_block(features)

    def rounded(x):  # type: ignore[no-untyped-def]
        acts = prepare(exact(x), cols=cols, signs=signs, block=block)
        values = acts.q[:, :features].astype(np.float32) * acts.scale[:, None]
        return rotate(np.ascontiguousarray(values), signs, block, inverse=True)

    return rounded


def evenly_spaced(blocks: Blocks, count: int) -> Blocks:
    """`count` blocks from all over the text: the first ones would be one document."""
    chosen = np.linspace(0, len(blocks.tokens) - 1, min(count, len(blocks.tokens))).astype(int)
    return dataclasses.replace(blocks, tokens=blocks.tokens[chosen])


def run(arguments: argparse.Namespace) -> tuple[PerplexityReport, list[tuple[str, list[WidthResult]]]]:
    """Quantise, read and group the results by variant."""
    checkpoint = HfCheckpoint.open(arguments.hf_dir)
    reference = Decoder.from_hf(checkpoint)
    tokenizer = Tokenizer(checkpoint.tokenizer_json or "")
    blocks = cut(read_text(arguments.text), tokenizer, reference.context_length, arguments.protocol)
    blocks = evenly_spaced(blocks, arguments.blocks)
    readers, names = [Reader(reference, FLOAT_BITS)], []
    with tempfile.TemporaryDirectory() as folder:
        for index, variant in enumerate(
            variants(arguments.bits, arguments.calibration_tokens, arguments.seed)
        ):
            path = Path(folder) / f"{index}.taper"
            made = quantize(
                arguments.hf_dir, path, calibration=arguments.calibration, options=variant.options
            )
            print(f"{variant.name}: {made.seconds:.0f} s", file=sys.stderr)
            decoder = Decoder.from_taper(TaperFile.open(path))
            readers += [Reader(decoder, width) for width in variant.widths]
            names += [variant.name] * len(variant.widths)
        readers.append(Reader(Decoder(int8_activations(float_parts(checkpoint), arguments.seed)), FLOAT_BITS))
        names.append("float weights, int8 activations")
        report = measure_blocks(readers, blocks, True, _progress)
    grouped: dict[str, list[WidthResult]] = {}
    for name, result in zip(names, report.results[1:], strict=True):
        grouped.setdefault(name, []).append(result)
    return report, list(grouped.items())


def _progress(done: int, total: int, left_s: float) -> None:
    print(f"\rblock {done} of {total}, {left_s:.0f} s left ", end="", file=sys.stderr, flush=True)


def table(rows: list[tuple[str, list[WidthResult]]]) -> str:
    """Markdown: for every width the increase of perplexity, and the KL divergence in brackets."""
    lines = ["| variant | " + " | ".join(f"{width} bits" for width in WIDTHS) + " |", "|---" * 5 + "|"]
    for name, results in rows:
        by_bits = {result.bits: result for result in results}
        cells = [_cell(by_bits[width]) if width in by_bits else "" for width in WIDTHS]
        if FLOAT_BITS in by_bits:
            cells[-1] = _cell(by_bits[FLOAT_BITS])
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(result: WidthResult) -> str:
    assert result.increase_frac is not None
    assert result.mean_kl is not None
    return f"{result.increase_frac:+.2%} ({result.mean_kl:.4f})"


def main() -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure what each step of the quantiser buys.")
    parser.add_argument("hf_dir", metavar="HF_DIR")
    parser.add_argument("--calibration", required=True, metavar="TEXT")
    parser.add_argument("--text", required=True, metavar="TEXT")
    parser.add_argument("--bits", type=int, nargs=2, default=(2, 6), metavar=("MIN", "MAX"))
    parser.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0])
    parser.add_argument("--blocks", type=int, default=40, help="blocks, evenly spaced over the text")
    parser.add_argument("--calibration-tokens", type=int, default=QuantizeOptions().calibration_tokens)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.bits = tuple(arguments.bits)
    try:
        report, rows = run(arguments)
    except TaperError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    reference = report.results[0]
    scored = f"{report.num_blocks} blocks, {report.num_scored:,} tokens scored"
    print(f"\n{report.label}, {scored}, seed {arguments.seed}")
    print(f"float perplexity {reference.perplexity:.4f} +- {reference.standard_error or 0:.4f}")
    print("increase of perplexity (KL divergence in nats)\n\n" + table(rows) + "\n")
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": Path(arguments.hf_dir).name,
        "text": Path(arguments.text).name,
        "calibration": Path(arguments.calibration).name,
        "seed": arguments.seed,
        "label": report.label,
        "float": dataclasses.asdict(reference),
        "variants": {name: [dataclasses.asdict(result) for result in results] for name, results in rows},
    }
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
