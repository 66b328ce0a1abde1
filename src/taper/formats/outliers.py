"""Weights that a file keeps beside the planes: compressed rows of float16 (docs/format.md, "Outliers")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_COLUMNS = 2**16  # columns are 16 bits wide
OUTLIER_PARTS = ("starts", "columns", "values")


@dataclass(frozen=True, slots=True)
class OutlierRows:
    """Outliers of one matrix, in the space of its planes (rotated where they are).

    Attributes:
        starts: int32 (out_features + 1); row n has the entries starts[n]..starts[n + 1] - 1.
        columns: uint16, rising within each row.
        values: float16, added to what the planes say.
    """

    starts: npt.NDArray[np.int32]
    columns: npt.NDArray[np.uint16]
    values: npt.NDArray[np.float16]

    def check(self, in_features: int) -> None:
        """Raise ValueError for rows that do not follow each other or columns that do not rise in range."""
        lengths = np.diff(self.starts.astype(np.int64))
        if self.starts[0] != 0 or self.starts[-1] != len(self.columns) or np.any(lengths < 0):
            raise ValueError(f"starts do not rise from 0 to {len(self.columns)}")
        if len(self.columns) != len(self.values):
            raise ValueError(f"{len(self.columns)} columns, {len(self.values)} values")
        if not len(self.columns):
            return
        if self.columns.max() >= in_features:
            raise ValueError(f"column {self.columns.max()}, but the matrix has {in_features}")
        rising = np.diff(self.columns.astype(np.int64)) > 0
        borders = self.starts[1:-1]
        rising[borders[(borders > 0) & (borders < len(self.columns))] - 1] = True
        if not rising.all():
            raise ValueError(f"columns do not rise at entry {int(np.argmin(rising)) + 1}")

    def dense(self, in_features: int) -> npt.NDArray[np.float32]:
        """The same as a float32 matrix (out_features, in_features) of mostly zeros."""
        matrix = np.zeros((len(self.starts) - 1, in_features), dtype=np.float32)
        rows = np.repeat(np.arange(len(matrix)), np.diff(self.starts))
        matrix[rows, self.columns] = self.values
        return matrix
