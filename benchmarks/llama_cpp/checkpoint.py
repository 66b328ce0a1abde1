"""A Hugging Face checkpoint as GGUF in float32, and the importance matrix of its calibration tokens.

Only token ids are ever given to the model, so its vocabulary is the dummy of `gguf_models`. Run in a Python
that has both taper and gguf.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import BenchmarkError, progress
from gguf_models import Shape, metadata, optional_package
from numpy.typing import NDArray

from taper.config import ModelConfig
from taper.formats.huggingface import HfCheckpoint, expected_tensors
from taper.layers.rope import context_length
from taper.models import Decoder
from taper.models.parts import FLOAT_BITS

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]

FILE_TYPE_ALL_F32 = 0
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Which of the peer's matrices meet the input of one of ours, and the gain that we keep in the columns.
INPUTS = {
    "qkv": (("attn_q", "attn_k", "attn_v"), "input_layernorm"),
    "o": (("attn_output",), None),
    "gate_up": (("ffn_gate", "ffn_up"), "post_attention_layernorm"),
    "down": (("ffn_down",), None),
}


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor. Raises KeyError for one that llama.cpp does not know."""
    if name in TOP:
        return TOP[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{MODULES[module]}.{kind}"


def permute(weight: Float32, num_heads: int) -> Float32:
    """Reorder the rows of a query or key matrix from halves to pairs.

    Hugging Face rotates row i of a head with row i + head_dim / 2, llama.cpp's `llama` rows 2i and 2i + 1
    (`LlamaModel.permute` of its converter).

    Args:
        weight: (num_heads * head_dim, in_features).
        num_heads: heads that the rows divide into.
    """
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def check_supported(config: ModelConfig) -> None:
    """Refuse what this converter would write wrongly: other families, biases and scaled positions."""
    biased = config.qkv_bias or config.o_bias or config.mlp_bias
    if config.architecture not in ARCHITECTURES or biased or config.rope.variant != "default":
        raise BenchmarkError(
            f"{config.architecture} with {'a' if biased else 'no'} bias and RoPE {config.rope.variant!r} is "
            f"not converted; use one of {', '.join(ARCHITECTURES)} without bias and with default RoPE"
        )


def checkpoint_metadata(config: ModelConfig, name: str) -> dict[str, object]:
    """What the GGUF file says of the model: `GGUFWriter`'s `add_` methods and values."""
    check_supported(config)
    shape = Shape(
        name=name,
        num_layers=config.num_layers,
        hidden=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
    )
    return {
        **metadata(shape),
        "name": name,
        "file_type": FILE_TYPE_ALL_F32,
        "context_length": context_length(config),
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope.theta,
        "layer_norm_rms_eps": config.rms_norm_eps,
    }


def converted(checkpoint: HfCheckpoint) -> Iterator[tuple[str, Float32]]:
    """Yield GGUF name and float32 values of every tensor, queries and keys in llama.cpp's order."""
    config = checkpoint.config
    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    for name, _ in expected_tensors(config):
        values = checkpoint.tensor(name)
        module = next((part for part in heads if part in name), None)
        yield gguf_name(name), values if module is None else permute(values, heads[module])


def write_checkpoint(checkpoint: HfCheckpoint, path: Path) -> None:
    """Write a checkpoint as GGUF, every tensor F32; the file appears complete or not at all.

    Raises:
        BenchmarkError: the gguf package is absent, or the model is none that `check_supported` lets through.
    """
    gguf = optional_package("gguf")
    progress(f"writing {path.name}")
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    for name, value in checkpoint_metadata(checkpoint.config, path.stem).items():
        getattr(writer, f"add_{name}")(value)
    for name, values in converted(checkpoint):
        writer.add_tensor(name, values)
    _write(writer)
    partial.rename(path)


def input_squares(checkpoint: HfCheckpoint, tokens: Int32) -> dict[str, Float64]:
    """Sums over calibration tokens of the squared inputs of every layer's matrices, by GGUF tensor name.

    That is what llama-imatrix collects, computed by our float decoder: the input of q, k, v, gate and up is
    the normalised vector times the gain, which our decoder keeps in the columns and which is put back here.
    As in llama-imatrix the head is left out.

    Args:
        checkpoint: the float model.
        tokens: int32 (sequences, tokens), each sequence read from an empty cache.

    Returns:
        Name to float64 (in_features).
    """
    sums: dict[str, Float64] = {}

    def observe(name: str, x: Float32) -> None:
        squares = np.einsum("ij,ij->j", x, x, dtype=np.float64)
        sums[name] = sums.get(name, 0.0) + squares

    decoder = Decoder.from_hf(checkpoint)
    cache = decoder.new_cache(tokens.shape[1])
    for sequence in tokens:
        cache.truncate(0)
        decoder.forward(sequence, cache, FLOAT_BITS, logits="none", observe=observe)
    return dict(_by_peer_name(checkpoint, sums))


def _by_peer_name(checkpoint: HfCheckpoint, sums: dict[str, Float64]) -> Iterator[tuple[str, Float64]]:
    for layer in range(checkpoint.config.num_layers):
        for ours, (theirs, norm) in INPUTS.items():
            squares = sums[f"layers.{layer}.{ours}"]
            if norm is not None:
                squares = (
                    squares * checkpoint.tensor(f"model.layers.{layer}.{norm}.weight").astype(float) ** 2
                )
            for name in theirs:
                yield f"blk.{layer}.{name}.weight", squares


def write_imatrix(path: Path, squares: dict[str, Float64], tokens: Int32, source: str) -> None:
    """Write an importance matrix in llama-imatrix's GGUF format; it appears complete or not at all.

    Args:
        path: file to write.
        squares: from `input_squares`.
        tokens: the calibration tokens, int32 (sequences, tokens): one chunk a sequence.
        source: name of the calibration text.
    """
    gguf = optional_package("gguf")
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [source])
    writer.add_uint32("imatrix.chunk_count", len(tokens))
    writer.add_uint32("imatrix.chunk_size", tokens.shape[1])
    for name, sums in squares.items():
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32)[None, :])
        writer.add_tensor(f"{name}.counts", np.array([[tokens.size]], dtype=np.float32))
    _write(writer)
    partial.rename(path)


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors of a GGUF file: everything but vocabulary, metadata and padding."""
    return sum(int(tensor.n_bytes) for tensor in optional_package("gguf").GGUFReader(path).tensors)


def _write(writer: object) -> None:
    writer.write_header_to_file()  # type: ignore[attr-defined]
    writer.write_kv_data_to_file()  # type: ignore[attr-defined]
    writer.write_tensors_to_file()  # type: ignore[attr-defined]
    writer.close()  # type: ignore[attr-defined]
