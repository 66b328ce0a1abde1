"""The generic text that the learned policy is trained on: everything but dialogue, which then is unseen.

    python benchmarks/precision/general_text.py DATA OUT.txt

Takes 900 documents of DATA/train.txt.xz (at most 20,000 bytes of each) and 400 of DATA/tinystories, shuffled
by a fixed seed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import random
from pathlib import Path

from taper.tune.prompts import DOCUMENT_END

NUM_DOCUMENTS, NUM_STORIES = 900, 400
MAX_BYTES = 20_000
LEFT_OUT = "dialogue"


def general_documents(
    text: bytes, rows: list[dict[str, object]], stories: list[str], seed: int = 0
) -> list[str]:
    """Documents in random order.

    Args:
        text: of the training split.
        rows: of the index, each with split, domain, offset and bytes.
        stories: documents that join them.
        seed: of the choice and the order.
    """
    generator = random.Random(seed)
    kept = [row for row in rows if row["split"] == "train" and row["domain"] != LEFT_OUT]
    generator.shuffle(kept)
    documents = []
    for row in kept[:NUM_DOCUMENTS]:
        begin, length = int(str(row["offset"])), min(int(str(row["bytes"])), MAX_BYTES)
        documents.append(text[begin : begin + length].decode("utf-8", "ignore").replace(DOCUMENT_END, ""))
    documents += stories[:NUM_STORIES]
    generator.shuffle(documents)
    return documents


def main() -> None:
    """Read, choose, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    with gzip.open(options.data / "index.jsonl.gz", "rt", encoding="utf-8") as index:
        rows = [json.loads(line) for line in index]
    text = lzma.decompress((options.data / "train.txt.xz").read_bytes())
    told = lzma.decompress((options.data / "tinystories" / "tinystories_val.txt.xz").read_bytes())
    documents = general_documents(text, rows, told.decode("utf-8").split(DOCUMENT_END))
    options.out.write_text(f"\n{DOCUMENT_END}\n".join(documents), encoding="utf-8")


if __name__ == "__main__":
    main()
