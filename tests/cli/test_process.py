"""Whole processes: signals, pipes that close, and what they leave behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from taper.formats.container import TaperFile
from taper.testing.tiny import tiny_hf_dir

TAPER = (sys.executable, "-m", "taper")


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [*TAPER, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )


def heed_interrupts() -> None:
    """A test run started in the background passes an ignored SIGINT on to its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_bench_quietly(cut_model, number, status):
    process = start("bench", cut_model, "--prompt", "0", "--repeat", "1000000")
    assert "note: file is cut off" in process.stderr.readline()
    out, err = signal_until_it_ends(process, number)
    assert process.returncode == status
    assert "Traceback" not in err
    assert out == ""


def signal_until_it_ends(process: subprocess.Popen[str], number: int) -> tuple[str, str]:
    """As a person would: Python loses an interrupt that falls into a callback of its own imports."""
    for _ in range(10):
        process.send_signal(number)
        try:
            return process.communicate(timeout=3)
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    raise AssertionError(f"signal {number} did not end the process")


def test_interrupted_quantize_goes_on_to_the_same_bytes(taper, tmp_path):
    folder = tiny_hf_dir(tmp_path / "hf", num_layers=3)
    text = tmp_path / "text.txt"
    text.write_text("The sailor and the stone in the water of the old town. " * 90)
    options = ("--bits", "2-3", "--calibration", text, "--calibration-tokens", "256")
    out, partial = tmp_path / "out.taper", tmp_path / "out.taper.partial"
    process = start("quantize", folder, "-o", out, *options)
    wait_for_matrices(process, partial)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "run the same command to go on" in err
    assert not out.exists()
    whole = tmp_path / "whole.taper"
    for target in (out, whole):
        assert taper("quantize", folder, "-o", target, *options).status == 0
    assert out.read_bytes() == whole.read_bytes()
    assert TaperFile.open(out).verify() == []
    assert not partial.exists()


def wait_for_matrices(process: subprocess.Popen[str], partial: Path) -> None:
    """Until the first matrix is kept."""
    deadline = time.monotonic() + 60
    while not (partial.is_dir() and any(partial.glob("*.safetensors"))):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_device_is_one_line(model):
    with open("/dev/full", "w") as full:
        command = [*TAPER, "inspect", str(model)]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 4
    assert result.stderr == "error: no room left on the device: standard output\nhint: free some room\n"


def test_reader_that_goes_away_is_no_error(model):
    process = start("inspect", model, "--json")
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == ""
