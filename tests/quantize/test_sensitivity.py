"""Measured sensitivity against whole forward passes; filled widths; files cut to a budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from taper.errors import CorruptFileError, DoesNotFitError, UsageError
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.formats.outliers import OutlierRows
from taper.formats.sensitivity import Sensitivity
from taper.formats.spec import FINAL_NORM
from taper.formats.writer import rewrite_header, write_taper
from taper.models import Decoder
from taper.quantize import Budget, QuantizeOptions, Shrinker, SolverOptions, StoppedError, quantize
from taper.quantize import sensitivity as measuring
from taper.quantize.progress import Progress
from taper.quantize.sensitivity import (
    cut_passages,
    default_plan,
    full_reading,
    measure_sensitivity,
    passages,
)
from taper.testing.random_model import SHAPES
from taper.testing.tiny import tiny_hf_dir, tiny_taper

MIN_BITS, MAX_BITS = 2, 5
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 24), dtype=np.int32)
OPTIONS = QuantizeOptions(
    bits=(2, 4), calibration_tokens=512, solver=SolverOptions(passes=0), sensitivity=True
)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TaperFile:
    path = tmp_path_factory.mktemp("files") / "tiny.taper"
    return TaperFile.open(tiny_taper(path, MIN_BITS, MAX_BITS, tie_word_embeddings=request.param))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_dir(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    drawn = np.random.default_rng(0).choice([chr(code) for code in range(32, 127)], 3000)
    path.write_text("".join(drawn), encoding="utf-8")
    return path


def distributions(decoder: Decoder, bits: float) -> np.ndarray:
    """Float64 log-probabilities (passages * tokens, vocab)."""
    rows = [decoder.forward(passage, decoder.new_cache(24), bits, logits="all") for passage in TOKENS]
    logits = np.concatenate(rows).astype(np.float64)  # type: ignore[arg-type]
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean(np.sum(np.exp(reference) * (reference - other), axis=1)))


def test_figures_are_those_of_whole_passes_with_one_matrix_cut(file: TaperFile) -> None:
    """Keeping the layers before the change gives what a pass from the start gives."""
    found = measure_sensitivity(file, TOKENS, (2, 4), "text")
    reference = distributions(Decoder.from_taper(file), MAX_BITS)
    assert list(found.kl) == [spec.name for spec in file.matrices]
    for name, row in found.kl.items():
        whole = {
            bits: divergence(reference, distributions(Decoder.from_taper(file, {name: bits}), MAX_BITS))
            for bits in (2, 4)
        }
        # Log-probabilities of at most 16 in float32, 300 of them weighed by probabilities: 16 * 2**-24 each,
        # and as much again from the sums. The difference is free of the floor.
        assert row[0] - row[2] == pytest.approx(whole[2] - whole[4], rel=1e-4, abs=4e-6)
        assert row[0] <= whole[2] + 4e-6
        assert row[0] > row[1] > row[2] > 0 == row[-1]
    assert (found.reference, found.text, found.num_tokens) == ("5 bits", "text", TOKENS.size)


def test_against_a_float_model_the_loss_at_all_planes_is_taken_off(file: TaperFile, tmp_path: Path) -> None:
    tied = file.config.tie_word_embeddings
    other = Decoder.from_hf(HfCheckpoint.open(tiny_hf_dir(tmp_path / "hf", seed=9, tie_word_embeddings=tied)))
    found = measure_sensitivity(file, TOKENS, (2,), "text", reference=(other, "float"))
    reference = distributions(other, 32)
    base = divergence(reference, distributions(Decoder.from_taper(file), MAX_BITS))
    cut = divergence(reference, distributions(Decoder.from_taper(file, {"embed": 2}), MAX_BITS))
    assert found.reference == "float"
    assert found.kl["embed"][0] == pytest.approx(max(0.0, cut - base), rel=1e-3, abs=1e-5)


def test_unmeasured_widths_follow_the_relative_errors(file: TaperFile) -> None:
    errors = {spec.name: [0.11, 0.051, 0.021, 0.001] for spec in file.matrices}
    with_errors = TaperFile.open(file.path)
    with_errors._header = replace(file.header, relative_errors=errors)
    row = measure_sensitivity(with_errors, TOKENS, (2,), "text").kl["layers.0.o"]
    assert row == pytest.approx([row[0], row[0] * 0.05 / 0.11 * 0.11 / 0.109, row[0] * 0.02 / 0.109, 0.0])
    # Without figures of the solver: those of the codebook, which fall by more than half a plane.
    plain = measure_sensitivity(file, TOKENS, (2,), "text").kl["layers.0.o"]
    assert plain[0] == row[0]
    assert plain[0] > 2 * plain[1] > 4 * plain[2] > 0 == plain[3]


def test_what_any_change_costs_is_taken_off() -> None:
    errors = {2: 0.1, 3: 0.04, 4: 0.01, 5: 0.0}
    measured = {2: 0.3 + 0.002, 4: 0.03 + 0.002}
    assert measuring._floor(measured, errors) == pytest.approx(0.002)
    assert measuring._floor({2: 0.302}, errors) == 0.0
    assert measuring._floor({2: 0.001, 4: 0.003}, errors) == 0.003  # noise alone


def test_found_matrices_are_not_measured_again(file: TaperFile, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[dict[str, dict[int, float]]] = []
    whole = measure_sensitivity(file, TOKENS, (2,), "text", on_matrix=lambda rows: kept.append(dict(rows)))
    asked: list[str] = []
    original = measuring._Walk.divergence
    monkeypatch.setattr(
        measuring._Walk,
        "divergence",
        lambda walk, name, bits: asked.append(name) or original(walk, name, bits),
    )
    assert measure_sensitivity(file, TOKENS, (2,), "text", found=kept[2]) == whole
    assert asked == [spec.name for spec in file.matrices][3:]


def test_a_large_model_is_measured_at_few_widths(tmp_path: Path, file: TaperFile) -> None:
    assert default_plan(file).bits == (2, 3, 4)
    assert default_plan(file).num_tokens == measuring.MAX_TOKENS

    class Large:
        config, matrices, min_bits, max_bits = SHAPES["1.1b"], [None] * 156, 2, 8
        num_weights = 1_100_000_000

    plan = default_plan(Large())  # type: ignore[arg-type]
    assert plan.bits == (2,)
    assert plan.num_tokens == 128


def test_the_rest_is_read_at_five_bits_where_only_fewer_are_measured() -> None:
    # Of an eight-bit file, so that 5 is not all its planes.
    wide = cast(TaperFile, SimpleNamespace(max_bits=8))
    assert [full_reading(wide, bits) for bits in ((2,), (2, 3, 4), (2, 5), (2, 7))] == [5, 5, 8, 8]
    assert full_reading(cast(TaperFile, SimpleNamespace(max_bits=4)), (2,)) == 4


def test_passages_come_from_all_over_the_text(file: TaperFile) -> None:
    text = "".join(chr(97 + i // 400) for i in range(4000))
    found = passages(file, text, 512)
    assert found.shape == (2, 256)
    assert not np.array_equal(found[0], found[1])
    with pytest.raises(UsageError, match="shorter than a passage"):
        passages(file, "short", 512)
    assert cut_passages(np.arange(4000, dtype=np.int32).reshape(8, 500), 512).tolist()[1][0] == 2000


def measured(path: Path) -> TaperFile:
    """A tiny file with made-up sensitivities that differ by matrix."""
    plain = TaperFile.open(tiny_taper(path, MIN_BITS, 6))
    rows = {
        spec.name: [(1 + 7 * index % 5) * 4.0**-bits for bits in range(MIN_BITS, 6)] + [0.0]
        for index, spec in enumerate(plain.matrices)
    }
    rewrite_header(path, replace(plain.header, sensitivity=Sensitivity(rows, (2,), "6 bits", "t", 1)))
    return TaperFile.open(path)


def test_a_cut_file_reads_as_the_whole_one_under_its_ceilings(tmp_path: Path) -> None:
    whole = measured(tmp_path / "whole.taper")
    shrinker = Shrinker(whole, Budget(bits_per_weight=3.4))
    allocation = shrinker.fit()
    shrinker.write(tmp_path / "cut.taper", allocation.widths)
    cut = TaperFile.open(tmp_path / "cut.taper", verify=True)
    assert {spec.name: spec.width_at(cut.max_bits) for spec in cut.matrices} == allocation.widths
    assert cut.file_bytes == allocation.file_bytes < whole.bytes_at(4)
    assert cut.provenance["allocation"] == {"bits_per_weight": 3.4}
    expected = distributions(Decoder.from_taper(whole, allocation.widths), whole.max_bits)
    np.testing.assert_array_equal(distributions(Decoder.from_taper(cut), cut.max_bits), expected)
    low = Decoder.from_taper(cut)
    assert low.bits_per_weight(2.5) <= 2.5


def test_tables_outliers_and_scales_of_widths_are_cut_too(tmp_path: Path) -> None:
    """A row of its own scales for each width, rows with tables of their own, outliers beside the planes."""
    plain = measured(tmp_path / "plain.taper")
    random = np.random.default_rng(1)
    header = replace(plain.header, tables=frozenset({"layers.0.o"}))
    matrices = []
    for spec in header.matrices:
        matrix = plain.matrix(spec.name)
        factors = random.uniform(0.9, 1.1, (5, 1))
        tables = np.sort(random.integers(-127, 128, (spec.out_features, 2**7 - 4)), axis=1).astype(np.int8)
        starts = np.minimum(np.arange(spec.out_features + 1, dtype=np.int32), 3)
        columns, values = np.array([1, 2, 3], np.uint16), np.array([0.5, -0.5, 0.25], np.float16)
        matrices.append(
            replace(
                matrix,
                spec=spec,
                scales=(matrix.scales * factors).astype(np.float16),
                tables=tables if spec.has_tables else None,
                outliers=OutlierRows(starts, columns, values) if spec.name == "layers.1.down" else None,
            )
        )
    write_taper(tmp_path / "whole.taper", header, matrices, {FINAL_NORM: plain.tensor(FINAL_NORM)})
    whole = TaperFile.open(tmp_path / "whole.taper")
    target = whole.bytes_at(4)
    shrinker = Shrinker(whole, Budget(target_bytes=target))
    allocation = shrinker.fit()
    shrinker.write(tmp_path / "cut.taper", allocation.widths)
    cut = TaperFile.open(tmp_path / "cut.taper", verify=True)
    assert cut.file_bytes == allocation.file_bytes <= target
    assert 2 < allocation.widths["layers.0.o"] < 6
    for name, bits in allocation.widths.items():
        kept, all_of_it = cut.matrix(name), whole.matrix(name)
        assert len(kept.planes) == bits
        np.testing.assert_array_equal(kept.scales, all_of_it.scales[: bits - 1])
        assert (kept.outliers is None) == (name != "layers.1.down")
    np.testing.assert_array_equal(cut.matrix("layers.1.down").outliers.values, values)  # type: ignore[union-attr]
    # 4 values of 2 bits, 8 of 3 bits and so on.
    columns_kept = 2 ** (allocation.widths["layers.0.o"] + 1) - 4
    tables, kept_tables = (file.matrix("layers.0.o").tables for file in (whole, cut))
    np.testing.assert_array_equal(kept_tables, tables[:, :columns_kept])  # type: ignore[index]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.77, 1.0])
def test_a_file_for_a_size_is_not_larger(tmp_path: Path, share: float) -> None:
    whole = measured(tmp_path / "whole.taper")
    least = Shrinker(whole, Budget(bits_per_weight=2)).fit().file_bytes
    target = int(least + 64 + share * (whole.file_bytes - least))
    shrinker = Shrinker(whole, Budget(target_bytes=target))
    allocation = shrinker.fit()
    shrinker.write(tmp_path / "cut.taper", allocation.widths)
    size = (tmp_path / "cut.taper").stat().st_size
    assert size == allocation.file_bytes <= target
    # A plane of the largest matrix, its scales and its line in the header.
    assert target - size < max(spec.plane_bytes for spec in whole.matrices) + 1024


def test_budgets_that_cannot_be_met_are_refused(tmp_path: Path, file: TaperFile) -> None:
    whole = measured(tmp_path / "whole.taper")
    with pytest.raises(DoesNotFitError, match="at 2 bits, more than 1,000"):
        Shrinker(whole, Budget(target_bytes=1000)).fit()
    with pytest.raises(UsageError, match=r"outside the file's 2\.\.6"):
        Shrinker(whole, Budget(bits_per_weight=6.5)).fit()
    with pytest.raises(UsageError, match="holds no sensitivity"):
        Shrinker(file, Budget(bits_per_weight=3))
    with pytest.raises(UsageError, match="one of them"):
        Budget(3.3, 1000)
    short = tmp_path / "short.taper"
    short.write_bytes((tmp_path / "whole.taper").read_bytes()[: whole.bytes_at(4)])
    with pytest.raises(CorruptFileError, match="cut off"):
        Shrinker(TaperFile.open(short), Budget(bits_per_weight=3))


def test_quantize_measures_and_goes_on_after_a_stop(folder: Path, text: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "sensitivity" and progress.name == "layers.1.o":
            raise KeyboardInterrupt

    with pytest.raises(StoppedError):
        quantize(folder, tmp_path / "a.taper", calibration=text, options=OPTIONS, progress=stop)
    names: list[str] = []
    quantize(
        folder,
        tmp_path / "a.taper",
        calibration=text,
        options=OPTIONS,
        progress=lambda progress: names.append(f"{progress.stage} {progress.name}"),
    )
    assert "sensitivity layers.1.o" in names
    assert not {name for name in names if name.startswith("solve") or name.endswith("layers.0.o")}
    quantize(folder, tmp_path / "b.taper", calibration=text, options=OPTIONS)
    assert (tmp_path / "a.taper").read_bytes() == (tmp_path / "b.taper").read_bytes()
    file = TaperFile.open(tmp_path / "a.taper")
    assert file.sensitivity is not None
    assert file.sensitivity.text == "calibration.txt"
    assert file.header.planes == {}
    assert not (tmp_path / "a.taper.partial").exists()


def test_quantize_keeps_the_planes_of_a_budget(folder: Path, text: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, budget=Budget(bits_per_weight=2.7))
    quantize(folder, tmp_path / "a.taper", calibration=text, options=options)
    file = TaperFile.open(tmp_path / "a.taper")
    planes = sum(spec.width_at(file.max_bits) * spec.num_weights for spec in file.matrices)
    assert 2.5 < planes / file.num_weights <= 2.7
    with pytest.raises(UsageError, match=r"4\.5 bits per weight are outside 2\.\.4"):
        quantize(folder, tmp_path / "b.taper", calibration=text, options=replace(OPTIONS, budget=Budget(4.5)))
    assert not (tmp_path / "b.taper.partial").exists()
