"""Multiple-choice tasks from JSON lines: the neutral format, and the fields of well-known data sets.

Neutral: one object a line, {"context": "...", "choices": ["...", ...], "answer": 0}. The choice's text
follows the context as it stands, so a choice after a word begins with a space. One choice alone asks whether
greedy decoding gives it (as LAMBADA does).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taper.errors import UsageError
from taper.formats.text import read_text


@dataclass(frozen=True, slots=True)
class Item:
    """One question: `choices[answer]` is right after `context`."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Task:
    """Questions of one file; either all have one choice (a text to complete) or none has."""

    name: str
    items: tuple[Item, ...]

    @property
    def is_completion(self) -> bool:
        """Whether there is nothing to choose from: the answer must be what greedy decoding gives."""
        return len(self.items[0].choices) == 1


def read_task(path: str | Path, max_items: int | None = None) -> Task:
    """Read a task file, .jsonl or .json (a list), plain or .xz.

    Args:
        path: the file; its name without endings is the task's.
        max_items: take that many, evenly spaced over the file.

    Raises:
        UsageError: no such file, no JSON, fields of no known format, or an answer that is no choice.
        CorruptFileError: damaged xz data or no UTF-8.
    """
    path = Path(path)
    rows = _rows(path, read_text(path))
    if max_items is not None and max_items < len(rows):
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, max_items).astype(int)]
    items = tuple(_item(path, number, row) for number, row in rows)
    if len({len(item.choices) == 1 for item in items}) != 1:
        raise UsageError(
            f"{path}: some items have one choice, some have more", hint="put them into two files"
        )
    return Task(path.name.split(".")[0], items)


def _rows(path: Path, text: str) -> list[tuple[int, Any]]:
    """Numbered objects: lines, or the entries of one list."""
    try:
        if text.lstrip().startswith("["):
            return [*enumerate(json.loads(text), 1)]
        return [(n, json.loads(line)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}", hint="give one object a line") from error


def _item(path: Path, number: int, row: Any) -> Item:
    if isinstance(row, dict):
        for keys, read in _FORMATS.items():
            if keys <= set(row):
                item = read(row)
                if item is not None and _is_sound(item):
                    return item
                raise UsageError(
                    f"{path}, item {number}: its {', '.join(sorted(keys))} make no question",
                    hint="choices are a list of texts, the answer is the index of one of them",
                )
    raise UsageError(
        f"{path}, item {number}: its fields are of no known format",
        hint='give {"context": "...", "choices": ["...", "..."], "answer": 0} on each line',
    )


def _is_sound(item: Item) -> bool:
    is_text = isinstance(item.context, str) and all(isinstance(c, str) and c.strip() for c in item.choices)
    return is_text and type(item.answer) is int and 0 <= item.answer < len(item.choices)


def _neutral(row: Mapping[str, Any]) -> Item | None:
    choices = row["choices"]
    return Item(row["context"], tuple(choices), row["answer"]) if isinstance(choices, list) else None


def _hellaswag(row: Mapping[str, Any]) -> Item | None:
    """The ending follows the context after a space (lm-eval-harness, task hellaswag)."""
    endings = row["choices"]
    if not isinstance(endings, list):
        return None
    return Item(row["ctx"], tuple(f" {ending}" for ending in endings), row["label"])


def _boolq(row: Mapping[str, Any]) -> Item | None:
    """The passage, the question, and no or yes (lm-eval-harness, task boolq)."""
    if not isinstance(row["label"], bool):
        return None
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return Item(context, (" no", " yes"), int(row["label"]))


def _arc(row: Mapping[str, Any]) -> Item | None:
    """The question alone, then each answer's text (lm-eval-harness, task arc_easy)."""
    question, *answers = re.split(r"\s*Answer\d+: ", str(row["instruction"]).split("\n\nAnswer format:")[0])
    question = question.removeprefix("Please choose the correct answer to the question: ")
    right = re.fullmatch(r"answer(\d+)", str(row["answer"]))
    if right is None:
        return None
    return Item(f"Question: {question}\nAnswer:", tuple(f" {a}" for a in answers), int(right[1]) - 1)


def _lambada(row: Mapping[str, Any]) -> Item | None:
    """All but the last word, which greedy decoding is to give (Paperno et al., arXiv 1606.06031)."""
    context, space, word = str(row["text"]).rstrip().rpartition(" ")
    return Item(context, (space + word,), 0) if space else None


_FORMATS: dict[frozenset[str], Callable[[Mapping[str, Any]], Item | None]] = {
    frozenset({"context", "choices", "answer"}): _neutral,
    frozenset({"ctx", "choices", "label"}): _hellaswag,
    frozenset({"question", "passage", "label"}): _boolq,
    frozenset({"instruction", "answer"}): _arc,
    frozenset({"text"}): _lambada,
}
