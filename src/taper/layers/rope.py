"""Rotary position embedding: inverse frequencies of every scaling variant, and tables that grow with use.

The variants follow transformers' `modeling_rope_utils.py`, computed in float64. Sources: linear (position
interpolation, Chen et al. 2023, section 3), dynamic and yarn (Peng et al. 2023, sections 3.3 and 3.4), llama3
(the Llama 3.1 release), longrope (Ding et al. 2024, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from taper.config import ModelConfig
from taper.errors import UsageError
from taper.kernels import rope_tables

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

# Rows of the first table: enough for a short answer, 256 KiB at head_dim 128, built in under 1 ms.
FIRST_TABLE_TOKENS = 512


def context_length(config: ModelConfig) -> int:
    """Longest sequence that the position embedding is defined for, in tokens.

    `max_position_embeddings`, except where the checkpoints' convention is to leave it at the trained length:
    linear and yarn then reach factor times the original length. dynamic stays at the trained length: beyond
    it the variant changes the frequencies of every past key with each new token, which no cache of rotated
    keys can follow.
    """
    parameters = config.rope.parameters
    if config.rope.variant in ("linear", "yarn") and parameters.get("factor") is not None:
        original = _number(config, "original_max_position_embeddings", config.max_position_embeddings)
        return max(config.max_position_embeddings, int(original * _number(config, "factor")))
    return config.max_position_embeddings


def rotary_frequencies(config: ModelConfig, capacity: int) -> tuple[F64, float]:
    """Inverse frequencies, float64 (head_dim / 2), and the factor on cosine and sine.

    Args:
        config: the model; `config.rope` names the variant.
        capacity: tokens that the sequence may reach. longrope takes its long factors when this is beyond the
            original length, for the whole sequence, so that cached keys stay valid (transformers decides by
            the length so far).

    Raises:
        UsageError: for an unknown variant, a missing parameter or a partial rotation.
    """
    variant = _VARIANTS.get(config.rope.variant)
    if variant is None:
        raise UsageError(
            f"rope variant {config.rope.variant!r} is not known; known are {', '.join(_VARIANTS)}",
            hint="use a checkpoint with one of these variants",
        )
    if _number(config, "partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(
            f"partial_rotary_factor {config.rope.parameters['partial_rotary_factor']} is not 1",
            hint="use a checkpoint without partial_rotary_factor",
        )
    return variant(config, capacity)


class Rope:
    """Cosine and sine tables of one model, built as far as sequences have come.

    A table that doubles costs at most twice the rows in use; a 128k context does not pay for 128k rows up
    front.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._original = _original_length(config) if config.rope.variant == "longrope" else None
        self._tables: dict[bool, tuple[F32, F32]] = {}
        rotary_frequencies(config, 1)  # an unusable variant is refused when the model opens

    def tables(self, num_tokens: int, capacity: int) -> tuple[F32, F32]:
        """Cosine and sine, float32 (rows >= num_tokens, head_dim / 2), of a sequence of up to `capacity`."""
        long = self._original is not None and capacity > self._original
        built = self._tables.get(long)
        if built is not None and built[0].shape[0] >= num_tokens:
            return built
        doubled = FIRST_TABLE_TOKENS if built is None else 2 * built[0].shape[0]
        inv_freq, attention_factor = rotary_frequencies(self._config, capacity)
        rows = max(num_tokens, min(doubled, capacity))
        self._tables[long] = rope_tables(inv_freq, rows, attention_factor)
        return self._tables[long]


def _default(config: ModelConfig, capacity: int) -> tuple[F64, float]:
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    return 1.0 / config.rope.theta**exponents, 1.0


def _linear(config: ModelConfig, capacity: int) -> tuple[F64, float]:
    return _default(config, capacity)[0] / _number(config, "factor"), 1.0


def _yarn(config: ModelConfig, capacity: int) -> tuple[F64, float]:
    original = _original_length(config)
    factor = _number(config, "factor", config.max_position_embeddings / original)
    extrapolated = _default(config, capacity)[0]
    low = _yarn_dimension(config, original, _number(config, "beta_fast", 0) or 32.0)
    high = _yarn_dimension(config, original, _number(config, "beta_slow", 0) or 1.0)
    if config.rope.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    high += 0.001 if low == high else 0  # as transformers: no division by zero
    ramp = np.clip((np.arange(config.head_dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
    return extrapolated / factor * ramp + extrapolated * (1 - ramp), _yarn_attention_factor(config, factor)


def _yarn_dimension(config: ModelConfig, original: float, rotations: float) -> float:
    """The dimension that turns `rotations` times over the original context (Peng et al., section 3.2)."""
    turns = math.log(original / (rotations * 2 * math.pi))
    return config.head_dim * turns / (2 * math.log(config.rope.theta))


def _yarn_attention_factor(config: ModelConfig, factor: float) -> float:
    given = config.rope.parameters.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, all_dim = _number(config, "mscale", 0), _number(config, "mscale_all_dim", 0)
    if mscale and all_dim:
        return _yarn_mscale(factor, mscale) / _yarn_mscale(factor, all_dim)
    return _yarn_mscale(factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(config: ModelConfig, capacity: int) -> tuple[F64, float]:
    original = _original_length(config)
    factor, low, high = (_number(config, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    inv_freq = _default(config, capacity)[0]
    # Turns over the original context: above `high` kept, below `low` divided by the factor, between them
    # blended.
    smooth = np.clip((original * inv_freq / (2 * math.pi) - low) / (high - low), 0, 1)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq, 1.0


def _longrope(config: ModelConfig, capacity: int) -> tuple[F64, float]:
    original = _original_length(config)
    key = "long_factor" if capacity > original else "short_factor"
    factors = np.asarray(config.rope.parameters.get(key, ()), dtype=np.float64)
    if factors.shape != (config.head_dim // 2,):
        raise UsageError(
            f"rope parameter {key} has {factors.size} values, head_dim / 2 is {config.head_dim // 2}",
            hint="the checkpoint's config.json is incomplete; fetch it again",
        )
    factor = _number(config, "factor", config.max_position_embeddings / original)
    given = config.rope.parameters.get("attention_factor")
    computed = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return _default(config, capacity)[0] / factors, computed if given is None else float(given)


def _original_length(config: ModelConfig) -> float:
    return _number(config, "original_max_position_embeddings", config.max_position_embeddings)


def _number(config: ModelConfig, key: str, default: float | None = None) -> float:
    value: Any = config.rope.parameters.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(
            f"rope variant {config.rope.variant} needs the number {key}, found {value!r}",
            hint="the checkpoint's config.json is incomplete; fetch it again",
        )
    return float(value)


_VARIANTS: dict[str, Callable[[ModelConfig, int], tuple[F64, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,  # within the trained length, which context_length holds, its base is unchanged
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
