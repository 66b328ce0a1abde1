"""The file of a diagonal Fisher, as `taper.quantize.fisher` writes it; reading needs no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from taper.errors import CorruptFileError, ModelNotFoundError
from taper.models.families import MatrixSource

Float32 = NDArray[np.float32]

_AGAIN = "measure it on the checkpoint that is quantised"


class FisherFile:
    """A file of `taper.quantize.fisher`: one float32 (out_features, in_features) a matrix, gains folded.

    Raises:
        ModelNotFoundError: no such file.
        CorruptFileError: no safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ModelNotFoundError(
                f"{path} is not there", hint="measure it: python -m taper.quantize.fisher HF_DIR TEXT -o FILE"
            )
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()

    def matrix(self, source: MatrixSource) -> Float32:
        """The figures of one matrix.

        Raises:
            CorruptFileError: they are missing, of another shape, negative or not finite.
        """
        try:
            with safe_open(self.path, framework="np") as file:
                figures: Float32 = file.get_tensor(source.name)
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(
                f"{self.path}: {source.name} cannot be read: {error}", hint=_AGAIN
            ) from error
        shape = (source.out_features, source.in_features)
        if figures.shape != shape or figures.dtype != np.float32:
            raise CorruptFileError(
                f"{self.path}: {source.name} is {figures.dtype} {figures.shape}, expected float32 {shape}",
                hint=_AGAIN,
            )
        if not (np.isfinite(figures).all() and figures.min() >= 0):
            raise CorruptFileError(
                f"{self.path}: {source.name} holds a negative figure or one that is not finite", hint=_AGAIN
            )
        return figures
