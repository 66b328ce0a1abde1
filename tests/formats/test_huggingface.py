"""Checkpoint folders: what is read, and what is refused with a way out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taper.errors import CorruptFileError, ModelNotFoundError, TaperError, UsageError
from taper.formats.hf_config import parse_config
from taper.formats.huggingface import HfCheckpoint
from taper.testing.tiny import hf_config_json, tiny_config, tiny_hf_dir, tiny_tokenizer_json

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny_hf_dir(tmp_path / "model")


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def parsed(**changes):
    return parse_config(hf_config_json(tiny_config()) | changes, {})


def test_folder_reads_back(folder):
    checkpoint = HfCheckpoint.open(folder)
    assert checkpoint.config == tiny_config()
    assert checkpoint.tokenizer_json == tiny_tokenizer_json()
    assert checkpoint.chat_template is None
    wanted = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(checkpoint.tensor(UP), wanted[UP])
    assert checkpoint.tensor(UP).dtype == np.float32


def bfloat16_bits(values):
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_types_become_float32(folder, dtype):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    halves = {n: v.astype(np.float16) if dtype == "F16" else bfloat16_bits(v) for n, v in tensors.items()}
    header, offset = {}, 0
    for name, value in halves.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(v.tobytes() for v in halves.values()))
    got = HfCheckpoint.open(folder).tensor(UP)
    if dtype == "F16":
        np.testing.assert_array_equal(got, tensors[UP].astype(np.float16).astype(np.float32))
    else:
        np.testing.assert_array_equal(got.view(np.uint32), tensors[UP].view(np.uint32) & 0xFFFF0000)


def shard(folder: Path) -> dict[str, str]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index in range(2):
        file = f"model-0000{index + 1}-of-00002.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[index::2]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards_read_as_one(folder, tmp_path):
    whole = HfCheckpoint.open(folder)
    expected = {name: whole.tensor(name).copy() for name in load_file(folder / "model.safetensors")}
    shard(folder)
    checkpoint = HfCheckpoint.open(folder)
    for name, values in expected.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), values)


def test_missing_and_outside_shards(folder):
    weight_map = shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {UP: "../secret.safetensors"}}))
    with pytest.raises(CorruptFileError, match="must lie in the checkpoint's folder"):
        HfCheckpoint.open(folder)
    index.write_text(json.dumps({"weight_map": weight_map | {UP: "model-3.safetensors"}}))
    with pytest.raises(ModelNotFoundError, match=r"lacks the shard model-3\.safetensors"):
        HfCheckpoint.open(folder)


def test_fingerprint_follows_the_content(folder, tmp_path):
    first = HfCheckpoint.open(folder).fingerprint
    assert HfCheckpoint.open(tiny_hf_dir(tmp_path / "same")).fingerprint == first
    assert HfCheckpoint.open(tiny_hf_dir(tmp_path / "other", seed=1)).fingerprint != first
    edit_config(folder, rope_theta=5000.0)
    assert HfCheckpoint.open(folder).fingerprint != first


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite_is_named(folder, value):
    edit_weights(folder, lambda tensors: tensors[UP].__setitem__((3, 7), value))
    checkpoint = HfCheckpoint.open(folder)
    with pytest.raises(CorruptFileError, match=r"up_proj\.weight\[3, 7\] is"):
        checkpoint.tensor(UP)
    with pytest.raises(KeyError):
        checkpoint.tensor("nothing")


def test_tensors_must_be_those_of_the_configuration(folder, tmp_path):
    edit_weights(folder, lambda tensors: tensors.pop(UP))
    with pytest.raises(CorruptFileError, match=r"lacks 1 of 20 tensors, the first is .*\.1\.mlp\.up_proj"):
        HfCheckpoint.open(folder)
    other = tiny_hf_dir(tmp_path / "other")
    edit_config(other, intermediate_size=96)
    with pytest.raises(CorruptFileError, match=r"gate_proj\.weight has shape \[80, 96\].* \[96, 96\]"):
        HfCheckpoint.open(other)
    extra = tiny_hf_dir(tmp_path / "extra")
    edit_weights(
        extra, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)})
    )
    with pytest.raises(UsageError, match=r"q_norm\.weight, which LlamaForCausalLM"):
        HfCheckpoint.open(extra)


def test_stored_copy_of_a_tied_head_and_old_buffers_are_no_surprise(folder):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    edit_weights(folder, add)
    HfCheckpoint.open(folder)


def test_cut_off_shard(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match="is cut off at"):
        HfCheckpoint.open(folder)


def test_folders_that_are_no_checkpoint(folder, tmp_path):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        HfCheckpoint.open(tmp_path / "none")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        HfCheckpoint.open(folder / "config.json")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        HfCheckpoint.open(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="neither"):
        HfCheckpoint.open(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ModelNotFoundError, match="pickled") as caught:
        HfCheckpoint.open(folder)
    assert "save_pretrained" in caught.value.hint


def test_broken_json(folder):
    (folder / "config.json").write_text('{"architectures": ')
    with pytest.raises(CorruptFileError, match="not valid JSON"):
        HfCheckpoint.open(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptFileError, match="not UTF-8"):
        HfCheckpoint.open(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CorruptFileError, match="not a JSON object"):
        HfCheckpoint.open(folder)


def test_chat_template_from_either_place(folder):
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "plain"}))
    assert HfCheckpoint.open(folder).chat_template == "plain"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert HfCheckpoint.open(folder).chat_template == "d"
    (folder / "chat_template.jinja").write_text("file")
    assert HfCheckpoint.open(folder).chat_template == "file"
    (folder / "chat_template.jinja").unlink()
    settings.write_text(json.dumps({"chat_template": 5}))
    with pytest.raises(CorruptFileError, match="chat_template"):
        HfCheckpoint.open(folder)


def test_end_tokens_of_both_files_are_joined(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    assert HfCheckpoint.open(folder).config.eos_token_ids == (1, 7)


def test_rope_in_both_spellings():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = parsed(rope_theta=500000.0, rope_scaling={"type": "llama3", **scaling})
    middle = parsed(rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **scaling})
    new = parsed(rope_theta=None, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling})
    assert old.rope == middle.rope == new.rope
    assert (old.rope.theta, old.rope.variant, old.rope.parameters) == (500000.0, "llama3", scaling)
    assert parsed(rope_theta=None).rope.theta == 10000.0
    beside = parsed(rope_scaling={"type": "yarn", "factor": 2.0}, original_max_position_embeddings=32)
    assert beside.rope.parameters["original_max_position_embeddings"] == 32


def test_defaults_of_each_architecture():
    raw = hf_config_json(tiny_config())
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        del raw[key]
    llama = parse_config(raw, {})
    assert (llama.num_kv_heads, llama.head_dim, llama.rms_norm_eps, llama.tie_word_embeddings) == (
        6,
        16,
        1e-6,
        False,
    )
    qwen = parse_config(raw | {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}, {})
    assert (qwen.qkv_bias, qwen.o_bias, qwen.mlp_bias) == (True, False, False)
    biased = parse_config(raw | {"attention_bias": True, "mlp_bias": True}, {})
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)
    mistral = {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "sliding_window": 256}
    assert parse_config(raw | mistral, {}).num_kv_heads == 2


REFUSED = {
    "unknown": ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported"),
    "none": ({"architectures": None}, "exactly one"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "window": ({"architectures": ["MistralForCausalLM"], "sliding_window": 128}, "sliding_window 128"),
    "qwen window": ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "use_sliding"),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "missing": ({"hidden_size": None}, "hidden_size"),
    "text": ({"vocab_size": "300"}, "vocab_size '300'"),
    "negative": ({"num_hidden_layers": -1}, "num_layers -1"),
    "zero heads": ({"num_attention_heads": 0, "head_dim": None}, "config.json"),
    "odd head": ({"head_dim": 15}, "head_dim 15 is odd"),
    "groups": ({"num_key_value_heads": 4}, "not a multiple"),
    "eos": ({"eos_token_id": 300}, "300 is outside"),
    "bos list": ({"bos_token_id": [1]}, "bos_token_id"),
    "rope text": ({"rope_scaling": "linear"}, "config.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configuration_is_refused(name):
    changes, message = REFUSED[name]
    with pytest.raises(TaperError, match=message):
        parsed(**changes)


def test_unknown_architecture_lists_the_known_ones():
    with pytest.raises(UsageError) as caught:
        parsed(architectures=["GPT2LMHeadModel"])
    assert caught.value.hint == "supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"
