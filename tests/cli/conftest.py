"""Tiny files, and a command line that runs in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from taper.cli.main import execute
from taper.formats.container import TaperFile
from taper.testing.tiny import tiny_taper


class Outcome(NamedTuple):
    """What a command line did."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny model of 2 to 8 bits without a chat template."""
    return tiny_taper(tmp_path_factory.mktemp("cli") / "tiny.taper")


@pytest.fixture(scope="session")
def cut_model(model, tmp_path_factory) -> Path:
    """The first four planes of it."""
    path = tmp_path_factory.mktemp("cli") / "cut.taper"
    path.write_bytes(model.read_bytes()[: TaperFile.open(model).bytes_at(4)])
    return path


@pytest.fixture
def taper(capsys, monkeypatch) -> Callable[..., Outcome]:
    """Run a command line: taper("run", model, stdin="text"). Whatever fails, it must end with a status."""
    monkeypatch.delenv("TAPER_DEBUG", raising=False)

    def run(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = execute([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> Path:
    """A text of forty documents of forty words, to tune on."""
    random = np.random.default_rng(5)
    words = ["the", "cat", "hat", "in", "on", "and", "man", "ring", "stone", "is", "was", "old"]
    path = tmp_path_factory.mktemp("text") / "words.part.txt"
    path.write_text("\n<|endoftext|>\n".join(" ".join(random.choice(words, 40)) for _ in range(40)))
    return path


@pytest.fixture
def untied(tmp_path) -> Path:
    """A tiny model of 2 to 8 bits that a test may change."""
    return tiny_taper(tmp_path / "tiny.taper", tie_word_embeddings=False)
