from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

def isa() -> str: ...
def use_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
def available_cores() -> int: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...

class Activations:
    def __init__(
        self,
        q: NDArray[np.int8],
        scale: Float32,
        sum: NDArray[np.int32],
        low: NDArray[np.int8] | None = None,
        low_sum: NDArray[np.int32] | None = None,
    ) -> None: ...
    @property
    def q(self) -> NDArray[np.int8]: ...
    @property
    def scale(self) -> Float32: ...
    @property
    def sum(self) -> NDArray[np.int32]: ...
    @property
    def low(self) -> NDArray[np.int8] | None: ...
    @property
    def low_sum(self) -> NDArray[np.int32] | None: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def cols(self) -> int: ...

def prepare(
    x: Float32,
    *,
    cols: int,
    signs: Float32 | None,
    block: int,
    eps: float | None = None,
    gain: Float32 | None = None,
    magnitude_bits: int = 7,
) -> Activations: ...
def prepare_swiglu(
    gate_up: Float32, *, cols: int, signs: Float32 | None, block: int, magnitude_bits: int = 7
) -> Activations: ...

class Planes:
    def __init__(
        self,
        planes: Sequence[NDArray[np.uint8]],
        values: Mapping[int, NDArray[np.int8] | NDArray[np.int16]],
        level_scales: Mapping[int, float],
        row_scales: Float32,
        bias: Float32 | None,
        in_features: int,
    ) -> None: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def min_bits(self) -> int: ...
    @property
    def max_bits(self) -> int: ...
    def bytes_read(self, bits: int) -> int: ...
    def matmul(self, activations: Activations, bits: int, residual: Float32 | None = None) -> Float32: ...
    def rows(self, indices: NDArray[np.int32] | NDArray[np.int64], bits: int) -> Float32: ...

class Decoder:
    def __init__(
        self,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        score_scale: float,
        embedding: tuple[Any, ...],
        layers: Sequence[tuple[Any, ...]],
        head: tuple[Any, ...],
    ) -> None: ...
    def step(
        self,
        tokens: NDArray[np.int32],
        sequences: Sequence[tuple[int, int, NDArray[Any] | PlanesBlocks, Float32, Float32]],
        widths: NDArray[np.uint8],
        logits: str,
        times: dict[str, int] | None = None,
    ) -> tuple[Float32 | None, bool]: ...

def pack_planes(codes: NDArray[np.uint8], parent_bits: int) -> list[NDArray[np.uint8]]: ...
def unpack_codes(planes: Sequence[NDArray[np.uint8]], bits: int, in_features: int) -> NDArray[np.uint8]: ...
def padded_cols(features: int) -> int: ...
def rms_norm(x: Float32, gain: Float32 | None, eps: float) -> Float32: ...
def rotate(x: Float32, signs: Float32, block: int, inverse: bool = False) -> Float32: ...
def swiglu(gate_up: Float32) -> Float32: ...
def exp(x: Float32) -> Float32: ...
def rope_tables(
    inv_freq: NDArray[np.float64], num_positions: int, attention_factor: float = 1.0
) -> tuple[Float32, Float32]: ...
def rope_store(
    qkv: Float32,
    heads: int,
    keys: NDArray[Any],
    values: NDArray[Any],
    position: int,
    cos: Float32,
    sin: Float32,
) -> None: ...
def attention(
    qkv: Float32, heads: int, keys: NDArray[Any], values: NDArray[Any], position: int, scale: float
) -> Float32: ...
def solve_nested(
    weights: Float32,
    hessian: Float32,
    factor: Float32,
    root: Float32,
    values: Float32,
    importance: Float32,
    scales: Float32,
    min_bits: int,
    max_bits: int,
    passes: int,
    refit_scales: bool,
) -> tuple[NDArray[np.uint8], Float32, Float32, Float32]: ...

class Outliers:
    def __init__(
        self,
        starts: NDArray[np.int32],
        columns: NDArray[np.uint16],
        values: NDArray[np.float16],
        in_features: int,
    ) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    def add_product(self, activations: Activations, out: Float32) -> None: ...
    def add_rows(self, indices: NDArray[np.int32] | NDArray[np.int64], out: Float32) -> None: ...

def fit_row_tables(
    weights: Float32,
    sensitivity: Float32,
    importance: Float32,
    min_bits: int,
    max_bits: int,
    cells: int,
    greedy: bool,
    seed: int,
) -> tuple[NDArray[np.uint8], Float32]: ...

class PlanesLayout:
    def __init__(self, kv_heads: int, head_dim: int, layers: Sequence[tuple[int, int, int, int]]) -> None: ...
    @property
    def upper_bytes(self) -> int: ...
    @property
    def lower_bytes(self) -> int: ...

class PlanesBlocks:
    def __init__(
        self,
        layout: PlanesLayout,
        upper: NDArray[np.uint8],
        lower: NDArray[np.uint8] | None,
        table: NDArray[np.int32],
        bits: NDArray[np.uint8],
        window: int,
    ) -> None: ...

def planes_rope_store(
    qkv: Float32, heads: int, blocks: PlanesBlocks, layer: int, position: int, cos: Float32, sin: Float32
) -> None: ...
def planes_attention(
    qkv: Float32, heads: int, blocks: PlanesBlocks, layer: int, position: int, scale: float
) -> Float32: ...
def anda_pack(
    x: NDArray[np.float16] | Float32,
    group_size: int,
    magnitude_bits: int,
    truncate: bool,
    words: NDArray[np.int64],
    exponents: NDArray[np.uint8],
) -> None: ...
def anda_unpack(
    words: NDArray[np.int64],
    exponents: NDArray[np.uint8],
    num_rows: int,
    num_values: int,
    group_size: int,
    magnitude_bits: int,
    bits: int,
    out: NDArray[np.float16] | Float32,
) -> None: ...
