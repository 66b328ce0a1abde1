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


def test_simulate_compares_batchings_of_the_edge_node(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["plan", "--simulate", "bloom-3b", "--rate", "12", "--duration", "8", "--max-latency", "3"]
    assert main.execute(options) == 0
    text = capsys.readouterr().out
    report = json.loads(text.splitlines()[-1])
    assert report["requests"] >= report["admitted"] > 0
    assert report["throughput"]["dftsp"] > report["throughput"]["nob"] > 0
    assert "served a second" in text
    assert main.execute([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report
    assert main.execute([*options, "--json", "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out) != report
    assert main.execute([*options, "--json", "--quantizer", "gptq-w4a16"]) == 0
    assert json.loads(capsys.readouterr().out)["admitted"] < report["admitted"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--simulate", "gpt"], "no model 'gpt'"),
        (["--simulate", "opt-13b", "--quantizer", "q2"], "no quantizer 'q2'"),
        (["--simulate", "opt-13b", "--rate", "0"], "the rate is 0"),
        (["--simulate", "opt-13b", "--duration", "0"], "the duration is 0"),
        (["--simulate", "opt-13b", "--bits", "4"], "--bits does not go with --simulate"),
        (["--calibrate", "-", "--max-latency", "3"], "--max-latency does not go with --calibrate"),
        (["--calibrate", "-", "--simulate", "opt-13b"], "exclude each other"),
    ],
)
def test_options_that_cannot_be_right_are_usage_errors(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.execute(["plan", *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "hint:" in err
