"""`taper recommend`: one answer, or a clear refusal."""

from __future__ import annotations

import dataclasses
import json

import pytest

from taper.evaluate import footprint
from taper.formats.container import TaperFile
from taper.formats.writer import rewrite_header
from taper.testing.tiny import tiny_taper

CARD = {
    "text": "t.txt",
    "reference": "hf",
    "widths": [
        {"bits": bits, "increase_frac": 0.1**bits, "kl_mean": 0.3**bits, "top1_agreement": 0.9}
        for bits in (2, 3)
    ],
}


@pytest.fixture
def carded(tmp_path, monkeypatch):
    """A file of 2 to 4 bits with a card of two widths; the surplus is one MiB."""
    path = tiny_taper(tmp_path / "t.taper", 2, 4)
    rewrite_header(path, dataclasses.replace(TaperFile.open(path).header, card=CARD))
    monkeypatch.setattr(footprint, "measure_surplus", lambda path, decoder: 1 << 20)
    return path


def test_answers(taper, carded):
    outcome = taper("recommend", carded, "--max-loss", "2%")
    assert outcome.status == 0, outcome.err
    assert outcome.out.endswith(f"2 bits: taper run {carded} --bits 2\n")
    assert "256 tokens of context; loss against hf on t.txt" in outcome.out
    assert "4 bits: taper run" in taper("recommend", carded, "--memory", "2GiB").out
    assert "for one answer" in taper("recommend", carded).out
    record = json.loads(taper("recommend", carded, "--max-kl", "0.03", "--context", "8", "--json").out)
    assert (record["recommended_bits"], record["context_tokens"]) == (3, 8)
    assert record["limits"] == {"memory_bytes": None, "loss_frac": None, "kl": 0.03}


def test_refusals(taper, carded, cut_model):
    assert taper("recommend", carded, "--memory", "1MB").status == 4
    assert taper("recommend", carded, "--max-loss", "0.0001%").status == 4
    assert taper("recommend", carded, "--context", "257").status == 4
    assert "is not a share" in taper("recommend", carded, "--max-loss", "2").err
    outcome = taper("recommend", cut_model, "--max-loss", "2%")
    assert outcome.status == 2
    assert "no quality card" in outcome.err
    assert "cut off" in outcome.err
