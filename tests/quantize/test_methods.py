"""The methods of the papers: their codes by definition, their files, and what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from taper.cli.options import SHARE
from taper.cli.quantize import CODEBOOKS
from taper.cli.quantize import METHODS as CLI_METHODS
from taper.errors import CorruptFileError, ModelNotFoundError, TaperError, UsageError
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.kernels import unpack_codes
from taper.models import Decoder
from taper.models.families import matrix_sources, read_matrix
from taper.quantize import QuantizeOptions, SolverOptions, quantize
from taper.quantize.codebook import gaussian_codebook
from taper.quantize.fisher_file import FisherFile
from taper.quantize.gptq import gptq
from taper.quantize.methods import METHODS, MatrixProblem, MethodOptions, quantize_matrix
from taper.quantize.nearest import grid_scales, nearest, uniform_codebook
from taper.quantize.outliers import split_outliers
from taper.quantize.solver import factorise
from taper.testing.tiny import tiny_hf_dir

F32 = npt.NDArray[np.float32]
SOLVER = SolverOptions(passes=1)


def problem(rows: int, cols: int, seed: int = 0) -> MatrixProblem:
    generator = np.random.default_rng(seed)
    weights = (generator.standard_t(4, (rows, cols)) * generator.uniform(0.02, 2, (rows, 1))).astype(
        np.float32
    )
    mixing = generator.standard_normal((cols, cols)) * np.linspace(0.1, 2, cols)
    return MatrixProblem(weights, mixing @ mixing.T / cols)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    characters = [chr(code) for code in (*range(32, 127), *range(161, 512))]
    path.write_text("".join(np.random.default_rng(0).choice(characters, 3000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_dir(tmp_path_factory.mktemp("hf") / "tiny")


def build(folder: Path, out: Path, text: Path, bits: tuple[int, int], **more: Any) -> TaperFile:
    method = MethodOptions(
        **{key: more.pop(key) for key in ("codebook", "method", "outliers") if key in more}
    )
    options = QuantizeOptions(bits, 512, solver=SOLVER, method=method, **more)
    quantize(folder, out, calibration=text, options=options)
    return TaperFile.open(out, verify=True)


@pytest.mark.parametrize("uniform", [False, True])
def test_nearest_is_the_nearest_value_of_the_largest_width(uniform: bool) -> None:
    book = uniform_codebook(2, 4) if uniform else gaussian_codebook(2, 4)
    weights = problem(5, 64).weights
    weights[3] = 0.0
    scales = grid_scales(weights, uniform)
    values = book.levels[-1].reals[None, None, :] * scales[:, None, None]
    expected = np.argmin(np.abs(weights[:, :, None] - values), axis=2)
    found = nearest(weights, book, scales)
    assert np.array_equal(found[scales > 0], expected[scales > 0])


def test_cutting_a_code_of_the_uniform_grid_gives_the_nearest_of_the_narrower() -> None:
    # Fails for a grid with a level at zero, whose widths do not nest.
    weights = problem(4, 200).weights
    scales = grid_scales(weights, uniform=True)
    codes = nearest(weights, uniform_codebook(2, 8), scales)
    for bits in (2, 3, 5):
        alone = nearest(weights, uniform_codebook(bits, bits), scales)
        assert np.array_equal(codes >> (8 - bits), alone)


def test_gptq_is_the_paper_s_loop() -> None:
    given, book = problem(4, 140), gaussian_codebook(3, 3)
    scales = grid_scales(given.weights, uniform=False)
    codes = gptq(given.weights, given.moments, book, scales, 0.01)
    upper = factorise(given.moments, 0.01)[1].astype(np.float64)
    values, same = book.levels[0].reals.astype(np.float64), 0
    for row, weight in enumerate(given.weights.astype(np.float64)):
        work = weight.copy()
        for col in range(len(work)):
            code = int(np.argmin(np.abs(work[col] - values * scales[row])))
            same += code == codes[row, col]
            # Go on from the native choice, so that one tie in float32 does not count again and again.
            error = (work[col] - values[codes[row, col]] * scales[row]) / upper[col, col]
            work[col + 1 :] -= error * upper[col, col + 1 :]
    assert same >= codes.size - 2


def test_outliers_are_the_most_sensitive_then_the_largest() -> None:
    weights = np.arange(1, 19, dtype=np.float32).reshape(3, 6)
    weights[:, 1::2] *= -1
    sensitivity = np.zeros((1, 6), dtype=np.float32)
    sensitivity[0, 2] = 1.0
    outliers, dense = split_outliers(weights, sensitivity, 9 / 18)  # one of nine by sensitivity
    taken = {(int(row), int(col)) for row, col in np.argwhere(dense == 0)}
    # The largest of column 2, 15, is the sensitive one; the eight largest of the others are 10 and more.
    assert taken == {(2, 2)} | {divmod(value - 1, 6) for value in (18, 17, 16, 14, 13, 12, 11, 10)}
    assert np.array_equal(outliers.dense(6) + dense, weights)


def test_a_sensitive_weight_goes_though_it_is_small() -> None:
    weights = np.arange(1, 19, dtype=np.float32).reshape(3, 6)
    weights[:, 0] = (0.1, 0.3, 0.2)
    sensitivity = np.eye(6, dtype=np.float32)[:1]
    _, dense = split_outliers(weights, sensitivity, 9 / 18)
    assert dense[:, 0].tolist() == pytest.approx([0.1, 0.0, 0.2])
    assert np.sort(weights[dense == 0])[1:].tolist() == [10, 11, 12, 14, 15, 16, 17, 18]


def test_outliers_of_a_fisher_are_chosen_weight_by_weight() -> None:
    weights = np.full((2, 9), 0.5, dtype=np.float32)
    sensitivity = np.zeros((2, 9), dtype=np.float32)
    sensitivity[1, 4] = 2.0
    outliers, _ = split_outliers(weights, sensitivity, 0.5)
    dense = outliers.dense(9)
    assert dense[1, 4] == 0.5  # the sensitive one, though all are as large
    assert dense[0, :8].all()  # ties of magnitude go in order


@pytest.mark.parametrize("codebook", ["row", "row-greedy", "shared"])
def test_outliers_lower_the_error_where_weights_are_heavy_tailed(codebook: str) -> None:
    given, book = problem(6, 256), MethodOptions(codebook).build_codebook((2, 4))
    errors = []
    for share in (0.0, 0.02):
        made = quantize_matrix(given, book, MethodOptions(codebook, None, share), SOLVER, 0)
        errors.append(made.relative_errors)
    assert np.all(np.array(errors[1]) < np.array(errors[0]))


def test_relative_errors_are_those_of_the_output() -> None:
    given, method = problem(5, 96), MethodOptions("row", None, 0.01)
    made = quantize_matrix(given, method.build_codebook((2, 4)), method, SOLVER, 0)
    assert made.tables is not None
    assert made.outliers is not None
    hessian = given.moments / np.mean(np.diag(given.moments)) + 0.01 * np.eye(96)
    energy = np.einsum("ij,jk,ik->", given.weights, hessian, given.weights)
    begin = 0
    for index, bits in enumerate((2, 3, 4)):
        table = made.tables[:, begin : begin + 2**bits].astype(np.float64)
        begin += 2**bits
        values = np.take_along_axis(table, (made.codes >> (4 - bits)).astype(np.intp), axis=1)
        rest = (
            given.weights - made.outliers.dense(96) - values * made.scales[index].astype(np.float64)[:, None]
        )
        # Outliers are rounded to float16, which the solver's figure leaves out.
        expected = np.einsum("ij,jk,ik->", rest, hessian, rest) / energy
        assert made.relative_errors[index] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("codebook", "method", "bits", "outliers"),
    [
        ("row", None, (2, 6), 0.01),
        ("row-greedy", None, (2, 4), 0.0),
        ("uniform", "nearest", (4, 8), 0.0),
        ("uniform", "gptq", (4, 4), 0.0),
        ("shared", "gptq", (4, 4), 0.01),
        ("shared", "nearest", (3, 5), 0.0),
    ],
)
def test_a_file_of_any_method_runs(
    folder: Path,
    text: Path,
    tmp_path: Path,
    codebook: str,
    method: str,
    bits: tuple[int, int],
    outliers: float,
) -> None:
    file = build(
        folder, tmp_path / "a.taper", text, bits, codebook=codebook, method=method, outliers=outliers
    )
    checkpoint = HfCheckpoint.open(folder)
    rotated = codebook == "shared"
    for source in matrix_sources(checkpoint.config):
        matrix = file.matrix(source.name)
        assert (matrix.block > 1) == rotated
        assert rotated or np.all(matrix.signs == 1)
        assert (matrix.tables is not None) == codebook.startswith("row")
        assert (matrix.outliers is not None) == (outliers > 0)
    tokens = np.arange(40, dtype=np.int32) * 7 % 300
    exact, decoder = Decoder.from_hf(checkpoint), Decoder.from_taper(file)
    wanted = exact.forward(tokens, exact.new_cache(64), 32, logits="all")
    found = decoder.forward(tokens, decoder.new_cache(64), bits[1], logits="all")
    assert wanted is not None
    assert found is not None
    # Four bits leave some 10 % of a weight; a wrong table, sign, row or outlier about all of it.
    assert np.linalg.norm(found - wanted) < 0.6 * np.linalg.norm(wanted)


def test_row_tables_reach_the_engine_exactly(folder: Path, text: Path, tmp_path: Path) -> None:
    file = build(folder, tmp_path / "a.taper", text, (2, 4), codebook="row", outliers=0.01)
    checkpoint = HfCheckpoint.open(folder)
    source = matrix_sources(checkpoint.config)[1]
    matrix, (weights, _) = (
        file.matrix(source.name),
        read_matrix(checkpoint, matrix_sources(checkpoint.config)[1]),
    )
    assert matrix.tables is not None
    assert matrix.outliers is not None
    codes = unpack_codes(list(matrix.planes), 4, source.in_features).astype(np.intp)
    values = np.take_along_axis(matrix.tables[:, 12:].astype(np.float32), codes, axis=1)
    dense = values * matrix.scales[-1].astype(np.float32)[:, None] + matrix.outliers.dense(source.in_features)
    assert np.linalg.norm(dense - weights) < 0.15 * np.linalg.norm(weights)


def test_a_stopped_run_goes_on_only_with_the_same_method(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.taper"

    def stop(progress: Any) -> None:
        if progress.stage == "solve" and progress.name == "layers.0.o":
            raise KeyboardInterrupt

    base = {"solver": SOLVER, "calibration_tokens": 512, "bits": (2, 4)}
    row = QuantizeOptions(**base, method=MethodOptions("row", None, 0.01))  # type: ignore[arg-type]
    with pytest.raises(TaperError, match="stopped"):
        quantize(folder, out, calibration=text, options=row, progress=stop)
    greedy = QuantizeOptions(**base, method=MethodOptions("row-greedy", None, 0.01))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="another codebook"):
        quantize(folder, out, calibration=text, options=greedy)
    quantize(folder, out, calibration=text, options=row)
    quantize(folder, tmp_path / "b.taper", calibration=text, options=row)
    assert out.read_bytes() == (tmp_path / "b.taper").read_bytes()


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    for codebook, method in (("uniform", "nested"), ("row", "gptq"), ("row-greedy", "nearest")):
        with pytest.raises(UsageError, match="does not go with"):
            MethodOptions(codebook, method)
    with pytest.raises(UsageError, match="none of"):
        MethodOptions("binary")
    for share in (-0.1, 0.2, float("nan")):
        with pytest.raises(UsageError, match="outliers"):
            MethodOptions(outliers=share)
    with pytest.raises(UsageError, match="one width"):
        MethodOptions("shared", "gptq").build_codebook((2, 4))
    with pytest.raises(UsageError, match="up to 6 bits"):
        MethodOptions("row").build_codebook((2, 8))
    with pytest.raises(UsageError, match="outside"):
        MethodOptions("uniform").build_codebook((2, 9))
    file = tmp_path / "fisher.safetensors"
    file.touch()
    with pytest.raises(UsageError, match="rotates"):
        QuantizeOptions(fisher=FisherFile(file))


def test_the_command_names_the_methods_there_are() -> None:
    assert tuple(METHODS) == CODEBOOKS
    assert {method for methods in METHODS.values() for method in methods} == set(CLI_METHODS)


def test_shares_are_read_in_percent_or_as_numbers() -> None:
    assert SHARE.convert("0.45%", None, None) == 0.0045
    assert SHARE.convert("0.0045", None, None) == 0.0045
    for text in ("", "%", "-1%", "1e-3", "0,45%"):
        with pytest.raises(click.BadParameter, match="not a share"):
            SHARE.convert(text, None, None)


def test_a_fisher_file_weighs_the_tables(folder: Path, text: Path, tmp_path: Path) -> None:
    path, generator = tmp_path / "fisher.safetensors", np.random.default_rng(0)
    sources = matrix_sources(HfCheckpoint.open(folder).config)
    figures = {
        s.name: generator.gamma(0.5, size=(s.out_features, s.in_features)).astype(np.float32) for s in sources
    }
    save_file(figures, path)
    plain = build(folder, tmp_path / "a.taper", text, (2, 3), codebook="row")
    weighed = build(folder, tmp_path / "b.taper", text, (2, 3), codebook="row", fisher=FisherFile(path))
    assert weighed.provenance["fisher_sha256"] == FisherFile(path).sha256
    name = sources[2].name
    assert not np.array_equal(plain.matrix(name).tables, weighed.matrix(name).tables)
    for forged, message in (
        (figures[name][:, :-1].copy(), "expected float32"),
        (-figures[name], "negative"),
        (figures[name] * np.float32("nan"), "negative"),
    ):
        save_file({**figures, name: forged}, path)
        with pytest.raises(CorruptFileError, match=message):
            FisherFile(path).matrix(sources[2])
    with pytest.raises(ModelNotFoundError, match="not there"):
        FisherFile(tmp_path / "none")
