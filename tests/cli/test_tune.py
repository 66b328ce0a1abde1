"""`taper tune` on the command line: it stores the winner with its evidence, or says why there is none."""

from __future__ import annotations

import json

import pytest

from taper.formats.container import TaperFile

SMALL = [
    *("--objective", "bits", "--widths", "8,6,4", "--segments", "2", "--search-prompts", "8"),
    *("--prompts", "24", "--prompt-tokens", "6", "--max-tokens", "8", "--max-loss", "20%"),
]


def test_winner_is_stored_and_runs_by_its_name(taper, untied, documents):
    before = TaperFile.open(untied)
    outcome = taper("tune", untied, "--task", documents, *SMALL)
    assert outcome.status == 0, outcome.err
    assert "reverse order" in outcome.out
    assert "uniform 8" in outcome.out
    after = TaperFile.open(untied, verify=True)
    policy = after.policies["words"]
    assert f"{policy} saves" in outcome.out
    evidence = after.provenance["tuned"]["words"]
    assert evidence["policy"] == policy
    assert evidence["loss_upper"] < 0.2
    assert after.tensor("embed.plane0").tobytes() == before.tensor("embed.plane0").tobytes()
    assert not list(untied.parent.glob("*.partial"))
    answer = taper("run", untied, "the cat", "--policy", "words", "--max-tokens", "3", "--json")
    assert json.loads(answer.out)["policy"] == policy
    assert "loss_upper" in taper("inspect", untied).out


def test_second_task_keeps_the_first(taper, untied, documents):
    for name in ("one", "two"):
        assert taper("tune", untied, "--task", f"{name}={documents}", *SMALL).status == 0
    found = TaperFile.open(untied)
    assert set(found.policies) == set(found.provenance["tuned"]) == {"one", "two"}


def test_dry_run_leaves_the_file_and_json_is_one_object(taper, untied, documents):
    raw = untied.read_bytes()
    outcome = taper("tune", untied, "--task", f"mine={documents}", *SMALL, "--dry-run", "--json")
    record = json.loads(outcome.out)
    assert record["task"] == "mine"
    assert record["winner"]["upper"] < record["max_loss"] == 0.2
    assert {row["role"] for row in record["controls"]} >= {"uniform 8", "uniform 4", "flat mix"}
    assert untied.read_bytes() == raw


def test_no_winner_is_said_and_nothing_stored(taper, untied, documents):
    outcome = taper("tune", untied, "--task", documents, *SMALL, "--max-loss", "0.0000001%")
    assert outcome.status == 0
    assert "no schedule holds the limit" in outcome.out
    assert TaperFile.open(untied).policies == {}


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("fixed={text}", "'fixed' cannot name a policy"),
        ("3rd={text}", "'3rd' cannot name a policy"),
        ("={text}", "'' cannot name a policy"),
        ("a={text}.none", "is not a file"),
    ],
)
def test_bad_tasks_are_refused(taper, untied, documents, task, reason):
    outcome = taper("tune", untied, "--task", task.format(text=documents), *SMALL)
    assert outcome.status == 2
    assert reason in outcome.err


def test_cut_file_is_refused_before_the_search(taper, cut_model, documents):
    outcome = taper("tune", cut_model, "--task", documents, *SMALL)
    assert outcome.status == 5
    assert "is cut off" in outcome.err
