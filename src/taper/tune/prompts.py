"""The prompts of a task, and what followed them in the text: passages of documents, or JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from taper.errors import UsageError
from taper.formats.text import read_text
from taper.tokenizer import Tokenizer

# Between documents of a text, as training corpora mark them.
DOCUMENT_END = "<|endoftext|>"
SUMMARY_INSTRUCTION = "Summarize the dialogue in one or two sentences."


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in random order, so that the first of them are as good a sample as any.

    Attributes:
        name: of the task.
        prompts: token ids of each prompt, begun as the tokenizer begins a text.
        max_tokens: longest answer.
        references: token ids of what followed each prompt, at most `max_tokens`; empty where nothing is
            known.
        documents: of each prompt, the number of the document it was cut from: prompts of one document are
            not independent.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    references: tuple[tuple[int, ...], ...]
    documents: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_documents(self) -> int:
        """Different documents."""
        return len(set(self.documents))

    def select(self, chosen: Sequence[int]) -> PromptSet:
        """The prompts of these places, in this order."""
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in chosen),
            references=tuple(self.references[i] for i in chosen),
            documents=tuple(self.documents[i] for i in chosen),
        )

    def split(self, first_frac: float) -> tuple[PromptSet, PromptSet]:
        """Two sets without a common document: one of about `first_frac` of the documents, and the rest.

        Raises:
            UsageError: fewer than two documents, or a share that leaves one set empty.
        """
        order = list(dict.fromkeys(self.documents))
        count = round(first_frac * len(order))
        if not 0 < count < len(order):
            raise UsageError(
                f"task {self.name!r}: {len(order)} documents cannot be split at {first_frac:g} into two sets",
                hint="give a text of more documents, or ask for more prompts",
            )
        first = set(order[:count])
        sides: tuple[list[int], list[int]] = ([], [])
        for place, document in enumerate(self.documents):
            sides[document not in first].append(place)
        return self.select(sides[0]), self.select(sides[1])


def read_prompts(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    name: str,
    num_prompts: int,
    prompt_tokens: int,
    max_tokens: int,
    seed: int = 0,
) -> PromptSet:
    """Draw prompts from a file, the same ones for the same seed.

    A text (.txt, .txt.xz) is cut at `<|endoftext|>` into documents, a document into passages of
    `prompt_tokens` tokens and the `max_tokens` that follow. Where there are documents enough, each gives its
    beginning only; else passages from within are taken too. Passages of a text without marks do not overlap
    and count as documents of their own.

    JSON lines (.jsonl, .jsonl.xz) hold {"prompt", "reference"} (the reference may be missing), {"dialogue",
    "summary"} (a one-line instruction to summarise goes before the dialogue), or {"question", "answer"}. A
    prompt of more than `prompt_tokens` tokens is left out, since a cut one would ask something else.

    Args:
        path: the file.
        tokenizer: the model's.
        name: of the task.
        num_prompts: at least 1.
        prompt_tokens: of a prompt with its beginning-of-text token; of JSON lines, at most.
        max_tokens: longest answer.
        seed: of the choice and of the order.

    Raises:
        UsageError: counts below 1, no such file, no JSON, unknown fields, or fewer prompts than asked for.
        CorruptFileError: damaged xz data or no UTF-8.
    """
    for what, count in (
        ("num_prompts", num_prompts),
        ("prompt_tokens", prompt_tokens),
        ("max_tokens", max_tokens),
    ):
        if count < 1:
            raise UsageError(f"{what} is {count}; it must be at least 1")
    path, text = Path(path), read_text(path)
    begin = tokenizer.encode("")[:1]
    if re.search(r"\.jsonl(\.xz)?$", path.name):
        pieces = _lines(path, text, tokenizer, prompt_tokens - len(begin), max_tokens)
    else:
        pieces = _passages(text, tokenizer, num_prompts, prompt_tokens - len(begin), max_tokens)
    if len(pieces) < num_prompts:
        raise UsageError(
            f"{path} has {len(pieces)} prompts of {prompt_tokens} tokens with {max_tokens} more after them, "
            f"{num_prompts} are asked for",
            hint="ask for fewer or shorter prompts, or give a longer file",
        )
    chosen = np.random.default_rng(seed).permutation(len(pieces))[:num_prompts]
    taken = [pieces[int(i)] for i in chosen]
    return PromptSet(
        name=name,
        prompts=tuple((*begin, *piece.prompt) for piece in taken),
        max_tokens=max_tokens,
        references=tuple(piece.reference for piece in taken),
        documents=tuple(piece.document for piece in taken),
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    prompt: tuple[int, ...]
    reference: tuple[int, ...]
    document: int


def _passages(
    text: str, tokenizer: Tokenizer, num_prompts: int, prompt_tokens: int, max_tokens: int
) -> list[_Piece]:
    """Beginnings of documents where they are enough, else all passages that do not overlap."""
    size = prompt_tokens + max_tokens
    documents = [document.strip() for document in text.split(DOCUMENT_END)]
    windows: list[list[_Piece]] = []
    for number, document in enumerate(filter(None, documents)):
        ids = tokenizer.encode(document, special_tokens=False)
        starts = range(0, len(ids) - size + 1, size)
        found = [tuple(ids[start : start + size]) for start in starts]
        windows.append([_Piece(ids[:prompt_tokens], ids[prompt_tokens:], number) for ids in found])
    if len(windows) == 1:
        return [_Piece(piece.prompt, piece.reference, n) for n, piece in enumerate(windows[0])]
    beginnings = [pieces[0] for pieces in windows if pieces]
    if len(beginnings) >= num_prompts:
        return beginnings
    return [piece for pieces in windows for piece in pieces]


def _lines(path: Path, text: str, tokenizer: Tokenizer, prompt_tokens: int, max_tokens: int) -> list[_Piece]:
    pieces = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        prompt, reference = _fields(path, number, line)
        ids = tokenizer.encode(prompt, special_tokens=False)
        if 0 < len(ids) <= prompt_tokens:
            after = tokenizer.encode(reference, special_tokens=False)[:max_tokens]
            pieces.append(_Piece(tuple(ids), tuple(after), number))
    return pieces


def _fields(path: Path, number: int, line: str) -> tuple[str, str]:
    """Prompt and reference of one line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(
            f"{path}, line {number} is not JSON: {error}", hint="give one object a line"
        ) from error
    if isinstance(row, dict):
        for keys, read in _FORMATS.items():
            if keys <= set(row):
                prompt, reference = read(row)
                if isinstance(prompt, str) and isinstance(reference, str):
                    return prompt, reference
    raise UsageError(
        f"{path}, line {number}: its fields are of no known format",
        hint='give {"prompt": "...", "reference": "..."} on each line',
    )


_FORMATS: dict[frozenset[str], Callable[[Mapping[str, Any]], tuple[Any, Any]]] = {
    frozenset({"prompt"}): lambda row: (row["prompt"], row.get("reference", "")),
    frozenset({"dialogue", "summary"}): lambda row: (
        f"{SUMMARY_INSTRUCTION}\n\n{row['dialogue']}\n\nSummary:",
        f" {row['summary']}",
    ),
    frozenset({"question", "answer"}): lambda row: (
        f"Question: {row['question']}\nAnswer:",
        f" {row['answer']}",
    ),
}
