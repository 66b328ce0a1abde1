"""What a quantisation may be asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from taper.errors import UsageError
from taper.quantize.fisher_file import FisherFile
from taper.quantize.methods import MethodOptions
from taper.quantize.shrink import Budget
from taper.quantize.solver import SolverOptions


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Options of `quantize`; the defaults were measured (docs/quantization.md).

    Attributes:
        bits: least width that may be read, and number of planes.
        calibration_tokens: about how many tokens of the calibration text are read.
        seed: of the rotation signs.
        solver: see `SolverOptions`.
        sensitivity: measure what each matrix costs at each width and store it, for readings at a fraction of
            bits.
        budget: keep only the planes with the least predicted loss within it; measures the sensitivity, too.
        method: codebook and way of choosing codes.
        fisher: file of `taper.quantize.fisher` that weighs the weights of row tables and outliers; None takes
            the second moments of their inputs. Unrotated weights only.
    """

    bits: tuple[int, int] = (2, 8)
    calibration_tokens: int = 16384
    seed: int = 0
    solver: SolverOptions = field(default_factory=SolverOptions)
    sensitivity: bool = False
    budget: Budget | None = None
    method: MethodOptions = field(default_factory=MethodOptions)
    fisher: FisherFile | None = None

    def __post_init__(self) -> None:
        if self.fisher is not None and self.method.rotated:
            raise UsageError(
                "the diagonal Fisher is that of weights as they are, and the shared codebook rotates them",
                hint="choose --codebook row or row-greedy",
            )

    @property
    def is_measured(self) -> bool:
        """Whether the sensitivity is measured; a file of one width has nothing to choose by it."""
        return self.budget is not None or (self.sensitivity and self.bits[0] < self.bits[1])
