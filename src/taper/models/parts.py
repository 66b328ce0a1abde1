"""The parts of a decoder, made from a `.taper` file (planes) or from a Hugging Face checkpoint (float32)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from taper.config import ModelConfig
from taper.formats.activations import ActivationBits
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.formats.sensitivity import Sensitivity
from taper.formats.spec import MatrixSpec, PlanedMatrix, table_columns
from taper.kernels import Decoder as NativeDecoder
from taper.kernels import Outliers, Planes
from taper.layers.attention import Attention, score_scale
from taper.layers.embedding import Embedding, FloatEmbedding, PlanedEmbedding
from taper.layers.linear import Before, FloatLinear, Linear, Norm, PlanedLinear, Rotation, Swiglu
from taper.models.block import Block
from taper.models.families import matrix_sources, read_final_norm, read_matrix

F32 = npt.NDArray[np.float32]

# In the order of a layer, and of `taper.kernels.Decoder`.
LAYER_MATRICES = ("qkv", "o", "gate_up", "down")

# What a float32 model answers when it is asked for its width.
FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that `Decoder` runs.

    Attributes:
        head_name: the matrix that makes the logits, `embed` where tied.
        kv_dtype: float16 or float32, of the KV cache.
        matrices: name, sizes and ceiling of every matrix; empty stands for those of the configuration.
        sensitivity: what each matrix costs at each width, where it is known.
        unplaned_bytes: of a file, what every reading needs beside its planes.
        native: over planes, the whole step as one native call; gives the bytes that the blocks give.
    """

    config: ModelConfig
    embedding: Embedding
    blocks: tuple[Block, ...]
    head: Linear
    head_name: str
    kv_dtype: npt.DTypeLike
    min_bits: int
    max_bits: int
    matrices: tuple[MatrixSpec, ...] = ()
    sensitivity: Sensitivity | None = None
    unplaned_bytes: int = 0
    native: NativeDecoder | None = None


def planed_parts(
    file: TaperFile, ceilings: Mapping[str, int] | None = None, activations: ActivationBits | None = None
) -> Parts:
    """Parts over a file's planes, which stay in the memory map: nothing but the row scales is copied.

    Args:
        file: an open file.
        ceilings: matrix name to planes; only so many of its planes are used, in the embedding look-up too, as
            if the file held no more.
        activations: bits of the activations in the place of the file's own.
    """
    config = file.config
    chosen = file.header.activations if activations is None else activations
    specs = [
        replace(spec, planes=min(ceilings[spec.name], spec.width_at(file.max_bits)))
        if ceilings and spec.name in ceilings
        else spec
        for spec in file.matrices
    ]
    matrices = {spec.name: _planes(file, spec.name, spec.width_at(file.max_bits)) for spec in specs}

    made: dict[str, PlanedLinear] = {}

    def linear(name: str, before: Before) -> Linear:
        planes, rotation, outliers = matrices[name]
        if isinstance(before, Norm) and (gain := file.matrix(name).gain) is not None:
            before = Norm(before.eps, gain if before.gain is None else before.gain * gain)
        magnitude_bits = chosen.of_matrix(name, file.codebook.activation_bits)
        made[name] = PlanedLinear(planes, rotation, before, outliers, magnitude_bits)
        return made[name]

    head_name = "embed" if config.tie_word_embeddings else "head"
    embedding = PlanedEmbedding(*matrices["embed"], file.matrix("embed").gain)
    return Parts(
        config=config,
        embedding=embedding,
        blocks=_blocks(config, linear),
        head=linear(head_name, Norm(config.rms_norm_eps, file.tensor("norm.final"))),
        head_name=head_name,
        kv_dtype=np.float16,
        min_bits=file.min_bits,
        max_bits=file.max_bits,
        matrices=tuple(specs),
        sensitivity=file.sensitivity,
        unplaned_bytes=file.unplaned_bytes,
        native=native_decoder(config, embedding, made),
    )


def native_decoder(
    config: ModelConfig, embedding: PlanedEmbedding, linears: Mapping[str, PlanedLinear]
) -> NativeDecoder:
    """The step of planed parts as one native call; `linears` by matrix name, the tied head as `embed`."""
    names = [f"layers.{index}" for index in range(config.num_layers)]
    return NativeDecoder(
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        score_scale=score_scale(config.head_dim),
        embedding=embedding.native,
        layers=[tuple(linears[f"{name}.{part}"].native for part in LAYER_MATRICES) for name in names],
        head=linears["embed" if config.tie_word_embeddings else "head"].native,
    )


def float_parts(checkpoint: HfCheckpoint) -> Parts:
    """Parts with every matrix in float32, norm gains folded as in a file, and a float32 KV cache."""
    config = checkpoint.config
    sources = {source.name: source for source in matrix_sources(config)}
    embed, _ = read_matrix(checkpoint, sources["embed"])

    def linear(name: str, before: Before) -> Linear:
        weight, bias = (embed, None) if name == "embed" else read_matrix(checkpoint, sources[name])
        return FloatLinear(weight, bias, before)

    head_name = "embed" if config.tie_word_embeddings else "head"
    return Parts(
        config=config,
        embedding=FloatEmbedding(embed),
        blocks=_blocks(config, linear),
        head=linear(head_name, Norm(config.rms_norm_eps, read_final_norm(checkpoint))),
        head_name=head_name,
        kv_dtype=np.float32,
        min_bits=FLOAT_BITS,
        max_bits=FLOAT_BITS,
    )


def _blocks(config: ModelConfig, linear: Callable[[str, Before], Linear]) -> tuple[Block, ...]:
    norm = Norm(config.rms_norm_eps)
    attention = Attention(config.num_heads, config.head_dim)
    return tuple(
        Block(
            name=name,
            qkv=linear(f"{name}.qkv", norm),
            o=linear(f"{name}.o", None),
            gate_up=linear(f"{name}.gate_up", norm),
            down=linear(f"{name}.down", Swiglu()),
            attention=attention,
        )
        for name in (f"layers.{index}" for index in range(config.num_layers))
    )


def _values(file: TaperFile, matrix: PlanedMatrix, bits: int) -> npt.NDArray[np.int8] | npt.NDArray[np.int16]:
    """The codebook's values of a width, or those of each row."""
    if matrix.tables is None:
        return file.codebook.values[bits]
    begin = table_columns(file.min_bits, bits - 1)
    return matrix.tables[:, begin : begin + 2**bits]


def _biases(matrix: PlanedMatrix, num_levels: int) -> F32 | None:
    """Bias and offsets in one, float32 (1 or levels, out_features)."""
    if matrix.offsets is None:
        return None if matrix.bias is None else matrix.bias[None]
    offsets = matrix.offsets[:num_levels].astype(np.float32)
    return offsets if matrix.bias is None else offsets + matrix.bias


def _planes(file: TaperFile, name: str, width: int) -> tuple[Planes, Rotation, Outliers | None]:
    matrix = file.matrix(name)
    levels = range(file.min_bits, width + 1)
    planes = Planes(
        planes=list(matrix.planes[:width]),
        values={bits: _values(file, matrix, bits) for bits in levels},
        level_scales={bits: file.codebook.level_scales[bits] for bits in levels},
        row_scales=matrix.scales[: len(levels)].astype(np.float32),
        bias=_biases(matrix, len(levels)),
        in_features=matrix.spec.in_features,
    )
    outliers = None
    if (kept := matrix.outliers) is not None:
        outliers = Outliers(kept.starts, kept.columns, kept.values, matrix.spec.in_features)
    return planes, Rotation(matrix.signs, matrix.block), outliers
