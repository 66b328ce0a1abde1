"""Task files: every format's question as the harness puts it, and refusals that name the item."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from taper.errors import UsageError
from taper.evaluate.tasks import Item, read_task

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "eval"

FORMATS = [
    (
        {"context": "The sky is", "choices": [" blue", " red"], "answer": 1},
        Item("The sky is", (" blue", " red"), 1),
    ),
    ({"ctx": "A man", "choices": ["sits.", "flies."], "label": 0}, Item("A man", (" sits.", " flies."), 0)),
    (
        {"question": "is it so", "passage": "It is.", "label": True},
        Item("It is.\nQuestion: is it so?\nAnswer:", (" no", " yes"), 1),
    ),
    (
        {
            "instruction": "Please choose the correct answer to the question: What?\n\n"
            "Answer1: this Answer2: that thing Answer3: those\n\nAnswer format: answer1/answer2/answer3",
            "input": "",
            "answer": "answer2",
        },
        Item("Question: What?\nAnswer:", (" this", " that thing", " those"), 1),
    ),
    ({"text": "I looked at\nthe sea "}, Item("I looked at\nthe", (" sea",), 0)),
]


@pytest.mark.parametrize(("row", "item"), FORMATS, ids=["neutral", "hellaswag", "boolq", "arc", "lambada"])
def test_formats(tmp_path: Path, row: dict[str, object], item: Item) -> None:
    path = tmp_path / "my-task.jsonl"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    task = read_task(path)
    assert (task.name, task.items) == ("my-task", (item, item))
    assert task.is_completion == (len(item.choices) == 1)


def test_a_list_and_xz_and_evenly_spaced_items(tmp_path: Path) -> None:
    rows = [{"context": str(i), "choices": ["a", "b"], "answer": 0} for i in range(11)]
    path = tmp_path / "list.json.xz"
    path.write_bytes(lzma.compress(json.dumps(rows).encode()))
    assert [item.context for item in read_task(path, 3).items] == ["0", "5", "10"]
    assert len(read_task(path, 50).items) == 11


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "item 1: its fields are of no known format"),
        ("[1]", "item 1: its fields"),
        ('{"context": "x", "choices": ["a"], "answer": 1}', "item 1: its answer, choices, context make no"),
        ('{"context": "x", "choices": ["a", " "], "answer": 0}', "make no question"),
        ('{"context": "x", "choices": "ab", "answer": 0}', "make no question"),
        ('{"context": "x", "choices": ["a", "b"], "answer": true}', "make no question"),
        ('{"text": "word"}', "its text make no question"),
        ("{", "is not JSON"),
    ],
)
def test_refusals(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_task(path)


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(
        "\n".join(json.dumps({"context": "x", "choices": c, "answer": 0}) for c in (["a"], ["a", "b"]))
    )
    with pytest.raises(UsageError, match="some items have one choice"):
        read_task(path)


@pytest.mark.skipif(not DATA.is_dir(), reason="no data sets beside the checkout")
@pytest.mark.parametrize("name", ["hellaswag-valid-2000", "arc-easy-test", "boolq-dev", "lambada-test"])
def test_data_sets_are_read_whole(name: str) -> None:
    (path,) = DATA.glob(f"{name}.*")
    task = read_task(path)
    assert len(task.items) >= 2000
    assert len({item.answer for item in task.items}) > 1 or task.is_completion
