"""The serving benchmarks, small: they run, and they would see what they look for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("starlette", "msgspec", "prometheus_client", "uvicorn", "llguidance"):
    pytest.importorskip(name, reason="the server needs pip install 'taper[server]'")

FOLDER = Path(__file__).parents[2] / "benchmarks" / "serving"


def figures(script: str, *options: str, status: int = 0):
    run = subprocess.run(
        [sys.executable, FOLDER / script, *options], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == status, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_disconnects():
    found = figures("disconnects.py", "--requests", "120", "--leave", "0.5")
    assert found["left"] >= 10
    assert found["left"] + found["statuses"]["200"] == 120
    assert found["wrong_answers"] == 0
    assert found["free_kv_blocks_before"] == found["free_kv_blocks_after"]


def test_overload():
    found = figures("overload.py", "--seconds", "1.5", "--queue", "4", "--tokens", "24")
    assert found["served"] + found["refused"] == found["sent"]
    assert found["refused"] > 0
    assert found["retry_after_on_all"]
    assert found["most_waiting"] <= 4


def test_raw_fuzz():
    found = figures("fuzz.py", "--bodies", "400", "--described", "0")
    assert found["bodies"] == 400
    assert found["failed"] == 0
    assert found["statuses"]["400"] > 100
