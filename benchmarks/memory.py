"""Peak memory while decoding, against the planes read plus the KV cache.

    python benchmarks/memory.py FILE --bits 4,3,2 [--tokens 64]

Each width is a fresh process that decodes greedily through the engine and asks the kernel for its peak
resident memory. The surplus is what is neither a plane that was read nor the KV cache: the interpreter,
the tokenizer, activations. A table for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import taper
from taper.formats.container import TaperFile

LIMIT_BYTES = 120_000_000


def planes_bytes(file: TaperFile, bits: int) -> int:
    """Bytes of the first `bits` planes of every matrix that a product reads; an untied embedding is not."""
    tied = file.config.tie_word_embeddings
    read = [spec for spec in file.matrices if tied or spec.name != "embed"]
    return sum(bits * spec.out_features * spec.cols // 8 for spec in read)


def kv_bytes(file: TaperFile, num_tokens: int) -> int:
    """Bytes of float16 keys and values of `num_tokens` entries."""
    config = file.config
    return 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * num_tokens


def decode(path: Path, bits: int, num_tokens: int) -> int:
    """Peak resident bytes of this process after decoding."""
    prompt = [5, 6, 7, 8]
    llm = taper.load(path)
    return llm.generate(
        prompt, policy=f"fixed:{bits}", max_tokens=num_tokens, temperature=0.0, ignore_eos=True
    ).usage.peak_memory_bytes


def measure(path: Path, bits: int, num_tokens: int) -> dict[str, Any]:
    """One row, from a fresh process."""
    command = [sys.executable, __file__, str(path), "--worker", str(bits), "--tokens", str(num_tokens)]
    peak_bytes = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    file = TaperFile.open(path)
    planes, kv = planes_bytes(file, bits), kv_bytes(file, num_tokens + 4)
    return {
        "bits": bits,
        "peak_bytes": peak_bytes,
        "planes_bytes": planes,
        "kv_bytes": kv,
        "surplus_bytes": peak_bytes - planes - kv,
    }


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--bits", default="4,3,2", help="widths, separated by commas")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(decode(options.file, options.worker, options.tokens))
        return
    print(f"{'bits':>4} {'peak MB':>9} {'planes MB':>10} {'KV MB':>7} {'surplus MB':>11}")
    rows = []
    for bits in (int(word) for word in options.bits.split(",")):
        row = measure(options.file, bits, options.tokens)
        rows.append(row)
        megabytes = [row[key] / 1e6 for key in ("peak_bytes", "planes_bytes", "kv_bytes", "surplus_bytes")]
        print(
            f"{bits:>4} {megabytes[0]:>9.1f} {megabytes[1]:>10.1f} {megabytes[2]:>7.2f} {megabytes[3]:>11.1f}"
        )
    print(json.dumps({"benchmark": "memory", "limit_bytes": LIMIT_BYTES, "rows": rows}))


if __name__ == "__main__":
    main()
