"""`taper inspect`: sizes that count everything, truncation, verification."""

from __future__ import annotations

import json

import pytest

from taper.testing.tiny import tiny_taper


def test_widths_count_every_byte_of_the_prefix(taper, model):
    outcome = taper("inspect", model, "--json")
    assert outcome.status == 0
    shown = json.loads(outcome.out)
    assert [width["bits"] for width in shown["widths"]] == [2, 3, 4, 5, 6, 7, 8]
    assert shown["widths"][-1]["bytes"] == model.stat().st_size == shown["file_bytes"]
    step = shown["widths"][-1]["bytes"] - shown["widths"][-2]["bytes"]
    layer = (160 + 96) * 128 + 160 * 128 + 96 * 128
    assert step == pytest.approx(
        (300 * 128 + 2 * layer) / 8, abs=64 * 9
    )  # plane 8 and at most 63 bytes of pads each
    assert shown["widths"][0]["bpw"] == 8 * shown["widths"][0]["bytes"] / shown["num_weights"]
    assert shown["damaged"] is None


def test_text_names_the_model(taper, model):
    outcome = taper("inspect", model, "--verify")
    assert outcome.status == 0
    for line in ("LlamaForCausalLM, 124,032 weights", "6 heads, 2 KV heads", "all match", "method: random"):
        assert line in outcome.out
    assert "quality       no card (taper eval" in outcome.out
    assert outcome.err == ""


def test_cut_off_file_says_so(taper, cut_model):
    outcome = taper("inspect", cut_model)
    assert outcome.status == 0
    assert "4 of 8 planes are whole" in outcome.err
    assert "planes        4 of 8" in outcome.out


def test_damage_is_shown_and_has_status_5(taper, tmp_path):
    path = tiny_taper(tmp_path / "damaged.taper", 2, 3)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert taper("inspect", path).status == 0
    outcome = taper("inspect", path, "--verify")
    assert outcome.status == 5
    assert "layers.1.down.plane2" in outcome.err
    assert "checksums     damaged" in outcome.out
