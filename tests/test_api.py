"""The package's front door: three names, and nothing heavy behind the door."""

from __future__ import annotations

import subprocess
import sys

import pytest

import taper

HEAVY = ("numpy", "jinja2", "tokenizers", "safetensors", "torch")


def test_importing_taper_imports_nothing_heavy():
    code = f"import sys, taper, taper.errors, taper.config; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_resolve_to_the_engine():
    from taper import engine

    assert (taper.load, taper.LLM, taper.SamplingParams) == (engine.load, engine.LLM, engine.SamplingParams)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        _ = taper.nothing
