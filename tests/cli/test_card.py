"""The card from `taper quantize` to `taper inspect`."""

from __future__ import annotations

import json

import numpy as np
import pytest

import taper.evaluate.card as card_module
from taper.formats.container import TaperFile
from taper.testing.tiny import tiny_hf_dir


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Long enough to have gaps between the calibration passages: a gap is 30,000 characters."""
    words = np.random.default_rng(0).choice(["the", "sea", "of", "rain", "and", "stone"], 15_000)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """Three windows say as much here as sixteen."""
    monkeypatch.setattr(card_module, "_MAX_BLOCKS", 3)


@pytest.fixture
def folder(tmp_path):
    return tiny_hf_dir(tmp_path / "hf", num_layers=1)


def arguments(folder, out, text, *more):
    return ("quantize", folder, "-o", out, "--bits", "2-3", "--calibration", text,
            "--calibration-tokens", "512", *more)  # fmt: skip


def test_quantize_measures_every_width(taper, tmp_path, folder, text):
    out = tmp_path / "out.taper"
    outcome = taper(*arguments(folder, out, text))
    assert outcome.status == 0, outcome.err
    card = TaperFile.open(out, verify=True).card
    assert [width["bits"] for width in card["widths"]] == [2, 3]
    assert (card["reference"], card["text"], card["date"]) == ("hf", "text.txt, not calibrated on", None)
    assert [width["total_bytes"] for width in card["widths"]][-1] == out.stat().st_size
    assert card["widths"][0]["kl_mean"] > card["widths"][1]["kl_mean"] > 0
    assert card["widths"][0]["kl_mean_se"] > 0
    shown = taper("inspect", out).out
    assert "127 tokens scored; 381 tokens of text.txt, not calibrated on; against hf" in shown
    assert "99.9 %" in shown
    options = ("--text", text, "--against", folder, "--max-blocks", "2")
    outcome = taper("eval", out, *options, "--bits", "2,2.5", "--generation", "1", "--write-card")
    assert outcome.status == 0, outcome.err
    widths = TaperFile.open(out, verify=True).card["widths"]
    assert [width["bits"] for width in widths] == [2, 2.5]
    assert 2 < widths[1]["bits_per_weight"] <= 2.5
    assert widths[0]["total_bytes"] < widths[1]["total_bytes"] < out.stat().st_size


def test_stopped_in_the_card_then_resumed_gives_the_same_bytes(taper, tmp_path, folder, text, monkeypatch):
    whole, stopped = tmp_path / "whole.taper", tmp_path / "stopped.taper"
    assert taper(*arguments(folder, whole, text)).status == 0
    original = card_module.measure_blocks

    def interrupted(readers, blocks, has_reference, progress):
        progress(1, 2, 0.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(card_module, "measure_blocks", interrupted)
    outcome = taper(*arguments(folder, stopped, text))
    assert outcome.status == 130
    assert (tmp_path / "stopped.taper.partial").is_dir()
    assert TaperFile.open(stopped, verify=True).card == {}
    monkeypatch.setattr(card_module, "measure_blocks", original)
    assert taper(*arguments(folder, stopped, text)).status == 0
    assert stopped.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "stopped.taper.partial").exists()


def test_no_card_and_why(taper, tmp_path, folder, text):
    out = tmp_path / "out.taper"
    assert taper(*arguments(folder, out, text, "--no-card")).status == 0
    assert TaperFile.open(out).card == {}
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:5000])
    outcome = taper(*arguments(folder, out, short))
    assert outcome.status == 0
    assert "no quality card: calibration reads the whole text" in outcome.err
    outcome = taper(*arguments(folder, out, short, "--card-text", text))
    assert TaperFile.open(out).card["text"] == "text.txt"


def test_the_date_is_the_sources(taper, tmp_path, folder, text, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    out = tmp_path / "out.taper"
    assert taper(*arguments(folder, out, text)).status == 0
    assert TaperFile.open(out).card["date"] == "2023-11-14"
    assert json.loads(taper("inspect", out, "--json").out)["card"]["date"] == "2023-11-14"


def test_what_the_card_cannot_use_is_refused_before_the_work(taper, tmp_path, folder, text, monkeypatch):
    out = tmp_path / "out.taper"
    outcome = taper(*arguments(folder, out, text, "--card-text", tmp_path / "none.txt"))
    assert (outcome.status, out.exists()) == (2, False)
    assert "none.txt is not a file" in outcome.err
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    outcome = taper(*arguments(folder, out, text))
    assert (outcome.status, out.exists()) == (2, False)
    assert "SOURCE_DATE_EPOCH is 'yesterday'" in outcome.err
