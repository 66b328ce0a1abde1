"""Our side of the comparison: the reading of one .taper file that fits a number of bytes."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from taper.formats.container import TaperFile
from taper.formats.safetensors_header import TensorEntry, read_header
from taper.formats.spec import MatrixSpec
from taper.models import Decoder
from taper.models.parts import planed_parts

# Steps of a fractional budget: 0.01 bits of a weight are 0.3 % of the smallest files.
STEPS_PER_BIT = 100


@dataclass(frozen=True, slots=True)
class OurReading:
    """One reading of the file.

    Attributes:
        bits: what the reader was asked for.
        decoder: holds the reading's planes only, so the embedding look-up takes no others either.
        num_bytes: by `reading_bytes`.
        file_bytes: header, tokenizer, scales of all widths and the planes: the file's prefix for whole bits.
    """

    bits: float
    decoder: Decoder
    num_bytes: int
    file_bytes: int


def reading_bytes(
    entries: Mapping[str, TensorEntry], matrices: Sequence[MatrixSpec], widths: Mapping[str, int]
) -> int:
    """Bytes of the tensors that a reading takes: planes, scales and tables of its widths, and all small ones.

    That is the rule by which a GGUF file's tensors are counted: everything that the weights' values come
    from; neither vocabulary nor metadata, nor padding between tensors.

    Args:
        entries: all tensors of the file.
        matrices: of the file.
        widths: matrix name to planes read.
    """
    planes = sum(widths[spec.name] * spec.plane_bytes for spec in matrices)
    return planes + sum(_small_bytes(entry, widths) for entry in entries.values())


def _small_bytes(entry: TensorEntry, widths: Mapping[str, int]) -> int:
    matrix, _, kind = entry.name.rpartition(".")
    if matrix == "pad" or re.fullmatch(r"plane[0-9]+", kind):
        return 0
    if kind == "scales":  # a row for each width
        return entry.num_bytes // entry.shape[0]
    if kind == "tables":  # int8, in every row the 2^b values of each width
        return entry.shape[0] << widths[matrix]
    return entry.num_bytes


def budgets(min_bits: int, max_bits: int, fractions: bool) -> list[float]:
    """Bits that may be asked for, ascending: the whole widths, or budgets in steps of 1 / `STEPS_PER_BIT`.

    Between two whole widths a budget beats the width below it at nearly its bytes, so the whole numbers
    within the range are left out where fractions can be read.
    """
    if not fractions:
        return [float(bits) for bits in range(min_bits, max_bits + 1)]
    steps = range(min_bits * STEPS_PER_BIT, max_bits * STEPS_PER_BIT + 1)
    ends = (steps[0], steps[-1])
    return [step / STEPS_PER_BIT for step in steps if step % STEPS_PER_BIT or step in ends]


def largest_fitting(
    candidates: Sequence[float], num_bytes: Callable[[float], int], limit: int
) -> float | None:
    """The last candidate whose bytes are at most `limit`; None where even the first takes more.

    Args:
        candidates: bits, ascending.
        num_bytes: bytes of a reading, not falling with the bits.
        limit: bytes allowed.
    """
    fitting = bisect_right(candidates, limit, key=num_bytes)
    return candidates[fitting - 1] if fitting else None


class OurFile:
    """One .taper file and its readings, each made once.

    Args:
        file: open and whole.
    """

    def __init__(self, file: TaperFile) -> None:
        self.file = file
        self._whole = Decoder.from_taper(file)
        self._entries = read_header(file.path).entries
        self._candidates = budgets(file.min_bits, file.max_bits, self._whole.has_sensitivity)
        self._made: dict[tuple[int, ...], OurReading] = {}

    def num_bytes(self, bits: float) -> int:
        """Bytes of a reading, by `reading_bytes`."""
        return reading_bytes(self._entries, self.file.matrices, self._whole.widths(bits))

    def fitting(self, limit: int) -> OurReading | None:
        """The reading with the largest budget of at most `limit` bytes, None where there is none."""
        bits = largest_fitting(self._candidates, self.num_bytes, limit)
        return None if bits is None else self.reading(bits)

    def reading(self, bits: float) -> OurReading:
        """The reading at these bits; the same object for bits that give the same planes."""
        widths = self._whole.widths(bits)
        key = tuple(widths.values())
        if key not in self._made:
            decoder = Decoder(planed_parts(self.file, widths))
            self._made[key] = OurReading(bits, decoder, self.num_bytes(bits), self._whole.reading_bytes(bits))
        return self._made[key]
