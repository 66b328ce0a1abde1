"""`taper tune --learned` on the command line: it stores a scheduler that runs by its name."""

from __future__ import annotations

import json

import pytest

from taper.formats.container import TaperFile
from taper.testing.tiny import tiny_taper

SMALL = [
    *("--learned", "--widths", "8,4,2", "--segments", "3", "--prompts", "20"),
    *("--prompt-tokens", "12", "--max-tokens", "8"),
]


def test_scheduler_is_stored_and_runs_by_its_name(taper, untied, documents):
    before = TaperFile.open(untied)
    outcome = taper("tune", untied, "--text", documents, *SMALL)
    assert outcome.status == 0, outcome.err
    assert "8 to 4" in outcome.out
    assert "4 to 2" in outcome.out
    after = TaperFile.open(untied, verify=True)
    learned = after.learned
    assert (learned.widths, learned.prefill_bits, learned.num_segments) == ((8, 4, 2), 8, 3)
    assert learned.record["text"] == "words.part.txt"
    assert [sum(pair["label_counts"]) for pair in learned.record["pairs"]] == [20, 20]
    assert after.tensor("embed.plane0").tobytes() == before.tensor("embed.plane0").tobytes()
    assert "label_counts" in taper("inspect", untied).out
    answer = json.loads(
        taper("run", untied, "the cat", "--policy", "learned", "--max-tokens", "8", "--json").out
    )
    bits = [token["bits"] for token in answer["tokens"]]
    assert answer["policy"] == "learned"
    assert bits == sorted(bits, reverse=True)


def test_dry_run_leaves_the_file_and_json_is_one_object(taper, untied, documents):
    before = untied.read_bytes()
    outcome = taper("tune", untied, "--text", documents, *SMALL, "--dry-run", "--json")
    assert json.loads(outcome.out)["widths"] == [8, 4, 2]
    assert untied.read_bytes() == before


def test_same_seed_gives_the_same_file(taper, untied, documents, tmp_path):
    other = tiny_taper(tmp_path / "other.taper", tie_word_embeddings=False)
    for path in (untied, other):
        assert taper("tune", path, "--text", documents, *SMALL).status == 0
    assert untied.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--learned"], "--learned needs a text"),
        (["--learned", "--text", "TEXT", "--max-loss", "1%"], "--max-loss does not go with --learned"),
        (["--learned", "--text", "TEXT", "--widths", "2,4"], "do not fall"),
        (["--learned", "--text", "TEXT", "--widths", "9,4"], "9 bits are asked for; this model holds 2 to 8"),
        (["--text", "TEXT"], "--text belongs to --learned"),
        ([], "--task says what to tune for"),
    ],
)
def test_wrong_options_change_nothing(taper, untied, documents, options, reason):
    before = untied.read_bytes()
    outcome = taper("tune", untied, *[str(documents) if option == "TEXT" else option for option in options])
    assert outcome.status == 2
    assert reason in outcome.err
    assert untied.read_bytes() == before
