"""Reader of a Hugging Face checkpoint folder: configuration, tokenizer, float weights in one or many
safetensors."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from taper.config import ModelConfig
from taper.errors import CorruptFileError, ModelNotFoundError, UsageError
from taper.formats.hf_config import parse_config
from taper.formats.safetensors_header import TensorEntry, read_header

F32 = npt.NDArray[np.float32]

_HASH_CHUNK_BYTES = 1 << 20
_FETCH_AGAIN = "fetch the checkpoint again"
# Buffers that older transformers saved; the decoder computes them.
_COMPUTED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class _Shard:
    path: Path
    data: mmap.mmap
    data_begin: int
    entries: dict[str, TensorEntry]


class HfCheckpoint:
    """An open checkpoint folder. Weights stay on disk until `tensor` reads one."""

    def __init__(self, folder: Path, config: ModelConfig, shards: list[_Shard]) -> None:
        self.folder = folder
        self.config = config
        self.tokenizer_json = _optional_text(folder / "tokenizer.json")
        self.chat_template = _chat_template(folder)
        self._shards = {name: shard for shard in shards for name in shard.entries}
        _check_tensors(config, {name: shard.entries[name] for name, shard in self._shards.items()})

    @classmethod
    def open(cls, path: str | Path) -> HfCheckpoint:
        """Open a folder and check names, shapes and types of all tensors.

        Raises:
            ModelNotFoundError: no such folder, or no config.json or safetensors in it.
            UsageError: an architecture, a feature or a dtype that is not supported.
            CorruptFileError: files that contradict each other.
        """
        folder = Path(path)
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise ModelNotFoundError(f"{folder} {what}", hint="name the folder that holds config.json")
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(
                f"{folder} holds no config.json", hint="name a Hugging Face checkpoint folder"
            )
        generation = folder / "generation_config.json"
        config = parse_config(
            _json_object(folder / "config.json"), _json_object(generation) if generation.is_file() else {}
        )
        return cls(folder, config, [_open_shard(shard) for shard in _shard_paths(folder)])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of configuration, tokenizer, template and every byte of the weights."""
        sha = hashlib.sha256()
        texts = (json.dumps(self.config.to_dict(), sort_keys=True), self.tokenizer_json, self.chat_template)
        sha.update(json.dumps(texts).encode())
        for path in sorted({shard.path for shard in self._shards.values()}):
            with path.open("rb") as file:
                while chunk := file.read(_HASH_CHUNK_BYTES):
                    sha.update(chunk)
        return sha.hexdigest()

    def tensor(self, name: str) -> F32:
        """One tensor as a new float32 array.

        Raises:
            KeyError: no tensor of that name.
            CorruptFileError: a value is NaN or infinite.
        """
        shard = self._shards[name]
        entry = shard.entries[name]
        values = _to_float32(shard, entry)
        finite = np.isfinite(values)
        if not finite.all():
            index = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise CorruptFileError(
                f"{shard.path}: {name}{list(index)} is {values[index]}; weights must be finite",
                hint="the checkpoint is damaged; fetch or train it again",
            )
        return values


def _check_tensors(config: ModelConfig, entries: dict[str, TensorEntry]) -> None:
    """Every tensor that the configuration asks for is there with its shape, and no other."""
    expected = dict(expected_tensors(config))
    missing = [name for name in expected if name not in entries]
    if missing:
        raise CorruptFileError(
            f"checkpoint lacks {len(missing)} of {len(expected)} tensors, the first is {missing[0]}",
            hint=_FETCH_AGAIN,
        )
    for name, shape in expected.items():
        if entries[name].shape != shape:
            raise CorruptFileError(
                f"{name} has shape {list(entries[name].shape)}, the configuration asks for {list(shape)}",
                hint="config.json and the weights do not belong together; fetch the checkpoint again",
            )
        if entries[name].dtype == "U8":
            raise UsageError(
                f"{name} has dtype U8; F32, F16 or BF16 is needed", hint="use the float checkpoint"
            )
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unknown = [
        name
        for name in entries
        if name not in expected and name not in ignored and not name.endswith(_COMPUTED_SUFFIXES)
    ]
    if unknown:
        raise UsageError(
            f"checkpoint holds {unknown[0]}, which {config.architecture} with this config.json does not have",
            hint="config.json and the weights differ, or parts of the model are not supported",
        )


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a checkpoint with this configuration."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    modules = (
        ("self_attn.q_proj", queries, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, queries, config.o_bias),
        ("mlp.gate_proj", ffn, hidden, config.mlp_bias),
        ("mlp.up_proj", ffn, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, ffn, config.mlp_bias),
    )
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for module, rows, columns, has_bias in modules:
            yield f"{layer}.{module}.weight", (rows, columns)
            if has_bias:
                yield f"{layer}.{module}.bias", (rows,)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _shard_paths(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        weight_map = _json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CorruptFileError(f"{index} has no weight_map", hint=_FETCH_AGAIN)
        return [_shard_path(folder, name) for name in sorted({str(name) for name in weight_map.values()})]
    pickled = sorted(folder.glob("pytorch_model*.bin")) + sorted(folder.glob("*.pth"))
    if pickled:
        raise ModelNotFoundError(
            f"{folder} holds only pickled weights ({pickled[0].name}), which can run code when read",
            hint="save it as safetensors with transformers: model.save_pretrained(FOLDER)",
        )
    raise ModelNotFoundError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json", hint=_FETCH_AGAIN
    )


def _shard_path(folder: Path, name: str) -> Path:
    """A plain file name in the folder; an index must not reach outside it."""
    if name != Path(name).name:
        raise CorruptFileError(f"weight_map names {name!r}; shards must lie in the checkpoint's folder")
    if not (folder / name).is_file():
        raise ModelNotFoundError(f"{folder} lacks the shard {name} that its index names", hint=_FETCH_AGAIN)
    return folder / name


def _open_shard(path: Path) -> _Shard:
    frame = read_header(path)
    if frame.file_bytes < frame.data_begin + frame.data_bytes:
        raise CorruptFileError(
            f"{path} is cut off at {frame.file_bytes:,} of {frame.data_begin + frame.data_bytes:,} bytes",
            hint=_FETCH_AGAIN,
        )
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _Shard(path, data, frame.data_begin, frame.entries)


def _to_float32(shard: _Shard, entry: TensorEntry) -> F32:
    dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry.dtype]
    offset = shard.data_begin + entry.begin
    flat = np.frombuffer(shard.data, dtype, entry.num_bytes // np.dtype(dtype).itemsize, offset)
    if entry.dtype == "BF16":  # the upper half of a float32
        values = (flat.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        values = flat.astype(np.float32)
    return values.reshape(entry.shape)


def _optional_text(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is not UTF-8 text", hint=_FETCH_AGAIN) from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_optional_text(path) or "")
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}", hint=_FETCH_AGAIN) from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} is not a JSON object", hint=_FETCH_AGAIN)
    return value


def _chat_template(folder: Path) -> str | None:
    """chat_template.jinja, else the entry of tokenizer_config.json: a text, or a list of named texts."""
    text = _optional_text(folder / "chat_template.jinja")
    settings = folder / "tokenizer_config.json"
    if text is not None or not settings.is_file():
        return text
    template = _json_object(settings).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CorruptFileError(f"{settings}: chat_template is neither a text nor a list's entry default")
    return template
