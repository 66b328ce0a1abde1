"""Token embeddings: rows of the planes, turned back, or rows of a float32 matrix."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from taper.kernels import Outliers, Planes, rotate
from taper.layers.linear import Rotation

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


class Embedding(Protocol):
    """Looks token ids up."""

    def __call__(self, tokens: I32) -> F32:
        """Float32 (tokens, hidden), a new array."""
        ...

    def row_bytes(self) -> int:
        """Bytes that the look-up of one token reads."""
        ...


class PlanedEmbedding:
    """Rows of nested planes, always at the file's largest width: a row is little (docs/numerics.md).

    `native` is the same, as `taper.kernels.Decoder` takes it.
    """

    def __init__(
        self,
        planes: Planes,
        rotation: Rotation,
        outliers: Outliers | None = None,
        gain: F32 | None = None,
    ) -> None:
        self._planes = planes
        self._rotation = rotation
        self._outliers = outliers
        self._gain = gain
        self.native = (planes, outliers, rotation.signs, rotation.block, gain)

    def __call__(self, tokens: I32) -> F32:
        """See `Embedding`."""
        rows = self._planes.rows(tokens, self._planes.max_bits)
        if self._outliers is not None:
            self._outliers.add_rows(tokens, rows)
        found = rotate(rows, self._rotation.signs, self._rotation.block, inverse=True)
        if self._gain is not None:
            found *= self._gain
        return found

    def row_bytes(self) -> int:
        """See `Embedding`: the row of every plane, its scale, its bias as a head counts it, and the mean row
        of outliers."""
        outliers = 0 if self._outliers is None else self._outliers.num_bytes
        return (self._planes.bytes_read(self._planes.max_bits) + outliers) // self._planes.out_features


class FloatEmbedding:
    """Rows of a float32 matrix (vocab, hidden)."""

    def __init__(self, weight: F32) -> None:
        self._weight = weight

    def __call__(self, tokens: I32) -> F32:
        """See `Embedding`."""
        return self._weight[tokens]

    def row_bytes(self) -> int:
        """See `Embedding`."""
        return int(self._weight[0].nbytes)
