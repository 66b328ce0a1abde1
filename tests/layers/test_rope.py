"""RoPE variants against transformers' own numbers, tables that grow, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taper.config import ModelConfig, RopeConfig
from taper.errors import UsageError
from taper.formats.huggingface import HfCheckpoint
from taper.layers.rope import FIRST_TABLE_TOKENS, Rope, context_length, rotary_frequencies
from taper.testing.checkpoints import write_checkpoint
from taper.testing.parity_cases import GOLDEN_CASES, ParityCase

GOLDENS = Path(__file__).parent.parent / "goldens"

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=11,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    tie_word_embeddings=True,
)


def with_rope(variant: str, **parameters: Any) -> ModelConfig:
    return dataclasses.replace(CONFIG, rope=RopeConfig(variant=variant, parameters=parameters))


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: case.name)
def test_frequencies_and_attention_factor_are_those_of_transformers(case: ParityCase, tmp_path: Path) -> None:
    config = HfCheckpoint.open(write_checkpoint(tmp_path, case.hf_config)).config
    inv_freq, attention_factor = rotary_frequencies(config, case.num_tokens)
    golden = np.load(GOLDENS / "rope.npz")[case.name]
    assert inv_freq.dtype == np.float64
    # transformers rounds each of a handful of steps to float32, half a unit of 2**-23 each.
    np.testing.assert_allclose(inv_freq, golden[:-1], rtol=16 * 2**-24, atol=0)
    assert attention_factor == pytest.approx(float(golden[-1]), rel=2**-23)


def test_longrope_chooses_its_factors_by_the_capacity() -> None:
    config = with_rope(
        "longrope", original_max_position_embeddings=100, short_factor=[1.0] * 4, long_factor=[2.0] * 4
    )
    short, _ = rotary_frequencies(config, 100)
    long, _ = rotary_frequencies(config, 101)
    np.testing.assert_array_equal(short, 2 * long)
    rope = Rope(config)
    assert not np.array_equal(rope.tables(50, 100)[0][:50], rope.tables(50, 101)[0][:50])


def test_tables_grow_with_the_sequence_and_rows_never_change() -> None:
    rope = Rope(CONFIG)
    first_cos, first_sin = rope.tables(3, capacity=4096)
    assert first_cos.shape == (FIRST_TABLE_TOKENS, CONFIG.head_dim // 2)
    assert rope.tables(FIRST_TABLE_TOKENS, capacity=4096)[0] is first_cos
    cos, sin = rope.tables(FIRST_TABLE_TOKENS + 1, capacity=4096)
    assert cos.shape[0] == 2 * FIRST_TABLE_TOKENS
    np.testing.assert_array_equal(cos[:FIRST_TABLE_TOKENS], first_cos)
    np.testing.assert_array_equal(sin[:FIRST_TABLE_TOKENS], first_sin)


def test_tables_end_at_the_capacity() -> None:
    assert Rope(CONFIG).tables(3, capacity=20)[0].shape[0] == 20


def test_tables_of_a_second_longer_sequence_reach_its_tokens() -> None:
    rope = Rope(CONFIG)
    rope.tables(20, capacity=20)
    assert rope.tables(300, capacity=4096)[0].shape[0] >= 300


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CONFIG, 4096),
        (with_rope("dynamic", factor=2.0), 4096),
        (with_rope("linear", factor=2.5), 10240),
        (with_rope("yarn", factor=4.0, original_max_position_embeddings=4096), 16384),
        (with_rope("yarn", factor=4.0, original_max_position_embeddings=1024), 4096),
        (with_rope("llama3", factor=8.0, original_max_position_embeddings=1024), 4096),
    ],
    ids=["default", "dynamic", "linear", "yarn_extends", "yarn_extended", "llama3"],
)
def test_context_length_is_where_the_variant_stops_being_defined(config: ModelConfig, expected: int) -> None:
    assert context_length(config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_rope("spiral"), "rope variant 'spiral' is not known; known are default, linear"),
        (with_rope("linear"), "rope variant linear needs the number factor, found None"),
        (with_rope("llama3", factor="8"), "rope variant llama3 needs the number factor, found '8'"),
        (with_rope("longrope", short_factor=[1.0] * 3), "short_factor has 3 values, head_dim / 2 is 4"),
        (with_rope("default", partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not 1"),
    ],
    ids=["unknown", "missing", "not_a_number", "wrong_length", "partial"],
)
def test_a_variant_that_cannot_be_computed_is_refused_on_opening(config: ModelConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refusal:
        Rope(config)
    assert refusal.value.hint
