"""Prompts come from documents, are followed by what followed them, and split without a common document."""

from __future__ import annotations

import json
import lzma

import pytest

from taper.errors import UsageError
from taper.tune.prompts import SUMMARY_INSTRUCTION, read_prompts


def document(number: int, words: int) -> str:
    return " ".join(f"w{number}x{word}" for word in range(words))


def text_file(folder, sizes):
    path = folder / "task.txt.xz"
    documents = [document(number, words) for number, words in enumerate(sizes)]
    path.write_bytes(lzma.compress("\n<|endoftext|>\n".join(documents).encode()))
    return path


def read(path, tokenizer, num_prompts, prompt_tokens=8, max_tokens=12, seed=0):
    return read_prompts(
        path,
        tokenizer,
        name="t",
        num_prompts=num_prompts,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        seed=seed,
    )


def test_beginnings_of_documents_with_what_follows(tokenizer, tmp_path):
    path = text_file(tmp_path, [2, 40, 50, 3, 60])
    found = read(path, tokenizer, 3)
    assert sorted(found.documents) == [1, 2, 4]
    for prompt, reference, number in zip(found.prompts, found.references, found.documents, strict=True):
        ids = tokenizer.encode(document(number, 60 if number == 4 else 40), special_tokens=False)
        assert list(prompt) == ids[:8]
        assert list(reference) == ids[8:20]


def test_too_few_documents_give_passages_from_within_that_do_not_overlap(tokenizer, tmp_path):
    path = text_file(tmp_path, [40, 50])
    found = read(path, tokenizer, 6)
    assert set(found.documents) == {0, 1}
    pieces = {
        (*prompt, *reference) for prompt, reference in zip(found.prompts, found.references, strict=True)
    }
    assert len(pieces) == 6
    first, rest = found.split(0.5)
    assert set(first.documents).isdisjoint(rest.documents)
    assert len(first) + len(rest) == 6


def test_text_without_marks_is_cut_into_passages_of_their_own(tokenizer, tmp_path):
    found = read(text_file(tmp_path, [200]), tokenizer, 10)
    assert found.num_documents == 10
    first, rest = found.split(0.3)
    assert (len(first), len(rest)) == (3, 7)
    assert not set(first.documents) & set(rest.documents)
    assert first.prompts + rest.prompts == found.prompts


def test_seed_chooses(tokenizer, tmp_path):
    path = text_file(tmp_path, [40] * 20)
    assert read(path, tokenizer, 5) == read(path, tokenizer, 5)
    assert read(path, tokenizer, 5).documents != read(path, tokenizer, 5, seed=1).documents


def test_json_lines(tokenizer, tmp_path):
    path = tmp_path / "task.jsonl"
    rows = [
        {"prompt": "the man", "reference": " and the woman"},
        {"prompt": "on"},
        {"dialogue": "A: hello", "summary": "They meet."},
        {"question": "how", "answer": "so"},
        {"prompt": "x" * 500},
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    found = read(path, tokenizer, 4, prompt_tokens=100)
    texts = {
        tokenizer.decode(prompt): tokenizer.decode(reference)
        for prompt, reference in zip(found.prompts, found.references, strict=True)
    }
    assert texts["the man"] == " and the woman"[: len(texts["the man"])]
    assert texts["on"] == ""
    assert texts[f"{SUMMARY_INSTRUCTION}\n\nA: hello\n\nSummary:"].startswith(" They")
    assert texts["Question: how\nAnswer:"] == " so"
    assert all(len(reference) <= 12 for reference in found.references)
    with pytest.raises(UsageError, match="has 4 prompts of 100 tokens"):
        read(path, tokenizer, 5, prompt_tokens=100)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1: its fields are of no known format"),
        ('{"text": "x"}', "line 1: its fields are of no known format"),
        ('{"prompt": 3}', "line 1: its fields are of no known format"),
    ],
)
def test_bad_lines_say_which(tokenizer, tmp_path, line, reason):
    path = tmp_path / "task.jsonl"
    path.write_text(line)
    with pytest.raises(UsageError, match=reason):
        read(path, tokenizer, 1)


def test_bad_counts_are_refused(tokenizer, tmp_path):
    path = text_file(tmp_path, [40, 40])
    for counts in ({"num_prompts": 0}, {"prompt_tokens": 0}, {"max_tokens": 0}):
        with pytest.raises(UsageError, match="it must be at least 1"):
            read(path, tokenizer, **({"num_prompts": 1} | counts))
    with pytest.raises(UsageError, match="1 documents cannot be split"):
        read(path, tokenizer, 1).split(0.5)
