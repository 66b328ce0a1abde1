"""The frame around every command: help, statuses, one line for an error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from taper.cli import inspect as inspect_command
from taper.cli.main import COMMANDS, execute

HEAVY = ("numpy", "rich", "jinja2", "tokenizers", "safetensors", "taper.kernels", "taper.engine")


def test_help_lists_every_command_and_imports_none_of_what_they_need():
    code = (
        "import sys; from taper.cli.main import execute; execute(['--help']);"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    for name, text in COMMANDS.items():
        assert name in result.stdout
        assert text in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(taper, name):
    outcome = taper(name, "--help")
    assert outcome.status == 0
    assert f"Usage: taper {name}" in outcome.out


def test_no_command_shows_the_help(taper):
    assert taper().out == taper("--help").out
    assert taper().status == 0


def test_unknown_command_and_option_are_usage(taper):
    outcome = taper("fly")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == "error: No such command 'fly'\nhint: see taper --help\n"
    outcome = taper("run", "--wings")
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1] == "hint: see taper run --help"


def test_missing_other_and_corrupt_files_have_their_status(taper, model, tmp_path):
    assert taper("inspect", tmp_path / "none.taper").status == 3
    other = tmp_path / "other.taper"
    other.write_bytes(b"GGUF" + bytes(60))
    outcome = taper("run", other, "Once")
    assert outcome.status == 3
    assert "looks like a GGUF file" in outcome.err
    damaged = bytearray(model.read_bytes())
    damaged[100] ^= 1
    other.write_bytes(damaged)
    outcome = taper("run", other, "Once")
    assert outcome.status == 5
    assert outcome.err.startswith("error: ")
    assert outcome.err.splitlines()[1].startswith("hint: ")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (MemoryError(), 4, "error: out of memory\n"),
        (RuntimeError("first\nsecond"), 1, "error: RuntimeError: first\n"),
    ],
)
def test_other_failures_are_one_line(taper, model, monkeypatch, error, status, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(inspect_command, "describe", fail)
    outcome = taper("inspect", model)
    assert outcome.status == status
    assert outcome.err.startswith(message)


def test_debug_shows_where(model, monkeypatch):
    monkeypatch.setenv("TAPER_DEBUG", "1")
    with pytest.raises(Exception, match="no such file"):
        execute(["inspect", f"{model}.none"])
