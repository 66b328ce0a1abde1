"""A file with fewer planes of some matrices: widths for a budget, and the file that holds just those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from taper.errors import CorruptFileError, DoesNotFitError, UsageError
from taper.formats.container import TaperFile
from taper.formats.sensitivity import Sensitivity
from taper.formats.spec import FINAL_NORM, MatrixSpec, PlanedMatrix, TaperHeader, table_columns
from taper.formats.writer import described_bytes, write_taper
from taper.precision import parse_policy
from taper.precision.allocation import allocate, bits_per_weight, predicted_loss


@dataclass(frozen=True, slots=True)
class Budget:
    """What an allocation may take: exactly one of the two.

    Attributes:
        bits_per_weight: planes over weights, embedding and head included.
        target_bytes: the whole file: header, tokenizer, scales and planes.
        reserved_bytes: of the target, left for a quality card that is written later.
    """

    bits_per_weight: float | None = None
    target_bytes: int | None = None
    reserved_bytes: int = 0

    def __post_init__(self) -> None:
        if (self.bits_per_weight is None) == (self.target_bytes is None):
            raise UsageError(
                "a budget is bits per weight or a file size, one of them",
                hint="give --bits-per-weight or --target-size",
            )

    def to_dict(self) -> dict[str, Any]:
        """The one that is given, by its name."""
        if self.target_bytes is not None:
            return {"target_bytes": self.target_bytes}
        return {"bits_per_weight": self.bits_per_weight}


@dataclass(frozen=True, slots=True)
class Allocation:
    """Planes of every matrix.

    Attributes:
        widths: matrix name to planes.
        bits_per_weight: planes over weights.
        file_bytes: size of the file that holds just these planes.
        predicted_kl: sum of the matrices' measured divergences, in nats.
    """

    widths: dict[str, int]
    bits_per_weight: float
    file_bytes: int
    predicted_kl: float


class Shrinker:
    """Cuts a file to a budget.

    Args:
        file: whole.
        budget: in bits per weight or bytes of the file.
        sensitivity: to allocate by and to store; None takes the file's.

    Raises:
        CorruptFileError: a file that is cut off.
        UsageError: a file without sensitivity.
    """

    def __init__(self, file: TaperFile, budget: Budget, sensitivity: Sensitivity | None = None) -> None:
        known = sensitivity or file.sensitivity
        if file.is_truncated:
            raise CorruptFileError(f"{file.path} is cut off", hint="copy or download the file again")
        if known is None:
            raise UsageError(
                f"{file.path} holds no sensitivity, so nothing says where bits help",
                hint=f"measure it: taper allocate {file.path} --text TEXT",
            )
        self._file = file
        self._budget = budget
        self._sensitivity = known
        self._losses = known.losses(file.min_bits)
        self._num_weights = {spec.name: spec.num_weights for spec in file.matrices}

    def fit(self) -> Allocation:
        """The widths with the least predicted loss within the budget.

        Raises:
            UsageError: bits per weight outside the file's widths.
            DoesNotFitError: the file at its least width is larger than the target.
        """
        widths = self._within_bytes() if self._budget.target_bytes is not None else self._within_bits()
        return Allocation(
            widths,
            bits_per_weight(widths, self._num_weights),
            self._file_bytes(widths),
            predicted_loss(self._losses, widths),
        )

    def write(self, out: str | Path, widths: Mapping[str, int]) -> None:
        """Write a file with these planes of each matrix; the codes and scales stay what they are.

        The quality card is left out, since it tells of other readings, and so are policies whose bits are no
        longer there.

        Args:
            out: the file to write, another one than the file to read.
            widths: matrix name to planes, as `fit` gives.

        Raises:
            DoesNotFitError, UsageError: as `write_taper`.
        """
        header = self._header(widths)
        norm = {FINAL_NORM: self._file.tensor(FINAL_NORM)}
        write_taper(out, header, lambda: self._matrices(header), norm)

    def _within_bits(self) -> dict[str, int]:
        bits, low, high = self._budget.bits_per_weight, self._file.min_bits, self._file.max_bits
        assert bits is not None
        if not low <= bits <= high:
            raise UsageError(
                f"{bits:g} bits per weight are outside the file's {low}..{high}",
                hint=f"choose within {low}..{high}",
            )
        return allocate(self._losses, self._num_weights, bits * self._file.num_weights)

    def _within_bytes(self) -> dict[str, int]:
        """The header's length follows the widths in a way of its own, so the planes' budget starts at what
        the least file leaves and shrinks by what the result is too large, until it is not.
        """
        file = self._file
        assert self._budget.target_bytes is not None
        target = self._budget.target_bytes - self._budget.reserved_bytes
        least = {spec.name: file.min_bits for spec in file.matrices}
        least_bytes = self._file_bytes(least)
        if least_bytes > target:
            raise DoesNotFitError(
                f"the file takes {least_bytes:,} bytes at {file.min_bits} bits, more than {target:,}",
                hint=f"ask for at least {least_bytes:,} bytes",
            )
        sizes = {spec.name: spec.plane_bytes + self._width_bytes(spec) for spec in file.matrices}
        floor = file.min_bits * sum(sizes.values())
        budget = floor + target - least_bytes
        while budget > floor:
            widths = allocate(self._losses, sizes, budget)
            excess = self._file_bytes(widths) - target
            if excess <= 0:
                return widths
            budget -= excess
        return least

    def _width_bytes(self, spec: MatrixSpec) -> int:
        """Bytes of float16 scales and offsets that one more width of a matrix costs."""
        rows = int(len(self._file.tensor(f"{spec.name}.scales")) > 1) + int(spec.has_offsets)
        return 2 * rows * spec.out_features

    def _file_bytes(self, widths: Mapping[str, int]) -> int:
        rows = {
            name: min(len(self._file.tensor(f"{name}.scales")), bits - self._file.min_bits + 1)
            for name, bits in widths.items()
        }
        outliers = {name: self._file.matrix(name).outliers for name in widths}
        counts = {name: len(found.columns) for name, found in outliers.items() if found is not None}
        return described_bytes(self._header(widths), rows, counts)

    def _header(self, widths: Mapping[str, int]) -> TaperHeader:
        old, low, high = self._file.header, self._file.min_bits, max(widths.values())
        num_widths = {name: bits - low + 1 for name, bits in widths.items()}
        return replace(
            old,
            max_bits=high,
            codebook=old.codebook.cut(high),
            planes={name: bits for name, bits in widths.items() if bits < high},
            card={},
            learned=None,
            policies={name: text for name, text in old.policies.items() if _fits(text, low, high)},
            provenance={**old.provenance, "allocation": self._budget.to_dict()},
            sensitivity=self._sensitivity.cut(num_widths),
            relative_errors={name: row[: num_widths[name]] for name, row in old.relative_errors.items()},
        )

    def _matrices(self, header: TaperHeader) -> Iterator[PlanedMatrix]:
        for spec in header.matrices:
            matrix, width = self._file.matrix(spec.name), spec.width_at(header.max_bits)
            levels = width - header.min_bits + 1
            tables = matrix.tables
            if tables is not None:
                tables = np.ascontiguousarray(tables[:, : table_columns(header.min_bits, width)])
            yield replace(
                matrix,
                spec=spec,
                planes=matrix.planes[:width],
                scales=matrix.scales[:levels],
                tables=tables,
                offsets=None if matrix.offsets is None else matrix.offsets[:levels],
            )


def _fits(policy: str, min_bits: int, max_bits: int) -> bool:
    try:
        parse_policy(policy, min_bits, max_bits, allows_fractions=True)
    except UsageError:
        return False
    return True
