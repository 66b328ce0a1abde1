"""Model shapes on which the float path is compared with transformers, live and through the goldens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from taper.testing.checkpoints import TINY_LLAMA, HfConfig

# Allowed difference to transformers as a share of the largest logit. Two float32 runs that sum in another
# order differ by 4e-7 to 2e-6 on these shapes; a wrong frequency, gain or mask by more than 1e-2.
TOLERANCE = 1e-4

_YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 16,
    # Uneven factors, so that a wrong index or a swapped list shows.
    "short_factor": [1.0, 1.1, 1.25, 1.3, 1.5, 1.9],
    "long_factor": [1.0, 1.7, 2.5, 4.1, 6.0, 8.0],
}


@dataclass(frozen=True, slots=True)
class ParityCase:
    """One configuration, as config.json holds it, and how many tokens of it are compared."""

    name: str
    hf_config: HfConfig
    num_tokens: int = 24
    seed: int = 0


def _llama(name: str, num_tokens: int = 24, **changes: Any) -> ParityCase:
    return ParityCase(name, TINY_LLAMA | changes, num_tokens)


def _rope(name: str, parameters: dict[str, Any], num_tokens: int = 24, **changes: Any) -> ParityCase:
    """A scaling variant in the older spelling, `rope_scaling` beside `rope_theta`."""
    return _llama(name, num_tokens, rope_scaling=parameters, **changes)


def _longrope(name: str, num_tokens: int, **parameters: Any) -> ParityCase:
    return _rope(name, _LONGROPE | parameters, num_tokens)


# The newer spelling: theta only inside `rope_parameters`.
_NEW_SPELLING = {key: value for key, value in TINY_LLAMA.items() if key != "rope_theta"} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}
}

GOLDEN_CASES: tuple[ParityCase, ...] = (
    _llama("gqa"),
    _llama("mha_tied", num_key_value_heads=4, tie_word_embeddings=True),
    _llama("mqa", num_key_value_heads=1, rms_norm_eps=1e-6),
    _llama("wide_heads", head_dim=20, rms_norm_eps=1e-3),
    _llama("narrow_heads", head_dim=6, num_attention_heads=6, num_key_value_heads=3),
    _llama("biases", attention_bias=True, mlp_bias=True, vocab_size=101),
    ParityCase("rope_parameters", _NEW_SPELLING),
    _rope("linear", {"rope_type": "linear", "factor": 2.5}),
    _rope("linear_old_key", {"type": "linear", "factor": 4.0}),
    _rope("dynamic", {"rope_type": "dynamic", "factor": 2.0}),
    _rope("yarn", _YARN),
    _rope("yarn_mscale", _YARN | {"mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 8.0, "beta_slow": 0.5}),
    _rope("yarn_untruncated", _YARN | {"truncate": False, "attention_factor": 1.3}),
    _rope(
        "llama3",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    _longrope("longrope_short", 12),
    _longrope("longrope_long", 24),
    _longrope("longrope_factors", 24, factor=3.0, attention_factor=1.15),
    ParityCase(
        "mistral",
        TINY_LLAMA
        | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    ),
    ParityCase(
        "qwen2",
        TINY_LLAMA
        | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
        | {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0},
    ),
)

LIVE_CASES: tuple[ParityCase, ...] = (
    _llama("long_sequence", 600, max_position_embeddings=1024),
    _llama("deep", 40, num_hidden_layers=12),
    _llama(
        "embedded_shape",
        200,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=4096,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    ),
    _llama(
        "llama_32_shape",
        80,
        hidden_size=512,
        intermediate_size=1376,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=1031,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    _rope("yarn_long", _YARN | {"factor": 8.0}, 120, max_position_embeddings=128),
)


def golden_positions(case: ParityCase) -> list[int]:
    """The token positions whose logits the goldens hold."""
    return [0, 1, case.num_tokens // 2, case.num_tokens - 1]
