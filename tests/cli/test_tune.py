"""`taper tune` on the command line: it stores the winner with its evidence, or says why there is none."""

from __future__ import annotations

import json

import numpy as np
import pytest

from taper.formats.container import TaperFile
from taper.testing.tiny import tiny_taper

SMALL = [
    *("--objective", "bits", "--widths", "8,6,4", "--segments", "2", "--search-prompts", "8"),
    *("--prompts", "24", "--prompt-tokens", "6", "--max-tokens", "8", "--max-loss", "20%"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    random = np.random.default_rng(5)
    words = ["the", "cat", "hat", "in", "on", "and", "man", "ring", "stone", "is", "was", "old"]
    path = tmp_path_factory.mktemp("text") / "words.part.txt"
    documents = [" ".join(random.choice(words, 40)) for _ in range(40)]
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


@pytest.fixture
def file(tmp_path):
    return tiny_taper(tmp_path / "tiny.taper", tie_word_embeddings=False)


def test_winner_is_stored_and_runs_by_its_name(taper, file, text):
    before = TaperFile.open(file)
    outcome = taper("tune", file, "--task", text, *SMALL)
    assert outcome.status == 0, outcome.err
    assert "reverse order" in outcome.out
    assert "uniform 8" in outcome.out
    after = TaperFile.open(file, verify=True)
    policy = after.policies["words"]
    assert f"{policy} saves" in outcome.out
    evidence = after.provenance["tuned"]["words"]
    assert evidence["policy"] == policy
    assert evidence["loss_upper"] < 0.2
    assert after.tensor("embed.plane0").tobytes() == before.tensor("embed.plane0").tobytes()
    assert not list(file.parent.glob("*.partial"))
    answer = taper("run", file, "the cat", "--policy", "words", "--max-tokens", "3", "--json")
    assert json.loads(answer.out)["policy"] == policy
    assert "loss_upper" in taper("inspect", file).out


def test_second_task_keeps_the_first(taper, file, text):
    for name in ("one", "two"):
        assert taper("tune", file, "--task", f"{name}={text}", *SMALL).status == 0
    found = TaperFile.open(file)
    assert set(found.policies) == set(found.provenance["tuned"]) == {"one", "two"}


def test_dry_run_leaves_the_file_and_json_is_one_object(taper, file, text):
    raw = file.read_bytes()
    outcome = taper("tune", file, "--task", f"mine={text}", *SMALL, "--dry-run", "--json")
    record = json.loads(outcome.out)
    assert record["task"] == "mine"
    assert record["winner"]["upper"] < record["max_loss"] == 0.2
    assert {row["role"] for row in record["controls"]} >= {"uniform 8", "uniform 4", "flat mix"}
    assert file.read_bytes() == raw


def test_no_winner_is_said_and_nothing_stored(taper, file, text):
    outcome = taper("tune", file, "--task", text, *SMALL, "--max-loss", "0.0000001%")
    assert outcome.status == 0
    assert "no schedule holds the limit" in outcome.out
    assert TaperFile.open(file).policies == {}


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("fixed={text}", "'fixed' cannot name a policy"),
        ("3rd={text}", "'3rd' cannot name a policy"),
        ("={text}", "'' cannot name a policy"),
        ("a={text}.none", "is not a file"),
    ],
)
def test_bad_tasks_are_refused(taper, file, text, task, reason):
    outcome = taper("tune", file, "--task", task.format(text=text), *SMALL)
    assert outcome.status == 2
    assert reason in outcome.err


def test_cut_file_is_refused_before_the_search(taper, cut_model, text):
    outcome = taper("tune", cut_model, "--task", text, *SMALL)
    assert outcome.status == 5
    assert "is cut off" in outcome.err
