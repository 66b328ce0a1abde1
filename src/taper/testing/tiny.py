"""Tiny models for tests: no downloads, no training, a real tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from taper.config import ModelConfig
from taper.formats.huggingface import expected_tensors
from taper.testing.random_model import SHAPES, write_random_model

F32 = npt.NDArray[np.float32]

TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL_TOKENS = ("<|bos|>", "<|eos|>")
# Pairs that merge, in order; "Ġ" is a space in the byte-level alphabet.
_MERGES = (
    "Ġ t", "h e", "Ġ a", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "Ġ w", "Ġ o", "e n", "i t", "o u",
    "e s", "o r", "Ġ c", "i s", "a n", "Ġ f", "Ġ in", "a l", "Ġ b", "e d", "in g", "Ġ m", "Ġ p", "a r",
    "Ġo f", "Ġa n", "l e", "r o", "Ġ d", "Ġan d", "Ġ h", "o m", "i c", "Ġt o", "s t", "a s", "l l",
)  # fmt: skip


def tiny_config(**overrides: Any) -> ModelConfig:
    """Two layers, hidden 96, 6 heads over 2 KV heads, FFN 80, 300 tokens, tied; with fields replaced."""
    return dataclasses.replace(SHAPES["tiny"], **overrides)


def tiny_tokenizer_json() -> str:
    """A byte-level BPE tokenizer of 300 tokens: <|bos|> is 0, <|eos|> is 1, then 256 bytes, then merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(left, right) for left, right in (merge.split() for merge in _MERGES)]
    tokens = [*_SPECIAL_TOKENS, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL_TOKENS])
    return str(tokenizer.to_str())


def tiny_taper(
    path: Path, min_bits: int = 2, max_bits: int = 8, seed: int = 0, chat: bool = False, **overrides: Any
) -> Path:
    """Write a tiny random `.taper` file with a tokenizer; returns its path."""
    write_random_model(
        path,
        tiny_config(**overrides),
        min_bits,
        max_bits,
        seed,
        tokenizer_json=tiny_tokenizer_json(),
        chat_template=TINY_CHAT_TEMPLATE if chat else None,
    )
    return path


def tiny_hf_dir(path: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny Hugging Face checkpoint (one float32 safetensors file) into a new folder; returns the
    folder."""
    config = tiny_config(**overrides)
    path.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    tensors = {name: _weight(generator, name, shape) for name, shape in expected_tensors(config)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(hf_config_json(config), indent=2))
    (path / "tokenizer.json").write_text(tiny_tokenizer_json(), encoding="utf-8")
    return path


def hf_config_json(config: ModelConfig) -> dict[str, Any]:
    """The config.json, in transformers' spelling, that reads back as `config`."""
    raw: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    if config.rope.variant != "default":
        raw["rope_scaling"] = {"rope_type": config.rope.variant, **config.rope.parameters}
    return raw


def _weight(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> F32:
    """Norm gains near 1, biases near 0, matrices that keep the activations' size."""
    values = generator.standard_normal(shape).astype(np.float32)
    if len(shape) == 2:
        return values * np.float32(shape[1] ** -0.5)
    centre = 1 if name.endswith("norm.weight") else 0
    return np.float32(centre) + np.float32(0.1) * values
