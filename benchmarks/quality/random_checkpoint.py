"""Random bf16 checkpoints of a shape, for benchmarks of the quantiser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from taper.config import ModelConfig
from taper.formats.huggingface import expected_tensors
from taper.testing.tiny import hf_config_json

WEIGHTS_OF_A_CALL = 1 << 22  # 16 MiB of float32
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>")


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest bf16 of finite values, ties to even, as its bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def tensor_parts(name: str, shape: tuple[int, ...], seed: int) -> Iterator[NDArray[np.uint16]]:
    """The bits of a tensor, some rows at a time: norm gains spread over 0.5 to 1.5, matrices whose columns
    differ in size as those of trained models do (log-normal, 0.3), biases near 0.
    """
    generator = np.random.default_rng([seed, *name.encode()])
    if len(shape) == 1:
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        yield to_bf16((centre + generator.uniform(-0.5, 0.5, shape)).astype(np.float32))
        return
    columns = np.exp(0.3 * generator.standard_normal(shape[1])) * (
        1.0 if "embed" in name else shape[1] ** -0.5
    )
    rows = max(1, WEIGHTS_OF_A_CALL // shape[1])
    for begin in range(0, shape[0], rows):
        size = (min(rows, shape[0] - begin), shape[1])
        yield to_bf16(generator.standard_normal(size, dtype=np.float32) * columns.astype(np.float32))


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], seed: int) -> int:
    """One safetensors file of random bf16 tensors, streamed. Returns the bytes of its tensors."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            for part in tensor_parts(name, shape, seed):
                file.write(part.tobytes())
    return end


def write_checkpoint(folder: Path, config: ModelConfig, text: str, seed: int) -> None:
    """A checkpoint folder with a shard a layer; it appears whole or not at all."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in expected_tensors(config):
        words = name.split(".")
        key = f"layer-{words[2]}" if words[1] == "layers" else words[0] if words[0] == "lm_head" else words[1]
        shards.setdefault(f"{key}.safetensors", []).append((name, shape))
    total = sum(write_shard(partial / key, tensors, seed) for key, tensors in shards.items())
    weight_map = {name: key for key, tensors in shards.items() for name, _ in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    (partial / "config.json").write_text(json.dumps(hf_config_json(config), indent=1))
    (partial / "tokenizer.json").write_text(tokenizer_json(text, config.vocab_size), encoding="utf-8")
    partial.rename(folder)


def tokenizer_json(text: str, vocab_size: int) -> str:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, trained on a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return str(tokenizer.to_str())
