"""Their side of the comparison: one checkpoint in llama.cpp's formats, with and without importance matrix."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from build import Peer
from checkpoint import input_squares, tensor_bytes, write_checkpoint, write_imatrix
from gguf_models import quantize_gguf
from numpy.typing import NDArray

from taper.formats.huggingface import HfCheckpoint

FORMATS = ("IQ2_XS", "Q2_K", "IQ3_XXS", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
# llama-quantize refuses the first without an importance matrix, and gives the second other tensor types.
NEED_IMATRIX = ("IQ2_XS", "IQ3_XXS")
# The quantiser of Q8_0 takes no importance matrix.
IGNORE_IMATRIX = ("Q8_0",)
DIGEST_DIGITS = 12


@dataclass(frozen=True, slots=True)
class PeerFile:
    """One quantised GGUF file.

    Attributes:
        format: llama-quantize's name of the type.
        imatrix: whether the importance matrix was used.
        path: the file.
        num_bytes: of all its tensors.
    """

    format: str
    imatrix: bool
    path: Path
    num_bytes: int

    @property
    def name(self) -> str:
        """Format, and `imatrix` where one was used."""
        return f"{self.format} imatrix" if self.imatrix else self.format


def variants(formats: Sequence[str]) -> list[tuple[str, bool]]:
    """Format and whether an importance matrix is used: once without and once with, where it makes sense."""
    plain = [(name, False) for name in formats if name not in NEED_IMATRIX]
    weighted = [(name, True) for name in formats if name not in IGNORE_IMATRIX]
    return sorted(plain + weighted, key=lambda variant: (formats.index(variant[0]), variant[1]))


class PeerModels:
    """The files of one checkpoint; those that are there already are used again.

    Args:
        checkpoint: the float model.
        peer: whose llama-quantize is used.
        directory: gets a folder named after the checkpoint and its digest.
    """

    def __init__(self, checkpoint: HfCheckpoint, peer: Peer, directory: Path) -> None:
        name = f"{checkpoint.folder.resolve().name}-{checkpoint.fingerprint[:DIGEST_DIGITS]}"
        self._checkpoint = checkpoint
        self._peer = peer
        self._folder = directory / name
        self._folder.mkdir(parents=True, exist_ok=True)

    def float_file(self) -> Path:
        """The checkpoint in F32."""
        path = self._folder / "F32.gguf"
        if not path.exists():
            write_checkpoint(self._checkpoint, path)
        return path

    def imatrix(self, tokens: NDArray[np.int32], source: str) -> Path:
        """The importance matrix of these calibration tokens, int32 (sequences, tokens)."""
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()[:DIGEST_DIGITS]
        path = self._folder / f"imatrix-{digest}.gguf"
        if not path.exists():
            write_imatrix(path, input_squares(self._checkpoint, tokens), tokens, source)
        return path

    def quantized(self, formats: Sequence[str], imatrix: Path) -> list[PeerFile]:
        """All `variants` of the formats."""
        return [
            self._file(format_name, imatrix if weighted else None)
            for format_name, weighted in variants(formats)
        ]

    def _file(self, format_name: str, imatrix: Path | None) -> PeerFile:
        suffix = "" if imatrix is None else f"-{imatrix.stem}"
        path = self._folder / f"{format_name}{suffix}.gguf"
        if not path.exists():
            quantize_gguf(self._peer, self.float_file(), path, format_name, imatrix)
        return PeerFile(format_name, imatrix is not None, path, tensor_bytes(path))
