"""What a KV cache of planes costs: perplexity and bytes of several formats against float16.

    python benchmarks/anda/kv_quality.py models/taper-small.taper --text TEXT --text TEXT --json OUT.json

Every block of 2,048 tokens (or the model's context) is read at the weights' width with each format, from an
empty cache on, in passes of 256 tokens, so that entries grow old as they do in use; all tokens but the first
count. Increase is over float16 on the same blocks, with the standard error of the blocks' differences. Bytes
are those that the caches hold at the end of a block.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from finish import finish
from numpy.typing import NDArray

from taper.evaluate.divergence import log_likelihoods, log_normalisers
from taper.evaluate.protocols import cut
from taper.formats.activations import KV_FLOAT16
from taper.formats.container import TaperFile
from taper.formats.text import read_text
from taper.models import Decoder
from taper.tokenizer import Tokenizer

FORMATS = (
    KV_FLOAT16,
    "7",
    "6",
    "5",
    "4",
    "3",
    "7,5@128",
    "7,4@128",
    "7,3@128",
    "6,4@128",
    "7,k4v3@128",
    "7,k3v4@128",
)
PASS_TOKENS = 256


def read(decoder: Decoder, block: NDArray[np.int32], bits: int) -> tuple[float, int]:
    """Mean negative log-likelihood of a block, and the bytes of its cache at the end."""
    cache, total = decoder.new_cache(len(block)), 0.0
    for begin in range(0, len(block), PASS_TOKENS):
        logits = decoder.forward(block[begin : begin + PASS_TOKENS], cache, bits, logits="all")
        assert logits is not None
        cache.release_old()
        targets = block[begin + 1 : begin + 1 + PASS_TOKENS]
        scored = logits[: len(targets)]
        total -= float(np.sum(log_likelihoods(scored, log_normalisers(scored), targets), dtype=np.float64))
    return total / (len(block) - 1), cache.bytes_used


def report(model: Path, texts: Sequence[Path], bits: int | None, num_blocks: int) -> dict[str, Any]:
    """All figures."""
    file = TaperFile.open(model)
    assert file.tokenizer_json is not None
    width = file.max_bits if bits is None else bits
    tokenizer, context = Tokenizer(file.tokenizer_json), file.config.max_position_embeddings
    blocks = np.concatenate(
        [cut(read_text(text), tokenizer, context, "blocks", num_blocks).tokens for text in texts]
    )
    decoders = {kv: Decoder.from_taper(file, kv=kv) for kv in FORMATS}
    losses: dict[str, list[float]] = {kv: [] for kv in FORMATS}
    held: dict[str, int] = {}
    begin = time.perf_counter()
    for done, block in enumerate(blocks, 1):
        for kv, decoder in decoders.items():
            loss, held[kv] = read(decoder, block, width)
            losses[kv].append(loss)
        print(f"{done} of {len(blocks)} blocks, {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    reference = np.array(losses[KV_FLOAT16])
    rows = []
    for kv in FORMATS:
        differences = np.array(losses[kv]) - reference
        rows.append(
            {
                "kv": kv,
                "perplexity": float(np.exp(np.mean(losses[kv]))),
                "increase": float(np.expm1(differences.mean())),
                "error": float(differences.std(ddof=1) / np.sqrt(len(differences))),
                "bytes": held[kv],
                "times_less": held[KV_FLOAT16] / held[kv],
            }
        )
    return {
        "benchmark": "kv_quality",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": model.name,
        "texts": [text.name for text in texts],
        "weight_bits": width,
        "block_tokens": int(blocks.shape[1]),
        "scored_tokens": int(blocks.shape[0] * (blocks.shape[1] - 1)),
        "rows": rows,
    }


def main() -> None:
    """Measure, print a table, and end with a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True, help="repeatable")
    parser.add_argument("--bits", type=int, help="of the weights; default: all")
    parser.add_argument("--blocks", type=int, default=16, help="from each text")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = report(options.model, options.text, options.bits, options.blocks)
    print(
        f"{found['model']} at {found['weight_bits']} bits, {found['scored_tokens']:,} tokens in blocks of "
        f"{found['block_tokens']}"
    )
    print(f"{'KV':12} {'perplexity':>10} {'increase':>20} {'KiB':>9} {'less':>7}")
    for row in found["rows"]:
        increase = f"{row['increase']:+.3%} ± {row['error']:.3%}"
        print(
            f"{row['kv']:12} {row['perplexity']:10.4f} {increase:>20} {row['bytes'] / 1024:9.0f} "
            f"{row['times_less']:6.2f}x"
        )
    finish(found, options.json)


if __name__ == "__main__":
    main()
