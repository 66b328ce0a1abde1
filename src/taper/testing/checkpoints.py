"""Random Hugging Face checkpoints: a config.json and weights that a seed and NumPy alone make again."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from taper.formats.hf_config import parse_config
from taper.formats.huggingface import expected_tensors

F32 = npt.NDArray[np.float32]
HfConfig = dict[str, Any]

TINY_LLAMA: HfConfig = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_checkpoint(folder: Path, hf_config: HfConfig, seed: int = 0, num_shards: int = 1) -> Path:
    """Write config.json and float32 shards, with an index where there are several; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config, indent=1), encoding="utf-8")
    tensors = random_tensors(hf_config, seed)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        names = sorted(tensors)[shard::num_shards]
        save_file({key: tensors[key] for key in names}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def random_tensors(hf_config: HfConfig, seed: int) -> dict[str, F32]:
    """Every tensor: matrices that keep the variance, norm gains 0.5..1.5, biases within +-0.5."""
    config = parse_config(hf_config, {})
    return {name: _random_tensor(name, shape, seed) for name, shape in expected_tensors(config)}


def random_tokens(hf_config: HfConfig, num_tokens: int, seed: int) -> npt.NDArray[np.int32]:
    """Token ids over the whole vocabulary, int32 (num_tokens,)."""
    raw = np.random.PCG64(seed).random_raw(num_tokens)
    return (raw % np.uint64(hf_config["vocab_size"])).astype(np.int32)


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> F32:
    # The bit stream of PCG64 is fixed for ever; NumPy's distributions may change, and the goldens with them.
    raw = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(math.prod(shape))
    unit = ((raw >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)
    if "norm" in name:
        return unit * np.float32(0.5) + np.float32(1)
    if name.endswith(".bias"):
        return unit * np.float32(0.5)
    return unit if "embed" in name else unit * np.float32(math.sqrt(3 / shape[1]))
