"""benchmarks/quality/quantize_cost.py without running the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from quantize_cost import StageClock, checkpoint_bytes
from random_checkpoint import to_bf16, write_checkpoint

from taper.formats.huggingface import HfCheckpoint
from taper.quantize.calibrate import sample_tokens
from taper.testing.tiny import tiny_config


def test_bf16_is_the_nearest_with_ties_to_even() -> None:
    step = 2.0**-7  # of bf16 from 1 to 2
    values = np.array([1.0, 1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -3.0], dtype=np.float32)
    rounded = (to_bf16(values).astype(np.uint32) << 16).view(np.float32)
    assert rounded.tolist() == [1.0, 1.0, 1 + 2 * step, 1 + step, -3.0]


def test_time_goes_to_the_stage_that_shows() -> None:
    clock = StageClock()
    clock.count(1.0, 0.5, 100)
    clock.see(b"\x1b[2Kquantize: calibrate layers.0 \x1b[38m---")
    clock.count(2.0, 3.0, 300)
    clock.count(1.0, 1.0, 200)
    clock.see(b"quantize: card, block 1 of")  # cut where the terminal's buffer ends
    clock.count(4.0, 1.0, 50)
    assert clock.seconds == {"start": 1.0, "calibrate": 3.0, "card": 4.0}
    assert clock.cpu_s == {"start": 0.5, "calibrate": 4.0, "card": 1.0}
    assert clock.peak_bytes == {"start": 100, "calibrate": 300, "card": 50}
    assert clock.matrices["calibrate layers.0"] == 3.0


def test_a_name_that_comes_in_two_parts_is_seen() -> None:
    clock = StageClock()
    clock.see(b"quantize: sol")
    clock.see(b"ve layers.1.down \x1b")
    assert clock.name == "solve layers.1.down"


def test_the_checkpoint_opens_and_its_tokenizer_reads(tmp_path: Path) -> None:
    config = tiny_config()
    text = "The cost of a thing is the amount of life that is exchanged for it. " * 40
    write_checkpoint(tmp_path / "model", config, text, seed=0)
    checkpoint = HfCheckpoint.open(tmp_path / "model")
    assert checkpoint.config == config
    weight = checkpoint.tensor("model.layers.0.mlp.down_proj.weight")
    assert 0.5 < np.sqrt(np.mean(weight**2) * weight.shape[1]) < 2.0
    tokens = sample_tokens(checkpoint, text, 64)
    assert tokens.size >= 2
    assert tokens.max() < config.vocab_size
    # 300 tokens, 96 wide, tied; a layer has qkv 160 rows, o 96, gate and up 160, down 96 of 80; 5 norms
    weights = 300 * 96 + 2 * (160 * 96 + 96 * 96 + 160 * 96 + 96 * 80) + 5 * 96
    assert checkpoint_bytes(tmp_path / "model") == 2 * weights
