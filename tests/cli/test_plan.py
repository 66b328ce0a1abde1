"""`taper plan --calibrate`: measures, reports its error, keeps what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from taper.cli import main
from taper.engine import embedded_model
from taper.formats.container import TaperFile
from taper.planner import calibration
from taper.planner.calibration import calibration_key, calibration_path, load_calibration


def test_calibrate_keeps_step_times_where_a_server_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TAPER_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(calibration, "_ROUNDS", 1)
    assert main.execute(["plan", "--calibrate", "-", "--bits", "2,4"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    key = calibration_key(TaperFile.open(embedded_model()))
    assert Path(report["path"]) == calibration_path(key)
    found = load_calibration(Path(report["path"]), key)
    assert list(found.step_time.coefficients) == [2, 4]
    assert report["passes"] == len(found.measurements)
    assert 0 < report["mape"] <= report["worst"]
    assert "held out" in out
    assert "round 1 of 1" in err


def test_nothing_to_do_and_widths_that_the_file_lacks_are_usage_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.execute(["plan"]) == 2
    assert "--calibrate" in capsys.readouterr().err
    assert main.execute(["plan", "--calibrate", "-", "--bits", "9"]) == 2
