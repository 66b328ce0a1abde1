"""From checkpoint to file: contents, determinism, resumption, refusals."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taper.errors import CorruptFileError, UsageError
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.kernels import rotate, unpack_codes
from taper.models import Decoder
from taper.models.families import matrix_sources, read_matrix
from taper.quantize import Progress, QuantizeOptions, SolverOptions, StoppedError, methods, nearest, quantize
from taper.testing.tiny import tiny_hf_dir

OPTIONS = QuantizeOptions(bits=(2, 6), calibration_tokens=1024, solver=SolverOptions(passes=1))
# Weights that are only rotated, so that they can be compared with the checkpoint's.
PLAIN = SolverOptions(passes=1, balance=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    # Every token of the tiny tokenizer turns up: what calibration never sees is quantised carelessly.
    characters = [chr(code) for code in (*range(32, 127), *range(161, 512))]
    drawn = np.random.default_rng(0).choice(characters, 6000)
    path.write_text("".join(drawn), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_dir(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="module")
def made(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("out") / "tiny.taper"
    report = quantize(folder, path, calibration=text, options=OPTIONS)
    assert report.calibration_tokens == 1024
    assert len(report.relative_errors) == 9
    assert all(len(errors) == 5 for errors in report.relative_errors.values())
    return path


def logits(decoder: Decoder, bits: int) -> Any:
    tokens = np.arange(40, dtype=np.int32) * 7 % 300
    return decoder.forward(tokens, decoder.new_cache(64), bits, logits="all")


def weight_errors(file: TaperFile, folder: Path) -> dict[str, float]:
    """Relative distance of each matrix of a file without balance, at its largest width, from the weights.

    The codebook alone gives sqrt(0.00067) = 0.026; codes shared with narrower widths about twice that. Any
    slip in gain, signs, order of rows or scales gives about 1.
    """
    checkpoint, found = HfCheckpoint.open(folder), {}
    for source in matrix_sources(checkpoint.config):
        weights, _ = read_matrix(checkpoint, source)
        matrix = file.matrix(source.name)
        rotated = rotate(weights, matrix.signs, matrix.block)
        codes = unpack_codes(list(matrix.planes), file.max_bits, source.in_features)
        values = file.codebook.values[file.max_bits] * file.codebook.level_scales[file.max_bits]
        dequantised = values[codes] * matrix.scales[-1].astype(np.float64)[:, None]
        found[source.name] = float(np.linalg.norm(dequantised - rotated) / np.linalg.norm(rotated))
    return found


def test_the_file_is_whole_and_close_to_the_checkpoint(folder: Path, made: Path) -> None:
    file = TaperFile.open(made, verify=True)
    assert (file.min_bits, file.max_bits) == (2, 6)
    assert file.provenance["seed"] == 0
    assert not made.with_name("tiny.taper.partial").exists()
    exact = logits(Decoder.from_hf(HfCheckpoint.open(folder)), 32)
    decoder = Decoder.from_taper(file)
    errors = [
        float(np.linalg.norm(logits(decoder, bits) - exact) / np.linalg.norm(exact)) for bits in range(2, 7)
    ]
    assert all(more < less for less, more in pairwise(errors)), errors


def test_weights_lie_where_the_format_says(folder: Path, text: Path, tmp_path: Path) -> None:
    quantize(
        folder, tmp_path / "plain.taper", calibration=text, options=QuantizeOptions((2, 6), 1024, 0, PLAIN)
    )
    assert max(weight_errors(TaperFile.open(tmp_path / "plain.taper"), folder).values()) < 0.1


def test_the_same_input_gives_the_same_bytes(folder: Path, text: Path, made: Path, tmp_path: Path) -> None:
    quantize(folder, tmp_path / "again.taper", calibration=text, options=OPTIONS)
    assert (tmp_path / "again.taper").read_bytes() == made.read_bytes()


def test_without_text_the_model_calibrates_on_its_own(folder: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(
        bits=(2, 6), calibration_tokens=512, solver=SolverOptions(passes=0, balance=False)
    )
    calls: list[Progress] = []

    def stop(progress: Progress) -> None:
        calls.append(progress)
        if progress.stage == "solve":
            raise KeyboardInterrupt

    with pytest.raises(StoppedError):
        quantize(folder, tmp_path / "own.taper", options=options, progress=stop)
    assert calls[0].stage == "generate"
    resumed: list[Progress] = []
    report = quantize(folder, tmp_path / "own.taper", options=options, progress=resumed.append)
    assert "generate" not in {progress.stage for progress in resumed}
    quantize(folder, tmp_path / "again.taper", options=options)
    assert (tmp_path / "own.taper").read_bytes() == (tmp_path / "again.taper").read_bytes()
    assert report.calibration_tokens == 512
    assert max(weight_errors(TaperFile.open(tmp_path / "own.taper"), folder).values()) < 0.1


def test_another_seed_gives_other_signs(folder: Path, text: Path, made: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(bits=(2, 6), calibration_tokens=1024, seed=1, solver=SolverOptions(passes=1))
    quantize(folder, tmp_path / "seed.taper", calibration=text, options=options)
    first, second = (
        TaperFile.open(made).matrix("embed"),
        TaperFile.open(tmp_path / "seed.taper").matrix("embed"),
    )
    assert not np.array_equal(first.signs, second.signs)


@pytest.mark.parametrize("stop_at", [1, 5, 12])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    folder: Path, text: Path, made: Path, tmp_path: Path, stop_at: int
) -> None:
    out = tmp_path / "tiny.taper"
    calls: list[Progress] = []

    def stop(progress: Progress) -> None:
        calls.append(progress)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(StoppedError, match=r"tiny\.taper\.partial") as stopped:
        quantize(folder, out, calibration=text, options=OPTIONS, progress=stop)
    assert stopped.value.exit_code == 130
    assert not out.exists()
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tiny.taper.partial").iterdir()}
    kept: list[Progress] = []
    quantize(folder, out, calibration=text, options=OPTIONS, progress=kept.append)
    assert out.read_bytes() == made.read_bytes()
    assert not (tmp_path / "tiny.taper.partial").exists()
    solved = {progress.name for progress in kept if progress.stage == "solve"}
    assert not {name.removesuffix(".safetensors") for name in finished} & solved
    assert kept[-1].done_frac == pytest.approx(1.0)


def test_progress_rises_to_one(folder: Path, text: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    quantize(folder, tmp_path / "a.taper", calibration=text, options=OPTIONS, progress=seen.append)
    fractions = [progress.done_frac for progress in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)
    assert seen[-1].stage == "write"


def test_unfinished_work_of_other_options_is_not_mixed_in(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tiny.taper"

    def stop(progress: Progress) -> None:
        if progress.stage == "solve":
            raise KeyboardInterrupt

    with pytest.raises(StoppedError):
        quantize(folder, out, calibration=text, options=OPTIONS, progress=stop)
    with pytest.raises(UsageError, match="unfinished work of another seed"):
        quantize(folder, out, calibration=text, options=QuantizeOptions((2, 6), 1024, 7, OPTIONS.solver))
    # A later version may build other values for the same options: codes of the old ones mean nothing then.
    monkeypatch.setattr(methods, "gaussian_codebook", nearest.uniform_codebook)
    with pytest.raises(UsageError, match="unfinished work of another codebook_sha256"):
        quantize(folder, out, calibration=text, options=OPTIONS)


def test_untied_heads_and_biases_are_quantised(text: Path, tmp_path: Path) -> None:
    folder = tiny_hf_dir(
        tmp_path / "qwen", architecture="Qwen2ForCausalLM", tie_word_embeddings=False, qkv_bias=True
    )
    options = QuantizeOptions((2, 6), 1024, 0, PLAIN)
    quantize(folder, tmp_path / "qwen.taper", calibration=text, options=options)
    file = TaperFile.open(tmp_path / "qwen.taper", verify=True)
    assert [spec.name for spec in file.matrices][-1] == "head"
    assert max(weight_errors(file, folder).values()) < 0.1
    bias = np.concatenate(
        [HfCheckpoint.open(folder).tensor(f"model.layers.1.self_attn.{part}_proj.bias") for part in "qkv"]
    )
    np.testing.assert_array_equal(file.matrix("layers.1.qkv").bias, bias)


def test_weights_that_are_not_finite_are_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    broken = tiny_hf_dir(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(CorruptFileError, match=r"up_proj\.weight\[3, 4\] is nan"):
        quantize(broken, tmp_path / "broken.taper", calibration=text, options=OPTIONS)
    assert not (tmp_path / "broken.taper").exists()


def test_a_target_that_cannot_be_written_is_refused_first(folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lies in no folder"):
        quantize(folder, tmp_path / "nowhere" / "a.taper", calibration=text, options=OPTIONS)
