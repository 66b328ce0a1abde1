"""What each matrix of a model costs at each width, as a file stores it (docs/format.md, `sensitivity`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The measured price of each matrix and width, everything else being read at all its planes.

    Attributes:
        kl: matrix name to the mean KL divergence from the reference, in nats, of each width from the file's
            least one up; what the file loses at all its planes is taken off.
        measured_bits: the widths that were measured; the others follow the solver's relative errors.
        reference: the name of the float checkpoint, or `N bits` for the file itself at all its planes.
        text: name of the text.
        num_tokens: tokens that were read.
    """

    kl: dict[str, list[float]]
    measured_bits: tuple[int, ...]
    reference: str
    text: str
    num_tokens: int

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], num_widths: Mapping[str, int]) -> Sensitivity:
        """Read the metadata.

        Args:
            raw: what `to_dict` gives.
            num_widths: matrix name to the number of its widths.

        Raises:
            KeyError: an entry is missing.
            TypeError, ValueError: an entry of another type or outside its range.
        """
        measured, texts = raw["measured_bits"], (raw["reference"], raw["text"])
        if not isinstance(measured, list) or not all(type(bits) is int for bits in measured):
            raise TypeError(f"sensitivity measured_bits {measured!r} is not a list of widths")
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"sensitivity reference and text {texts!r} are not strings")
        if type(raw["num_tokens"]) is not int or raw["num_tokens"] < 1:
            raise ValueError(f"sensitivity num_tokens {raw['num_tokens']!r} is not a count")
        kl = checked_figures("sensitivity", raw["kl"], num_widths)
        return cls(kl, tuple(measured), *texts, raw["num_tokens"])

    def to_dict(self) -> dict[str, Any]:
        """As in the `sensitivity` metadata."""
        return {
            "kl": self.kl,
            "measured_bits": list(self.measured_bits),
            "reference": self.reference,
            "text": self.text,
            "num_tokens": self.num_tokens,
        }

    def cut(self, num_widths: Mapping[str, int]) -> Sensitivity:
        """The same with fewer widths of some matrices, for a file that holds fewer planes of them."""
        return replace(self, kl={name: row[: num_widths[name]] for name, row in self.kl.items()})

    def losses(self, min_bits: int) -> dict[str, dict[int, float]]:
        """Matrix name to width to KL, what `taper.precision.allocation` takes."""
        return {name: dict(enumerate(row, min_bits)) for name, row in self.kl.items()}


def checked_figures(key: str, raw: Any, num_widths: Mapping[str, int]) -> dict[str, list[float]]:
    """A finite figure of at least 0 for every matrix and width.

    Raises:
        TypeError, ValueError: naming the first entry that is not one.
    """
    if not isinstance(raw, dict) or set(raw) != set(num_widths):
        raise ValueError(f"{key} is not that of the matrices in the file")
    for name, row in raw.items():
        if not isinstance(row, list) or len(row) != num_widths[name]:
            raise ValueError(f"{key} of {name} needs {num_widths[name]} figures, one a width")
        for figure in row:
            if isinstance(figure, bool) or not isinstance(figure, int | float):
                raise TypeError(f"{key} of {name} holds {figure!r}, not a number")
            if not (math.isfinite(figure) and figure >= 0):
                raise ValueError(f"{key} of {name} holds {figure}, not a finite number of at least 0")
    return {name: [float(figure) for figure in raw[name]] for name in num_widths}
