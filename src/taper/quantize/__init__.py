"""From float checkpoints to nested planes: calibration, codebook, solver, pipeline."""

from taper.quantize.codebook import NestedCodebook, gaussian_codebook
from taper.quantize.options import QuantizeOptions
from taper.quantize.pipeline import QuantizeReport, StoppedError, quantize
from taper.quantize.progress import Progress
from taper.quantize.shrink import Allocation, Budget, Shrinker
from taper.quantize.solver import Solution, SolverOptions, solve

__all__ = [
    "Allocation",
    "Budget",
    "NestedCodebook",
    "Progress",
    "QuantizeOptions",
    "QuantizeReport",
    "Shrinker",
    "Solution",
    "SolverOptions",
    "StoppedError",
    "gaussian_codebook",
    "quantize",
    "solve",
]
