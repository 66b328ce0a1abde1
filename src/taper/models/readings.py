"""From the bits of a reading to the planes that it takes of each matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from taper.errors import UsageError
from taper.formats.sensitivity import Sensitivity
from taper.formats.spec import MatrixSpec
from taper.precision.allocation import allocate, bits_per_weight

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
        self._resolved = lru_cache(maxsize=_MAX_KEPT)(self._resolve)

    def widths(self, bits: float) -> Mapping[str, int]:
        """Matrix name to planes read.

        Args:
            bits: a whole number b reads b planes of every matrix, or all that a matrix has where they are
                fewer; a fraction is a budget in bits per weight, spent where the sensitivity says that it
                helps most.

        Raises:
            UsageError: bits outside the model, or a fraction of a model without sensitivity.
        """
        return self._resolved(bits)

    def bits_per_weight(self, bits: float) -> float:
        """Planes read over weights, embedding and head included; a fraction reads no more than it says."""
        return bits_per_weight(self.widths(bits), self._num_weights)

    def _resolve(self, bits: float) -> dict[str, int]:
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
