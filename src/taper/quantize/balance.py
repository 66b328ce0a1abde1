"""What is moved out of a matrix before its weights are rotated and coded: column scales, and the inputs'
mean.

Scales. With x' = g x and W' = W / g the product is the same. After a rotation every weight of a row is
rounded with one step, so the error's energy goes with (sum_j w_j / g_j^2) (sum_j h_j g_j^2), where w_j is
the energy of column j and h_j that of its input: least at g_j = (w_j / h_j)^(1/4), by Cauchy and Schwarz.
SmoothQuant (arXiv 2211.10438, equation 4) and AWQ (arXiv 2306.00978, section 3.2) scale the same way
without a rotation and look for the exponent. A matrix after a norm gets the scales as a gain; those of
`o` and `down` go into the rows that make their inputs.

Mean. An error E of the weights moves the output by E mean(x) on average. Each width has that much as a
bias, so the codes only need to be good for what is left, E[x x^T] - mean mean^T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taper.config import ModelConfig
from taper.quantize.calibrate import Moments
from taper.quantize.half import check_float16

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
ReadWeights = Callable[[str], Float32]

# Columns or inputs that are never used would get a scale without bound; with this share of the mean energy
# added no scale is beyond about 5 times the usual one.
_LEAST_SHARE = 1e-3


@dataclass(frozen=True, slots=True)
class Adjustment:
    """How a matrix is changed before its rotation.

    Attributes:
        gain: float32 (in_features): the columns are divided by it; None changes nothing. The file holds it
            where a norm precedes, else the rows that make the inputs have it.
        rows: float32 (out_features): the rows are multiplied by it, for the matrix that reads their output.
    """

    gain: Float32 | None = None
    rows: Float32 | None = None

    def apply(self, weights: Float32) -> Float32:
        """The changed weights, float32 (out_features, in_features), a new array where anything changes."""
        if self.rows is not None:
            weights = weights * self.rows[:, None]
        return weights if self.gain is None else weights / self.gain


def column_scales(weight_energy: Float64, input_energy: Float64) -> Float32:
    """The scales g, float32 (in_features), with a geometric mean of 1.

    Args:
        weight_energy: sum of squares of each column, (in_features).
        input_energy: variance of each input, (in_features).
    """
    logarithms = 0.25 * np.log(_floored(weight_energy) / _floored(input_energy))
    scales: Float32 = np.exp(logarithms - logarithms.mean()).astype(np.float32)
    return scales


def balance_layer(
    config: ModelConfig, index: int, moments: Mapping[str, Moments], read: ReadWeights
) -> dict[str, Adjustment]:
    """The adjustments of a layer's four matrices, by name.

    Args:
        config: the model.
        index: of the layer.
        moments: of the four matrices' inputs.
        read: gives a matrix's weights, float32 (out_features, in_features).
    """
    at = f"layers.{index}"
    value_gain = _folded_gain(config, _energies(read(f"{at}.o")), moments[f"{at}.o"].variances())
    hidden_gain = column_scales(_energies(read(f"{at}.down")), moments[f"{at}.down"].variances())
    group, dim = config.num_heads // config.num_kv_heads, config.head_dim
    queries_and_keys = np.ones((config.num_heads + config.num_kv_heads) * dim, dtype=np.float32)
    qkv_rows = np.concatenate([queries_and_keys, value_gain])
    gate_up_rows = np.concatenate([np.ones(config.intermediate_size, dtype=np.float32), hidden_gain])
    every_head = np.repeat(value_gain.reshape(config.num_kv_heads, 1, dim), group, axis=1).ravel()
    return {
        f"{at}.qkv": balance_normed(read(f"{at}.qkv"), moments[f"{at}.qkv"], qkv_rows),
        f"{at}.o": Adjustment(every_head),
        f"{at}.gate_up": balance_normed(read(f"{at}.gate_up"), moments[f"{at}.gate_up"], gate_up_rows),
        f"{at}.down": Adjustment(hidden_gain),
    }


def balance_normed(weights: Float32, moments: Moments, rows: Float32 | None = None) -> Adjustment:
    """The adjustment of a matrix after a norm; `rows` (out_features) are those of `Adjustment`."""
    scaled = weights if rows is None else weights * rows[:, None]
    return Adjustment(column_scales(_energies(scaled), moments.variances()), rows)


def width_offsets(errors: Float32, mean: Float32) -> NDArray[np.float16]:
    """What a width's codes lose on the mean input: float16 (out_features) of (W - Q) mean.

    Args:
        errors: float32 (out_features, in_features), W - Q at one width.
        mean: float32 (in_features), in the space of the weights.

    Raises:
        TaperError: an offset is beyond float16.
    """
    exact = errors @ mean
    check_float16(float(np.abs(exact).max()), "a width has a bias")
    offsets: NDArray[np.float16] = exact.astype(np.float16)
    return offsets


def _folded_gain(config: ModelConfig, weight_energy: Float64, input_energy: Float64) -> Float32:
    """Scales of the values, (kv_heads * head_dim): heads of a group read the same ones."""
    shape = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    shared = (energy.reshape(shape).sum(axis=1).ravel() for energy in (weight_energy, input_energy))
    return column_scales(*shared)


def _energies(weights: Float32) -> Float64:
    energies: Float64 = np.einsum("ij,ij->j", weights, weights, dtype=np.float64)
    return energies


def _floored(energy: Float64) -> Float64:
    mean = float(energy.mean())
    return energy + (_LEAST_SHARE * mean if mean > 0 else 1.0)
