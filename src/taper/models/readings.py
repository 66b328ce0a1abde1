"""From the bits of a reading to the planes that it takes of each matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from taper.errors import UsageError
from taper.formats.sensitivity import Sensitivity
from taper.formats.spec import MatrixSpec
from taper.precision.allocation import allocate, bits_per_weight
from taper.precision.policy import Bits, LayerBits

# A policy of its own may answer any number; each costs an allocation, milliseconds to a third of a second.
_MAX_KEPT = 1024


class Readings:
    """The widths that a model can be read at.

    Args:
        matrices: all of the model, each with its ceiling.
        min_bits, max_bits: the least and the largest width.
        sensitivity: what each matrix costs at each width; without it only whole numbers of bits can be read.
    """

    def __init__(
        self, matrices: Sequence[MatrixSpec], min_bits: int, max_bits: int, sensitivity: Sensitivity | None
    ) -> None:
        self._matrices = list(matrices)
        self._num_weights = {spec.name: spec.num_weights for spec in matrices}
        self._min_bits = min_bits
        self._max_bits = max_bits
        self._sensitivity = sensitivity
        layers = [spec.name.split(".") for spec in matrices]
        self._layer_of = [int(parts[1]) if parts[0] == "layers" else None for parts in layers]
        self._num_layers = 1 + max((index for index in self._layer_of if index is not None), default=-1)
        self._resolved = lru_cache(maxsize=_MAX_KEPT)(self._resolve)

    def widths(self, bits: Bits) -> Mapping[str, int]:
        """Matrix name to planes read.

        Args:
            bits: a whole number b reads b planes of every matrix, or all that a matrix has where they are
                fewer; a fraction is a budget in bits per weight, spent where the sensitivity says that it
                helps most. `LayerBits` reads the matrices of each layer as the model at the layer's bits.

        Raises:
            UsageError: bits outside the model, a fraction of a model without sensitivity, or bits of another
                number of layers.
        """
        return self._resolved(bits)

    def bits_per_weight(self, bits: Bits) -> float:
        """Planes read over weights, embedding and head included; a fraction reads no more than it says."""
        return bits_per_weight(self.widths(bits), self._num_weights)

    def _resolve(self, bits: Bits) -> dict[str, int]:
        return self._by_layer(bits) if isinstance(bits, LayerBits) else self._by_budget(bits)

    def _by_layer(self, bits: LayerBits) -> dict[str, int]:
        if len(bits.layers) != self._num_layers:
            raise UsageError(
                f"{len(bits.layers)} layers have bits, the model has {self._num_layers}",
                hint="give every layer its bits",
            )
        return {
            spec.name: self.widths(bits.head if layer is None else bits.layers[layer])[spec.name]
            for spec, layer in zip(self._matrices, self._layer_of, strict=True)
        }

    def _by_budget(self, bits: float) -> dict[str, int]:
        low, high = self._min_bits, self._max_bits
        if not low <= bits <= high:
            raise UsageError(
                f"{bits:g} bits are outside the model's {low}..{high}",
                hint=f"choose bits within {low}..{high}",
            )
        if bits == int(bits):
            return {spec.name: spec.width_at(int(bits)) for spec in self._matrices}
        if self._sensitivity is None:
            raise UsageError(
                f"{bits:g} bits: a fraction needs a file with sensitivity",
                hint="measure it: taper allocate FILE --text TEXT; or choose a whole number of bits",
            )
        budget = bits * sum(self._num_weights.values())
        return allocate(self._sensitivity.losses(low), self._num_weights, budget)
