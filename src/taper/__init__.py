"""Taper: language models where memory is scarce, at the bits each token needs.

import taper

llm = taper.load()  # the model in the package; or a .taper file, or a Hugging Face folder
for piece in llm.stream("Once upon a time", policy="progressive", max_tokens=64):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taper.engine import LLM, SamplingParams, load

__all__ = ["LLM", "SamplingParams", "__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the engine, and NumPy with it, only when it is asked for: `taper --help` needs neither."""
    if name in __all__:
        return getattr(importlib.import_module("taper.engine"), name)
    raise AttributeError(f"module 'taper' has no attribute {name!r}")
