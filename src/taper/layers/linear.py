"""Linear layers: over bit planes, and over a float32 matrix. Both take the step before them along.

What precedes a product (norm, SwiGLU, nothing) belongs to the layer, because over planes it is one native
call with the rotation and the quantisation of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from taper.kernels import Activations, Outliers, Planes, prepare, prepare_swiglu, rms_norm, swiglu

F32 = npt.NDArray[np.float32]

_INT8_BITS = 7


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm before a product. `gain` is None where it is folded into the weight's columns."""

    eps: float
    gain: F32 | None = None


@dataclass(frozen=True, slots=True)
class Swiglu:
    """silu(gate) * up before a product; the input holds gate and up side by side."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotation of a matrix's input side: float32 signs (in_features) of +-1 and the Hadamard block."""

    signs: F32
    block: int


Before = Norm | Swiglu | None


class Linear(Protocol):
    """y = W f(x) + bias (+ residual), f being the step before. All arrays float32, (tokens, features)."""

    in_features: int
    out_features: int

    def __call__(self, x: F32, bits: int, residual: F32 | None = None) -> F32:
        """A new array (tokens, out_features); `residual` has that shape and is added last."""
        ...

    def product_input(self, x: F32) -> F32:
        """f(x), (tokens, in_features): what the matrix is multiplied with, before any rotation."""
        ...

    def bytes_read(self, bits: int) -> int:
        """Bytes of weights that one call reads."""
        ...


class PlanedLinear:
    """A matrix as nested bit planes, multiplied in integers with integer activations (docs/numerics.md).

    Args:
        planes: the matrix.
        rotation: of its input side.
        before: the step before the product.
        outliers: weights beside the planes.
        activation_bits: magnitude bits of the activations at each width; int8's 7 where it says nothing.

    Attributes:
        native: the same, as `taper.kernels.Decoder` takes it.
    """

    def __init__(
        self,
        planes: Planes,
        rotation: Rotation,
        before: Before = None,
        outliers: Outliers | None = None,
        activation_bits: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.in_features = planes.in_features
        self.out_features = planes.out_features
        self._planes_bytes = planes.bytes_read
        self._matmul = planes.matmul
        self.product_input = _product_input(before)
        norm = before if isinstance(before, Norm) else None
        widths = range(planes.min_bits, planes.max_bits + 1)
        self.native = (
            planes,
            outliers,
            rotation.signs,
            rotation.block,
            None if norm is None else norm.eps,
            None if norm is None else norm.gain,
            {bits: activation_bits.get(bits, _INT8_BITS) for bits in widths},
        )
        self._prepare = {
            bits: _preparation(planes.cols, rotation, before, activation_bits.get(bits, _INT8_BITS))
            for bits in widths
        }
        self._outliers = outliers

    def __call__(self, x: F32, bits: int, residual: F32 | None = None) -> F32:
        """See `Linear`; `bits` is within the planes' min_bits..max_bits."""
        activations = self._prepare[bits](x)
        y = self._matmul(activations, bits, residual)
        if self._outliers is not None:
            self._outliers.add_product(activations, y)
        return y

    def bytes_read(self, bits: int) -> int:
        """See `Linear`: planes, row scales, biases, tables and outliers."""
        outliers = 0 if self._outliers is None else self._outliers.num_bytes
        return self._planes_bytes(bits) + outliers


class FloatLinear:
    """A float32 matrix (out_features, in_features); `bits` changes nothing."""

    def __init__(self, weight: F32, bias: F32 | None = None, before: Before = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.product_input = _product_input(before)
        self._transposed = weight.T
        self._bias = bias
        self._bytes = weight.nbytes

    def __call__(self, x: F32, bits: int, residual: F32 | None = None) -> F32:
        """See `Linear`."""
        y: F32 = self.product_input(x) @ self._transposed
        if self._bias is not None:
            y += self._bias
        if residual is not None:
            y += residual
        return y

    def bytes_read(self, bits: int) -> int:
        """See `Linear`."""
        return self._bytes


def _preparation(
    cols: int, rotation: Rotation, before: Before, magnitude_bits: int
) -> Callable[[F32], Activations]:
    made = partial(
        prepare_swiglu if isinstance(before, Swiglu) else prepare,
        cols=cols,
        signs=rotation.signs,
        block=rotation.block,
        magnitude_bits=magnitude_bits,
    )
    return partial(made, eps=before.eps, gain=before.gain) if isinstance(before, Norm) else made


def _product_input(before: Before) -> Callable[[F32], F32]:
    if before is None:
        return _unchanged
    if isinstance(before, Swiglu):
        return swiglu
    eps, gain = before.eps, before.gain
    return lambda x: rms_norm(x, gain, eps)


def _unchanged(x: F32) -> F32:
    return x
