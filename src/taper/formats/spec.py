"""What lies in a `.taper` file, as data: matrices, codebook, header and the one layout (docs/format.md).

Writer and reader share `layout`, so a file is valid exactly when its table of tensors is the one that the
writer would make.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from taper.config import ModelConfig
from taper.errors import UsageError
from taper.formats.activations import MAX_WIDTH, ActivationBits
from taper.formats.learned import LearnedScheduler
from taper.formats.outliers import OutlierRows
from taper.formats.safetensors_header import DTYPE_BYTES, TensorEntry
from taper.formats.sensitivity import Sensitivity
from taper.kernels import hadamard_block, padded_cols

U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
I16 = npt.NDArray[np.int16]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]

FORMAT = "taper/1"
MAX_BITS = MAX_WIDTH
# Cache line and AVX-512 register: every plane begins at a multiple of this.
ALIGNMENT = 64
DIGEST_DIGITS = 32
FINAL_NORM = "norm.final"
# Values of a codebook: int8 up to 6 bits, from 7 on two int8 parts (docs/numerics.md, "Wide values").
NARROW_VALUE = 127
WIDE_VALUE = 127 * 128 + 63
LEAST_WIDE_BITS = 7
# Magnitude bits of the activations: what an int8 holds.
ACTIVATION_BITS = 7


@dataclass(frozen=True, slots=True)
class MatrixSpec:
    """Name and sizes of one weight matrix.

    Attributes:
        cols: in_features rounded up to a multiple of 64, the width of a plane's row in weights.
        block: consecutive columns that are rotated together, the largest power of two dividing in_features; 1
            where the file is not rotated.
        has_bias: whether `NAME.bias` is in the file.
        planes: planes that the file holds of this matrix where they are fewer than the file's, else None.
        has_tables: whether `NAME.tables` is in the file: every row has values of its own.
        has_gain: whether `NAME.gain` is in the file: the inputs are scaled column by column.
        has_offsets: whether `NAME.offsets` is in the file: every width has a bias of its own.
    """

    name: str
    out_features: int
    in_features: int
    cols: int
    block: int
    has_bias: bool = False
    planes: int | None = None
    has_tables: bool = False
    has_gain: bool = False
    has_offsets: bool = False

    @property
    def num_weights(self) -> int:
        """Weights of the matrix, without padding."""
        return self.out_features * self.in_features

    @property
    def plane_bytes(self) -> int:
        """Bytes of one plane."""
        return self.out_features * self.cols // 8

    def width_at(self, bits: int) -> int:
        """Planes that a reading at `bits` takes of this matrix: its own ceiling where that is lower."""
        return bits if self.planes is None else min(bits, self.planes)

    def to_dict(self) -> dict[str, Any]:
        """As in the `matrices` metadata."""
        ceiling: dict[str, Any] = {} if self.planes is None else {"planes": self.planes}
        flags = {"tables": self.has_tables, "gain": self.has_gain, "offsets": self.has_offsets}
        return (
            {
                "name": self.name,
                "out": self.out_features,
                "in": self.in_features,
                "cols": self.cols,
                "block": self.block,
            }
            | ceiling
            | {name: True for name, present in flags.items() if present}
        )


@dataclass(frozen=True, slots=True)
class PlanedMatrix:
    """One matrix with its arrays.

    Attributes:
        planes: uint8 (out_features, cols // 8) each, most significant first; may be a lazy sequence of more
            than memory holds: the writer asks for one plane at a time.
        scales: float16 (1, out_features) or (levels, out_features).
        bias: float32 (out_features) or None.
        signs: float32 (in_features) of +1 and -1, the rotation's signs.
        outliers: weights beside the planes, in the space of the planes, or None.
        tables: int8 (out_features, `table_columns`) where rows have values of their own, else None: those of
            the least width, then those of the next, none below -127.
        gain: float32 (in_features), what the inputs are multiplied with before the rotation and the columns
            were divided by, or None.
        offsets: float16 (levels, out_features), a bias for each width from the least, or None.
    """

    spec: MatrixSpec
    planes: Sequence[U8]
    scales: F16
    bias: F32 | None
    signs: F32
    outliers: OutlierRows | None = None
    tables: I8 | None = None
    gain: F32 | None = None
    offsets: F16 | None = None

    @property
    def block(self) -> int:
        """Hadamard block of the rotation."""
        return self.spec.block


@dataclass(frozen=True, slots=True)
class Codebook:
    """Values of every width.

    Attributes:
        values: bits to int8 (2**bits,), ascending; at 7 and 8 bits int16 where a value is beyond int8.
        level_scales: bits to what one step is worth.
        activation_bits: bits to magnitude bits of the activations; 7 where absent.
    """

    values: dict[int, I8 | I16]
    level_scales: dict[int, float]
    activation_bits: dict[int, int] = field(default_factory=dict)

    @classmethod
    def from_levels(cls, levels: Mapping[str, Mapping[str, Any]]) -> Codebook:
        """Read the `levels` of the metadata: {"2": {"scale": float, "values": [int]}, ...}."""
        return cls(
            {int(bits): _integers(level["values"]) for bits, level in levels.items()},
            {int(bits): float(level["scale"]) for bits, level in levels.items()},
            {
                int(bits): level["activation_bits"]
                for bits, level in levels.items()
                if level.get("activation_bits", ACTIVATION_BITS) != ACTIVATION_BITS
            },
        )

    def to_levels(self) -> dict[str, dict[str, Any]]:
        """What `from_levels` reads."""
        levels: dict[str, dict[str, Any]] = {
            str(bits): {"scale": self.level_scales[bits], "values": [int(value) for value in values]}
            for bits, values in sorted(self.values.items())
        }
        for bits, magnitude_bits in self.activation_bits.items():
            if magnitude_bits != ACTIVATION_BITS:
                levels[str(bits)]["activation_bits"] = magnitude_bits
        return levels

    def cut(self, max_bits: int) -> Codebook:
        """The levels up to `max_bits`."""
        return Codebook(
            {bits: values for bits, values in self.values.items() if bits <= max_bits},
            {bits: scale for bits, scale in self.level_scales.items() if bits <= max_bits},
            {bits: wide for bits, wide in self.activation_bits.items() if bits <= max_bits},
        )


@dataclass(frozen=True, slots=True)
class TaperHeader:
    """Everything in the file that is not a tensor.

    Attributes:
        planes: matrix name to its planes, of the matrices that hold fewer than `max_bits`.
        sensitivity: what each matrix costs at each width, for readings at a fraction of bits.
        relative_errors: matrix name to the solver's relative output error of each width from `min_bits` up.
        rotated: whether the matrices are rotated; else every block is 1 and every sign +1.
        tables: names of the matrices whose rows have values of their own.
        gains: names of the matrices whose inputs are scaled column by column.
        offsets: names of the matrices with a bias for each width.
        learned: what decides the widths of the policy `learned`.
        activations: bits of activations and of the KV cache.
    """

    config: ModelConfig
    min_bits: int
    max_bits: int
    codebook: Codebook
    tokenizer_json: str | None = None
    chat_template: str | None = None
    policies: dict[str, str] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    planes: dict[str, int] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    relative_errors: dict[str, list[float]] = field(default_factory=dict)
    rotated: bool = True
    tables: frozenset[str] = frozenset()
    gains: frozenset[str] = frozenset()
    offsets: frozenset[str] = frozenset()
    learned: LearnedScheduler | None = None
    activations: ActivationBits = field(default_factory=ActivationBits)

    @property
    def matrices(self) -> list[MatrixSpec]:
        """The matrices in the order of the file, each with its ceiling."""
        return [
            replace(spec, has_gain=spec.name in self.gains, has_offsets=spec.name in self.offsets)
            for spec in expected_matrices(self.config, self.planes, self.rotated, self.tables)
        ]


def expected_matrices(
    config: ModelConfig,
    planes: Mapping[str, int] | None = None,
    rotated: bool = True,
    tables: frozenset[str] = frozenset(),
) -> list[MatrixSpec]:
    """The matrices of a model, in the order of the file.

    Args:
        config: the model.
        planes: ceilings of the matrices that hold fewer planes than the file.
        rotated: whether their columns are rotated.
        tables: the matrices whose rows have values of their own.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    specs = [_spec("embed", config.vocab_size, hidden)]
    for layer in range(config.num_layers):
        at = f"layers.{layer}"
        specs += [
            _spec(f"{at}.qkv", config.qkv_features, hidden, config.qkv_bias),
            _spec(f"{at}.o", hidden, config.num_heads * config.head_dim, config.o_bias),
            _spec(f"{at}.gate_up", 2 * ffn, hidden, config.mlp_bias),
            _spec(f"{at}.down", hidden, ffn, config.mlp_bias),
        ]
    if not config.tie_word_embeddings:
        specs.append(_spec("head", config.vocab_size, hidden))
    ceilings = planes or {}
    return [
        replace(
            spec,
            planes=ceilings.get(spec.name),
            block=spec.block if rotated else 1,
            has_tables=spec.name in tables,
        )
        for spec in specs
    ]


def table_columns(min_bits: int, max_bits: int) -> int:
    """Values that a row of `NAME.tables` holds: 2^b of each width b."""
    return (2 << max_bits) - (1 << min_bits)


def layout(
    header: TaperHeader, scale_rows: Mapping[str, int], num_outliers: Mapping[str, int] | None = None
) -> list[TensorEntry]:
    """Every tensor of the file in order, pads included.

    Args:
        header: configuration, number of planes and ceilings.
        scale_rows: matrix name to rows of its scales.
        num_outliers: matrix name to its outliers, of the matrices that have some.
    """
    specs, num_outliers = header.matrices, num_outliers or {}
    entries: list[TensorEntry] = []
    _place(entries, FINAL_NORM, "F32", (header.config.hidden_size,))
    # Widest type first: every array then lies at a multiple of its item size.
    for spec in specs:
        if spec.has_bias:
            _place(entries, f"{spec.name}.bias", "F32", (spec.out_features,))
    for spec in specs:
        if spec.has_gain:
            _place(entries, f"{spec.name}.gain", "F32", (spec.in_features,))
    for spec in specs:
        if spec.name in num_outliers:
            _place(entries, f"{spec.name}.outliers.starts", "I32", (spec.out_features + 1,))
    for spec in specs:
        _place(entries, f"{spec.name}.scales", "F16", (scale_rows[spec.name], spec.out_features))
    for spec in specs:
        if spec.has_offsets:
            levels = spec.width_at(header.max_bits) - header.min_bits + 1
            _place(entries, f"{spec.name}.offsets", "F16", (levels, spec.out_features))
    for spec in specs:
        if spec.name in num_outliers:
            _place(entries, f"{spec.name}.outliers.columns", "U16", (num_outliers[spec.name],))
            _place(entries, f"{spec.name}.outliers.values", "F16", (num_outliers[spec.name],))
    for spec in specs:
        _place(entries, f"{spec.name}.signs", "U8", (-(-spec.in_features // 8),))
    for spec in specs:
        if spec.has_tables:
            columns = table_columns(header.min_bits, spec.width_at(header.max_bits))
            _place(entries, f"{spec.name}.tables", "U8", (spec.out_features, columns))
    _place_planes(entries, header, specs)
    return entries


def planes_bytes(matrices: Sequence[MatrixSpec], widths: Mapping[str, int]) -> int:
    """Bytes of the planes that a reading takes, each beginning at a multiple of `ALIGNMENT`.

    Args:
        matrices: in the order of the file.
        widths: matrix name to planes read.
    """
    aligned = sum(widths[spec.name] * (spec.plane_bytes + -spec.plane_bytes % ALIGNMENT) for spec in matrices)
    most = max(widths[spec.name] for spec in matrices)
    last = next(spec for spec in reversed(matrices) if widths[spec.name] == most)
    return aligned - -last.plane_bytes % ALIGNMENT


def parse_widths(text: str) -> tuple[int, int]:
    """MIN-MAX or one number, as in 2-8. Raises UsageError for anything else."""
    found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text)
    if found is None:
        raise UsageError(f"bits {text!r} is not of the form MIN-MAX, as in 2-8")
    widths = int(found[1]), int(found[2] or found[1])
    if not 1 <= widths[0] <= widths[1] <= MAX_BITS:
        raise UsageError(f"bits {text!r} are outside 1 <= MIN <= MAX <= {MAX_BITS}")
    return widths


def _integers(values: list[int]) -> I8 | I16:
    wide = max(values) > NARROW_VALUE or min(values) < -NARROW_VALUE
    return np.array(values, dtype=np.int16) if wide else np.array(values, dtype=np.int8)


def _spec(name: str, out_features: int, in_features: int, has_bias: bool = False) -> MatrixSpec:
    return MatrixSpec(
        name, out_features, in_features, padded_cols(in_features), hadamard_block(in_features), has_bias
    )


def _place_planes(entries: list[TensorEntry], header: TaperHeader, specs: Sequence[MatrixSpec]) -> None:
    num_pads = 0
    for plane in range(header.max_bits):
        for spec in specs:
            if plane >= spec.width_at(header.max_bits):
                continue
            gap = -entries[-1].end % ALIGNMENT
            if gap:
                _place(entries, f"pad.{num_pads}", "U8", (gap,))
                num_pads += 1
            _place(entries, f"{spec.name}.plane{plane}", "U8", (spec.out_features, spec.cols // 8))


def _place(entries: list[TensorEntry], name: str, dtype: str, shape: tuple[int, ...]) -> None:
    begin = entries[-1].end if entries else 0
    entries.append(TensorEntry(name, dtype, shape, begin, begin + math.prod(shape) * DTYPE_BYTES[dtype]))
