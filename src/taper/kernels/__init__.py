"""NumPy-facing operations over the native library. docs/numerics.md defines every result bit for bit."""

from __future__ import annotations

from taper.kernels.ops import (
    attention,
    available_isas,
    exp,
    isa,
    num_threads,
    prepare,
    prepare_swiglu,
    rms_norm,
    rope_store,
    rope_tables,
    rotate,
    set_num_threads,
    swiglu,
    use_isa,
)
from taper.kernels.planes import (
    Activations,
    Decoder,
    Outliers,
    Planes,
    hadamard_block,
    pack_planes,
    padded_cols,
    unpack_codes,
)

__all__ = [
    "Activations",
    "Decoder",
    "Outliers",
    "Planes",
    "attention",
    "available_isas",
    "exp",
    "hadamard_block",
    "isa",
    "num_threads",
    "pack_planes",
    "padded_cols",
    "prepare",
    "prepare_swiglu",
    "rms_norm",
    "rope_store",
    "rope_tables",
    "rotate",
    "set_num_threads",
    "swiglu",
    "unpack_codes",
    "use_isa",
]
