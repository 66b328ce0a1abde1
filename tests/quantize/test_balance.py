"""Column scales and offsets: least error, and the same model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taper.errors import CorruptFileError, TaperError
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.formats.writer import write_taper
from taper.models import Decoder
from taper.models.families import matrix_sources, read_matrix
from taper.models.parts import planed_parts
from taper.quantize import QuantizeOptions, SolverOptions, quantize
from taper.quantize.balance import column_scales, width_offsets
from taper.testing.tiny import tiny_hf_dir

TOKENS = np.arange(40, dtype=np.int32) * 7 % 300


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    characters = [chr(code) for code in (*range(32, 127), *range(161, 512))]
    path.write_text("".join(np.random.default_rng(0).choice(characters, 6000)), encoding="utf-8")
    return path


def logits(decoder: Decoder, bits: int) -> Any:
    return decoder.forward(TOKENS, decoder.new_cache(64), bits, logits="all")


def test_no_other_scales_give_a_smaller_error() -> None:
    generator = np.random.default_rng(0)
    weights, inputs = np.exp(generator.standard_normal((2, 64)))

    def error(scales: Any) -> float:
        return float(np.sum(weights / scales**2) * np.sum(inputs * scales**2))

    best = column_scales(weights, inputs).astype(np.float64)
    # The floor under unused columns moves the scales by a thousandth, the error by its square.
    assert error(best) == pytest.approx(np.sum(np.sqrt(weights * inputs)) ** 2, rel=1e-4)
    assert error(best) < error(np.ones(64))
    assert error(best) < error(best * np.exp(0.1 * generator.standard_normal(64)))
    assert np.log(best).mean() == pytest.approx(0, abs=1e-6)


def test_unused_columns_get_bounded_scales() -> None:
    weights, inputs = np.ones(8), np.ones(8)
    weights[0] = inputs[1] = 0.0
    scales = column_scales(weights, inputs)
    assert np.isfinite(scales).all()
    assert scales.max() / scales.min() < 40
    np.testing.assert_array_equal(column_scales(np.zeros(4), np.zeros(4)), 1)


def test_offsets_make_up_for_the_error_on_the_mean_input() -> None:
    generator = np.random.default_rng(1)
    errors = generator.standard_normal((5, 32)).astype(np.float32)
    inputs = (generator.standard_normal((400, 32)) + 2.0).astype(np.float32)
    left = (inputs @ errors.T).mean(axis=0) - width_offsets(errors, inputs.mean(axis=0)).astype(np.float32)
    # Offsets of up to 30 have a float16 step of 2^-6.
    np.testing.assert_allclose(left, 0, atol=2**-6)


@pytest.mark.parametrize(
    "changes",
    [{}, {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": False, "qkv_bias": True}],
    ids=["tied", "untied with biases"],
)
def test_balance_keeps_the_model(changes: dict[str, Any], text: Path, tmp_path: Path) -> None:
    folder = tiny_hf_dir(tmp_path / "model", **changes)
    exact = logits(Decoder.from_hf(HfCheckpoint.open(folder)), 32)
    for solver in (SolverOptions(passes=0), SolverOptions(passes=0, balance=False, centre=False)):
        path = tmp_path / "made.taper"
        quantize(folder, path, calibration=text, options=QuantizeOptions((6, 8), 1024, 0, solver))
        error = np.linalg.norm(logits(Decoder.from_taper(TaperFile.open(path)), 8) - exact)
        # A scale that is applied once too often or never changes the logits by as much as they are.
        assert error < 0.1 * np.linalg.norm(exact)


def test_the_look_up_undoes_the_heads_scales(text: Path, tmp_path: Path) -> None:
    folder = tiny_hf_dir(tmp_path / "model")
    quantize(folder, tmp_path / "made.taper", calibration=text, options=QuantizeOptions((6, 8), 1024))
    checkpoint, file = HfCheckpoint.open(folder), TaperFile.open(tmp_path / "made.taper")
    rows, _ = read_matrix(checkpoint, matrix_sources(checkpoint.config)[0])
    gain = file.matrix("embed").gain
    assert gain is not None
    assert gain.max() > 1.05 * gain.min()
    found = planed_parts(file).embedding(TOKENS)
    assert np.linalg.norm(found - rows[TOKENS]) < 0.03 * np.linalg.norm(rows[TOKENS])


def test_a_cut_off_file_has_the_offsets_of_its_widths(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "made.taper"
    quantize(tiny_hf_dir(tmp_path / "model"), path, calibration=text, options=QuantizeOptions((2, 4), 1024))
    whole = TaperFile.open(path)
    expected = logits(Decoder.from_taper(whole, dict.fromkeys((m.name for m in whole.matrices), 3)), 3)
    path.write_bytes(path.read_bytes()[: whole.bytes_at(3)])
    cut = TaperFile.open(path)
    offsets = cut.matrix("layers.0.o").offsets
    assert offsets is not None
    assert len(offsets) == 2
    np.testing.assert_array_equal(logits(Decoder.from_taper(cut), 3), expected)


def test_a_gain_without_a_norm_is_refused(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "made.taper"
    quantize(tiny_hf_dir(tmp_path / "model"), path, calibration=text, options=QuantizeOptions((2, 3), 1024))
    file = TaperFile.open(path)
    header, norm = file.header, {"norm.final": np.array(file.tensor("norm.final"))}
    matrices = [file.matrix(spec.name) for spec in file.matrices]
    for index, matrix in enumerate(matrices):
        if matrix.spec.name == "layers.0.o":
            spec = dataclasses.replace(matrix.spec, has_gain=True)
            gain = np.ones(spec.in_features, dtype=np.float32)
            matrices[index] = dataclasses.replace(matrix, spec=spec, gain=gain)
    forged = dataclasses.replace(header, gains=header.gains | {"layers.0.o"})
    write_taper(tmp_path / "forged.taper", forged, matrices, norm)
    with pytest.raises(CorruptFileError, match="no norm before it"):
        TaperFile.open(tmp_path / "forged.taper")


def test_an_offset_beyond_float16_is_refused() -> None:
    errors, mean = np.full((3, 64), 2.0, dtype=np.float32), np.full(64, 512.0, dtype=np.float32)
    assert width_offsets(errors / 2, mean).tolist() == [32768.0] * 3
    with pytest.raises(TaperError, match=r"a bias of 6\.55e\+04, beyond float16"):
        width_offsets(errors, mean)
