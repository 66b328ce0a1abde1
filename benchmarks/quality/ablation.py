"""What each step of the quantiser buys: perplexity of one checkpoint, quantised in several ways.

    python benchmarks/quality/ablation.py HF_DIR --calibration TEXT --text TEXT [--variants papers]

The groups of variants: `steps` of the solver one after another, `importance` of the widths, each width
`alone` without nesting, the codebooks of the `papers`. Every variant is written as a file, whose size the
table gives (of all its files where each width has one), and read back by the engine. The table compares with
the float checkpoint over the same blocks; its last row runs the float weights over the engine's int8
activations, the floor of any width. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
from taper.quantize.fisher_file import FisherFile
from taper.quantize.methods import ROW_MAX_BITS, MethodOptions
from taper.tokenizer import Tokenizer

DEFAULT = SolverOptions()
WIDTHS = (2, 3, 4, 6, 8)
GROUPS = ("steps", "importance", "alone", "papers")
OUTLIERS = 0.0045  # SqueezeLLM: 0.05 % by sensitivity and 0.40 % by magnitude


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to quantise, the widths to read from its file, and whether the look-up reads all planes."""

    name: str
    options: QuantizeOptions
    widths: tuple[int, ...]
    whole_look_up: bool = True


def variants(
    bits: tuple[int, int], tokens: int, seed: int, groups: Sequence[str], fisher: FisherFile | None
) -> Iterator[Variant]:
    """The variants of the groups; of all, only the default is in each, and comes once."""
    widths = tuple(width for width in WIDTHS if bits[0] <= width <= bits[1])
    base = QuantizeOptions(bits, tokens, seed)
    default = Variant(
        f"default: {DEFAULT.passes} passes, importance {DEFAULT.importance_base:g}^b", base, widths
    )
    if "steps" in groups:
        yield from solver_steps(base, widths)
    yield default
    if "importance" in groups:
        for importance in (1.0, 2.0, 3.0, 4.0):
            if importance != DEFAULT.importance_base:
                solver = dataclasses.replace(DEFAULT, importance_base=importance)
                options = dataclasses.replace(base, solver=solver)
                yield Variant(f"default, importance {importance:g}^b", options, widths)
    if "alone" in groups:
        yield Variant("default, look-up at the width too", base, widths, whole_look_up=False)
        for width in widths:
            yield Variant(f"{width} bits alone", dataclasses.replace(base, bits=(width, width)), (width,))
    if "papers" in groups:
        yield from papers(base, widths, fisher)


def solver_steps(base: QuantizeOptions, widths: tuple[int, ...]) -> Iterator[Variant]:
    """The solver with one step after another."""

    def options(**changes: Any) -> QuantizeOptions:
        return dataclasses.replace(base, solver=dataclasses.replace(DEFAULT, **changes))

    plain = {"balance": False, "centre": False, "lookup_share": 0.0}
    yield Variant("nearest codes", options(feedback=False, passes=0, refit_scales=False, **plain), widths)
    yield Variant("error feedback", options(passes=0, refit_scales=False, **plain), widths)
    yield Variant("+ scales per width", options(passes=0, **plain), widths)
    yield Variant(f"+ {DEFAULT.passes} passes", options(**plain), widths)
    yield Variant("+ offsets", options(balance=False, lookup_share=0.0), widths)
    yield Variant("+ column scales", options(lookup_share=0.0), widths)


def papers(base: QuantizeOptions, widths: tuple[int, ...], fisher: FisherFile | None) -> Iterator[Variant]:
    """The codebooks of the papers, row tables by the diagonal Fisher too where its file is given."""

    def options(codebook: str, method: str | None = None, outliers: float = 0.0) -> QuantizeOptions:
        chosen = MethodOptions(codebook, method, outliers)
        most = min(base.bits[1], ROW_MAX_BITS) if chosen.has_tables else base.bits[1]
        return dataclasses.replace(base, bits=(base.bits[0], most), method=chosen)

    narrow = tuple(width for width in widths if width <= ROW_MAX_BITS)

    for codebook in ("uniform", "shared"):
        yield Variant(f"nearest, {codebook}", options(codebook, "nearest"), widths)
    for codebook in ("uniform", "shared"):
        for width in widths:
            alone = dataclasses.replace(options(codebook, "gptq"), bits=(width, width))
            yield Variant(f"GPTQ, {codebook}, a file a width", alone, (width,))
    for name, codebook in (("row tables, greedy", "row-greedy"), ("row tables, joint", "row")):
        yield Variant(name, options(codebook), narrow)
        if fisher is not None:
            weighed = dataclasses.replace(options(codebook), fisher=fisher)
            yield Variant(f"{name}, Fisher", weighed, narrow)
    yield Variant(f"row tables, joint, {OUTLIERS:.2%} outliers", options("row", outliers=OUTLIERS), narrow)
    yield Variant(f"default, {OUTLIERS:.2%} outliers", options("shared", outliers=OUTLIERS), widths)


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


