"""`taper allocate` and fractions of bits on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from taper.cli.main import execute
from taper.cli.options import FILE_SIZE, WidthList
from taper.formats.container import TaperFile
from taper.testing.tiny import tiny_hf_dir, tiny_taper


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat in the hat and the dog on the mat are as one in a tin. " * 40, encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_taper(tmp_path / "tiny.taper", 2, 5)


@pytest.fixture
def measured(model: Path, text: Path) -> Path:
    assert execute(["allocate", str(model), "--text", str(text), "--tokens", "32"]) == 0
    return model


def test_measuring_stores_the_sensitivity_and_touches_no_tensor(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = TaperFile.open(model)
    assert execute(["allocate", str(model), "--text", str(text), "--tokens", "32"]) == 0
    assert "sensitivity at 2, 3, 4 bits over 32 tokens" in capsys.readouterr().err
    after = TaperFile.open(model, verify=True)
    assert after.sensitivity is not None
    assert (after.sensitivity.text, after.sensitivity.num_tokens) == ("text.txt", 32)
    assert (before.tensor("embed.plane0") == after.tensor("embed.plane0")).all()


def test_measuring_against_a_float_checkpoint_names_it(model: Path, text: Path, tmp_path: Path) -> None:
    folder = tiny_hf_dir(tmp_path / "hf")
    arguments = ["--text", str(text), "--tokens", "16", "--against", str(folder)]
    assert execute(["allocate", str(model), *arguments]) == 0
    sensitivity = TaperFile.open(model).sensitivity
    assert sensitivity is not None
    assert sensitivity.reference == "hf"


def test_the_table_and_the_file_agree(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cut.taper"
    capsys.readouterr()
    assert execute(["allocate", str(measured), "--bits-per-weight", "3.3", "--json", "-o", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    file = TaperFile.open(out)
    assert found["widths"] == {spec.name: spec.width_at(file.max_bits) for spec in file.matrices}
    assert found["file_bytes"] == out.stat().st_size
    assert execute(["allocate", str(measured), "--bits-per-weight", "3.3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [
        [name, str(bits)] for name, bits in found["widths"].items()
    ]
    assert execute(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "matrices hold 2" in shown or "matrices hold 3" in shown
    assert "32 tokens of text.txt against 5 bits" in shown


def test_a_target_size_is_kept(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "cut.taper"
    target = (TaperFile.open(measured).bytes_at(3) + 500) // 1000
    assert execute(["allocate", str(measured), "--target-size", f"{target}kB", "-o", str(out)]) == 0
    assert out.stat().st_size <= target * 1000


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "nothing to do"),
        (["--against", "hf", "--bits-per-weight", "3"], "belong to --text"),
        (["--text", "x.txt", "-o", "out.taper"], "-o needs a budget"),
        (["--bits-per-weight", "3", "--target-size", "1MB"], "one of them"),
        (["--bits-per-weight", "3"], "holds no sensitivity"),
        (["--target-size", "1XB"], "not a size"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    model: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["allocate", str(model), *arguments]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "hint: " in error


def test_the_file_to_read_is_not_overwritten(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = measured.read_bytes()
    assert execute(["allocate", str(measured), "--bits-per-weight", "3", "-o", str(measured)]) == 2
    assert "is the file to read" in capsys.readouterr().err
    assert measured.read_bytes() == before


def test_run_takes_a_fraction_and_shows_it(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    arguments = ["run", str(measured), "the cat", "--max-tokens", "3", "--policy", "progressive:4.5@0,3.3@1"]
    assert execute([*arguments, "--show-bits"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("[4.5]")
    assert "[3.3]" in shown.out
    assert "3.3 bits: 2 tokens" in shown.err
    assert execute([*arguments[:5], "--bits", "3.3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [token["bits"] for token in record["tokens"]] == [3.3] * 3
    assert record["policy"] == "fixed:3.3"


def test_run_refuses_a_fraction_without_sensitivity(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["run", str(model), "the cat", "--bits", "3.3"]) == 2
    error = capsys.readouterr().err
    assert "3.3 bits; a fraction needs a file with sensitivity" in error
    assert "taper allocate FILE --text TEXT" in error


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("600MB", 600_000_000),
        ("1.5GiB", 3 << 29),
        ("12kB", 12_000),
        ("7", 7),
        ("2 MiB", 2 << 20),
        ("3M", 3_000_000),
    ],
)
def test_sizes(size: str, num_bytes: int) -> None:
    assert FILE_SIZE.convert(size, None, None) == num_bytes


def test_widths_may_be_fractions_and_whole_ones_are_ints() -> None:
    widths = WidthList().convert("4, 3.30,3.3,2.0", None, None)
    assert widths == (4, 3.3, 2)
    assert [type(bits) for bits in widths] == [int, float, int]


def test_quantize_keeps_a_target_size_with_its_card(text: Path, tmp_path: Path) -> None:
    folder, out = tiny_hf_dir(tmp_path / "hf"), tmp_path / "tiny.taper"
    arguments = ["quantize", str(folder), "-o", str(out), "--bits", "2-5", "--calibration-tokens", "256"]
    texts = ["--calibration", str(text), "--card-text", str(text)]
    assert execute([*arguments, *texts, "--target-size", "76kB"]) == 0
    file = TaperFile.open(out)
    assert file.card["widths"]
    assert file.header.planes
    assert 60_000 < out.stat().st_size <= 76_000
    assert execute([*arguments, *texts, "--no-sensitivity", "--no-card"]) == 0
    assert TaperFile.open(out).sensitivity is None
    assert execute([*arguments, *texts, "--no-sensitivity", "--bits-per-weight", "3"]) == 2
