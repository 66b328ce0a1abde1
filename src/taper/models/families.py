"""Model families as data: where each matrix of the decoder lies in a Hugging Face checkpoint.

To add a family of the same architecture under other names, add one entry to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from taper.config import ModelConfig
from taper.errors import UsageError
from taper.formats.huggingface import HfCheckpoint

F32 = npt.NDArray[np.float32]
Size = Literal["hidden", "queries", "kv", "ffn", "vocab"]


@dataclass(frozen=True, slots=True)
class LayerMatrix:
    """One fused matrix of a layer.

    Attributes:
        name: as in a `.taper` file, after `layers.I.`.
        parts: checkpoint modules below the layer and their out_features, stacked in this order.
        inputs: in_features.
        norm: the norm before it, whose gain is folded into its columns; None where there is none.
        bias: the flag of `ModelConfig` that says whether the parts carry biases.
    """

    name: str
    parts: tuple[tuple[str, Size], ...]
    inputs: Size
    norm: str | None
    bias: Literal["qkv_bias", "o_bias", "mlp_bias"]


@dataclass(frozen=True, slots=True)
class Family:
    """Names of one family's checkpoint modules; `layer` holds `{}` for the index."""

    embed: str
    layer: str
    final_norm: str
    head: str
    matrices: tuple[LayerMatrix, ...]


@dataclass(frozen=True, slots=True)
class MatrixSource:
    """One matrix of the decoder and the checkpoint tensors that it is made of.

    Attributes:
        name: as in a `.taper` file.
        parts: tensors and their rows, stacked in this order.
        in_features: columns of every part.
        biases: a tensor for each part, or empty.
        gain: tensor of the norm gain that is folded into the columns, or None.
    """

    name: str
    parts: tuple[tuple[str, int], ...]
    in_features: int
    biases: tuple[str, ...] = ()
    gain: str | None = None

    @property
    def out_features(self) -> int:
        """Rows of the stacked matrix."""
        return sum(rows for _, rows in self.parts)


_LLAMA = Family(
    embed="model.embed_tokens",
    layer="model.layers.{}",
    final_norm="model.norm",
    head="lm_head",
    matrices=(
        LayerMatrix(
            name="qkv",
            parts=(("self_attn.q_proj", "queries"), ("self_attn.k_proj", "kv"), ("self_attn.v_proj", "kv")),
            inputs="hidden",
            norm="input_layernorm",
            bias="qkv_bias",
        ),
        LayerMatrix("o", (("self_attn.o_proj", "hidden"),), "queries", None, "o_bias"),
        LayerMatrix(
            name="gate_up",
            parts=(("mlp.gate_proj", "ffn"), ("mlp.up_proj", "ffn")),
            inputs="hidden",
            norm="post_attention_layernorm",
            bias="mlp_bias",
        ),
        LayerMatrix("down", (("mlp.down_proj", "hidden"),), "ffn", None, "mlp_bias"),
    ),
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
}


def family_of(config: ModelConfig) -> Family:
    """The family of a configuration. Raises UsageError for an architecture that is not in `FAMILIES`."""
    family = FAMILIES.get(config.architecture)
    if family is None:
        raise UsageError(
            f"architecture {config.architecture!r} is not supported; supported are {', '.join(FAMILIES)}",
            hint="use a model of a supported architecture",
        )
    return family


def matrix_sources(config: ModelConfig) -> list[MatrixSource]:
    """Every matrix of a model in file order: embed, the layers, head where untied."""
    family = family_of(config)
    sizes = _sizes(config)
    sources = [MatrixSource("embed", ((f"{family.embed}.weight", config.vocab_size),), config.hidden_size)]
    for index in range(config.num_layers):
        sources += [_layer_source(config, family, index, matrix, sizes) for matrix in family.matrices]
    if not config.tie_word_embeddings:
        sources.append(
            MatrixSource("head", ((f"{family.head}.weight", config.vocab_size),), config.hidden_size)
        )
    return sources


def read_matrix(checkpoint: HfCheckpoint, source: MatrixSource) -> tuple[F32, F32 | None]:
    """A matrix, float32 (out_features, in_features), norm gain folded into its columns, and its bias or None.

    Raises CorruptFileError for values that are not finite; names and shapes were checked on opening.
    """
    weight = _stack([checkpoint.tensor(name) for name, _ in source.parts])
    if source.gain is not None:
        weight *= checkpoint.tensor(source.gain)
    if not source.biases:
        return weight, None
    return weight, _stack([checkpoint.tensor(name) for name in source.biases])


def read_final_norm(checkpoint: HfCheckpoint) -> F32:
    """Gain of the norm before the head, float32 (hidden). Raises CorruptFileError as `read_matrix`."""
    return checkpoint.tensor(f"{family_of(checkpoint.config).final_norm}.weight")


def _sizes(config: ModelConfig) -> dict[Size, int]:
    return {
        "hidden": config.hidden_size,
        "queries": config.num_heads * config.head_dim,
        "kv": config.num_kv_heads * config.head_dim,
        "ffn": config.intermediate_size,
        "vocab": config.vocab_size,
    }


def _layer_source(
    config: ModelConfig, family: Family, index: int, matrix: LayerMatrix, sizes: dict[Size, int]
) -> MatrixSource:
    layer = family.layer.format(index)
    modules = [f"{layer}.{module}" for module, _ in matrix.parts]
    return MatrixSource(
        name=f"layers.{index}.{matrix.name}",
        parts=tuple((f"{layer}.{module}.weight", sizes[rows]) for module, rows in matrix.parts),
        in_features=sizes[matrix.inputs],
        biases=tuple(f"{module}.bias" for module in modules) if getattr(config, matrix.bias) else (),
        gain=None if matrix.norm is None else f"{layer}.{matrix.norm}.weight",
    )


def _stack(parts: Sequence[F32]) -> F32:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
