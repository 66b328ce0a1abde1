"""Writes a trained model's card: what it was trained on, and its perplexity at every width.

    python tools/train/card.py --work WORK --hf WORK/hf-final --file src/taper/assets/taper-tiny.taper \
        --text NAME=held-out.txt --text NAME=other.txt > src/taper/assets/MODEL_CARD.md

The figures of `taper eval FILE --against HF` for each text and both protocols; needs no torch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from taper.cli.card import with_error
from taper.evaluate import PROTOCOLS, PerplexityReport, measure_perplexity
from taper.formats.container import TaperFile
from taper.models.parts import FLOAT_BITS


def evaluate(options: argparse.Namespace, text: Path, protocol: str) -> PerplexityReport:
    """One report of `taper.evaluate`, every width and the float checkpoint."""
    print(f"evaluating {text.name}, {protocol}", file=sys.stderr, flush=True)
    return measure_perplexity(
        options.file, text, protocol=protocol, against=options.hf, max_blocks=options.max_blocks
    )


def table(report: PerplexityReport) -> list[str]:
    """Markdown rows, the float checkpoint first; after ± one standard error."""
    lines = [
        "| bits | perplexity | bits/byte | increase | top-1 | mean KL (nats) | median | 99.9 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report.results:
        cells = [with_error(row.perplexity, row.standard_error, ".2f"), f"{row.bits_per_byte:.4f}"]
        cells += [
            with_error(row.increase_frac, row.increase_standard_error, "+.2%"),
            with_error(row.top1_agreement, row.top1_standard_error, ".2%"),
            with_error(row.mean_kl, row.mean_kl_standard_error, ".5f"),
            with_error(row.median_kl, row.median_kl_standard_error, ".5f"),
            with_error(row.p999_kl, row.p999_kl_standard_error, ".3f"),
        ]
        name = "float" if row.bits == FLOAT_BITS else f"{row.bits:g}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def data_rows(facts: dict[str, Any]) -> list[str]:
    """Markdown rows: what each part of the training text is, and under which licences."""
    lines = ["| part | documents | tokens | licences |", "|---|---|---|---|"]
    for name, part in facts["train"].items():
        licences = ", ".join(sorted(part["bytes_by_licence"]))
        lines.append(f"| {name} | {part['documents']:,} | {part['tokens']:,} | {licences} |")
    return lines


def card(options: argparse.Namespace) -> list[str]:
    """The whole card."""
    file = TaperFile.open(options.file)
    facts = json.loads((options.work / "data-facts.json").read_text())
    bits = list(range(file.min_bits, file.max_bits + 1))
    config = file.config
    lines = [
        f"# {options.title}",
        "",
        f"A {config.architecture} with {config.num_layers} layers, hidden {config.hidden_size}, FFN "
        f"{config.intermediate_size}, {config.num_heads} heads, {config.num_kv_heads} KV heads, vocabulary "
        f"{config.vocab_size:,}, tied embedding, context {config.max_position_embeddings:,}: trained from "
        f"scratch by `tools/train` on {options.tokens} tokens. It continues English text, best in the manner "
        "of children's stories; it knows nothing and follows no instructions.",
        "",
        f"`{options.file.name}`: {options.file.stat().st_size:,} bytes, {bits[0]} to {bits[-1]} bits. "
        "Licence of the weights: Apache-2.0.",
        "",
        "## Training text",
        "",
        *data_rows(facts),
        "",
        "## Held-out perplexity at each width",
        "",
        f"Printed by `tools/train/card.py` on {datetime.date.today()} from `taper eval --against` the float "
        f"checkpoint; at most the first {options.max_blocks} blocks of each text.",
    ]
    for word in options.text:
        name, _, path = word.partition("=")
        for protocol in PROTOCOLS:
            report = evaluate(options, Path(path), protocol)
            lines += [
                "",
                f"### {name}: {report.label}; {report.num_scored:,} tokens",
                "",
                *table(report),
            ]
    return lines


def main() -> None:
    """Print the card."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="directory of prepare.py, for its facts")
    parser.add_argument("--hf", type=Path, required=True, help="the float checkpoint")
    parser.add_argument("--file", type=Path, required=True, help="the .taper file made of it")
    parser.add_argument("--tokens", required=True, help="tokens trained on, in words")
    parser.add_argument("--title", default="The embedded model")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="repeatable")
    parser.add_argument("--max-blocks", type=int, default=60, help="of each text and protocol")
    print("\n".join(card(parser.parse_args())))


if __name__ == "__main__":
    main()
