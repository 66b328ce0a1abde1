"""`taper tune --activations` on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from taper.formats.container import TaperFile
from taper.testing.tiny import tiny_taper
from taper.tune import activations


@pytest.fixture
def long_text(tmp_path):
    words = np.random.default_rng(0).choice(["the ", "cat ", "sat ", "on ", "a ", "mat "], 40000)
    path = tmp_path / "long.txt"
    path.write_text("".join(words))
    return path


@pytest.fixture
def file(tmp_path):
    return tiny_taper(tmp_path / "tiny.taper", max_position_embeddings=128)


def test_bits_are_traced_tested_stored_and_used(taper, file, long_text):
    outcome = taper("tune", file, "--activations", "--text", long_text, "--max-loss", "5%")
    assert outcome.status == 0, outcome.err
    assert "  1  4 4 4 4  cost" in outcome.err
    assert "95 % bound" in outcome.out
    assert "times less bit operations" in outcome.out
    stored = TaperFile.open(file, verify=True).header.activations
    assert set(stored.bits) == {"qkv", "o", "gate_up", "down"}
    assert stored.evidence["search"] == "paper"
    assert "activations" in taper("inspect", file).out
    assert taper("run", file, "the cat", "--max-tokens", "3", "--json").status == 0


def test_dry_run_leaves_the_file_and_json_is_one_object(taper, file, long_text):
    before = file.read_bytes()
    search = ["--activations", "--search", "joint", "--text", long_text, "--max-loss", "5%"]
    outcome = taper("tune", file, *search, "--dry-run", "--json")
    record = json.loads(outcome.out)
    assert record["variables"][-2:] == ["keys", "values"]
    assert record["stored"]["evidence"]["search"] == "joint"
    assert file.read_bytes() == before


def test_without_a_text_the_model_writes_its_own_and_both_outputs_say_so(taper, file, long_text):
    plain = taper("tune", file, "--activations", "--max-loss", "50%", "--dry-run")
    assert plain.status == 0, plain.err
    assert "tokens of own text" in plain.out
    record = json.loads(taper("tune", file, "--activations", "--max-loss", "50%", "--dry-run", "--json").out)
    assert record["texts"] == record["stored"]["evidence"]["texts"] == ["own text"]
    given = taper("tune", file, "--activations", "--text", long_text, "--max-loss", "50%", "--dry-run")
    assert "tokens of long.txt" in given.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--activations", "--text", "x", "--prompts", "3"], "--prompts does not go with --activations"),
        (["--activations", "--text", "x", "--widths", "4,3"], "takes one whole width"),
        (["--learned", "--text", "x", "--text", "y"], "--learned takes one text, not 2"),
        (["--task", "x", "--text", "y"], "--text belongs to --learned"),
    ],
)
def test_options_that_do_not_fit_are_refused(taper, file, arguments, message):
    outcome = taper("tune", file, *arguments)
    assert outcome.status == 2
    assert message in outcome.err


def test_a_limit_that_nothing_holds_is_an_error_and_stores_nothing(taper, file, long_text, monkeypatch):
    monkeypatch.setattr(activations._Losses, "loss", lambda self, choice: 1.0)
    before = file.read_bytes()
    outcome = taper("tune", file, "--activations", "--text", long_text)
    assert outcome.status == 2
    assert "no combination is surely within the limit" in outcome.err
    assert file.read_bytes() == before
