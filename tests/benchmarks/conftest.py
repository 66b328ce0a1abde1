"""The benchmarks are scripts, not a package: their folders join the search path, as when they are run."""

import sys
from pathlib import Path

_BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
_ROOMS = ("anda", "dftsp", "end_to_end", "llama_cpp", "pmpd", "precision", "quality", "serving")
sys.path += [str(_BENCHMARKS / name) for name in _ROOMS]