@dataclass(slots=True)
class Row:
    """A variant's results and the bytes of its files."""

    file_bytes: int = 0
    results: list[WidthResult] = field(default_factory=list)


def run(arguments: argparse.Namespace) -> tuple[PerplexityReport, dict[str, Row]]:
    """Quantise, read and group the results by variant."""
    checkpoint = HfCheckpoint.open(arguments.hf_dir)
    reference = Decoder.from_hf(checkpoint)
    tokenizer = Tokenizer(checkpoint.tokenizer_json or "")
    blocks = cut(read_text(arguments.text), tokenizer, reference.context_length, arguments.protocol)
    blocks = evenly_spaced(blocks, arguments.blocks)
    readers, names = [Reader(reference, FLOAT_BITS)], []
    rows: dict[str, Row] = {}
    files: list[tuple[QuantizeOptions, Path]] = []
    fisher = None if arguments.fisher is None else FisherFile(arguments.fisher)
    with tempfile.TemporaryDirectory() as folder:
        for index, variant in enumerate(
            variants(arguments.bits, arguments.calibration_tokens, arguments.seed, arguments.variants, fisher)
        ):
            known = next((path for options, path in files if options == variant.options), None)
            path = known or Path(folder) / f"{index}.taper"
            if known is None:
                made = quantize(
                    arguments.hf_dir, path, calibration=arguments.calibration, options=variant.options
                )
                print(f"{variant.name}: {made.seconds:.0f} s", file=sys.stderr)
                files.append((variant.options, path))
            rows.setdefault(variant.name, Row()).file_bytes += path.stat().st_size
            readers += variant_readers(TaperFile.open(path), variant)
            names += [variant.name] * len(variant.widths)
        readers.append(Reader(Decoder(int8_activations(float_parts(checkpoint), arguments.seed)), FLOAT_BITS))
        names.append("float weights, int8 activations")
        report = measure_blocks(readers, blocks, True, _progress)
    for name, result in zip(names, report.results[1:], strict=True):
        rows.setdefault(name, Row()).results.append(result)
    return report, rows


def variant_readers(file: TaperFile, variant: Variant) -> list[Reader]:
    """A reader of each width."""
    if variant.whole_look_up:
        decoder = Decoder.from_taper(file)
        return [Reader(decoder, width) for width in variant.widths]
    names = [spec.name for spec in file.matrices]
    return [Reader(Decoder.from_taper(file, dict.fromkeys(names, width)), width) for width in variant.widths]


def _progress(done: int, total: int, left_s: float) -> None:
    print(f"\rblock {done} of {total}, {left_s:.0f} s left ", end="", file=sys.stderr, flush=True)


def table(rows: dict[str, Row]) -> str:
    """Markdown: for every width the increase of perplexity, and the KL divergence in brackets."""
    titles = [f"{width} bits" for width in WIDTHS]
    lines = ["| " + " | ".join(["variant", *titles, "MB"]) + " |", "|---" * (len(titles) + 2) + "|"]
    for name, row in rows.items():
        by_bits = {result.bits: result for result in row.results}
        cells = [_cell(by_bits[width]) if width in by_bits else "" for width in WIDTHS]
        if FLOAT_BITS in by_bits:
            cells[-1] = _cell(by_bits[FLOAT_BITS])
        size = f"{row.file_bytes / 1e6:.2f}" if row.file_bytes else ""
        lines.append("| " + " | ".join([name, *cells, size]) + " |")
    return "\n".join(lines)


def _cell(result: WidthResult) -> str:
    assert result.increase_frac is not None
    assert result.mean_kl is not None
    return f"{result.increase_frac:+.2%} ({result.mean_kl:.5f})"


def main() -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure what each step of the quantiser buys.")
    parser.add_argument("hf_dir", metavar="HF_DIR")
    parser.add_argument("--calibration", required=True, metavar="TEXT")
    parser.add_argument("--text", required=True, metavar="TEXT")
    parser.add_argument("--bits", type=int, nargs=2, default=(2, 8), metavar=("MIN", "MAX"))
    parser.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0])
    parser.add_argument("--blocks", type=int, default=40, help="blocks, evenly spaced over the text")
    parser.add_argument("--calibration-tokens", type=int, default=QuantizeOptions().calibration_tokens)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", choices=GROUPS, nargs="+", default=list(GROUPS), help="groups to run")
    parser.add_argument("--fisher", metavar="FILE", help="of taper.quantize.fisher, for row tables")
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
        "variants": {name: dataclasses.asdict(row) for name, row in rows.items()},
    }
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
