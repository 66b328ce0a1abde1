"""The comparison with llama.cpp: what can be checked without it. Every run of it checks F32 logits itself."""

from __future__ import annotations

from pathlib import Path

import checkpoint as conversion
import gguf_models
import numpy as np
import pytest
from common import BenchmarkError
from field import check_float, check_source
from field_report import Point, Row, rows, summary, table
from peer_models import variants
from readings import OurFile, budgets, largest_fitting, reading_bytes

from taper.evaluate import WidthResult
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.formats.safetensors_header import TensorEntry, read_header
from taper.testing.tiny import tiny_config, tiny_hf_dir, tiny_taper


@pytest.fixture
def source(tmp_path: Path) -> HfCheckpoint:
    return HfCheckpoint.open(tiny_hf_dir(tmp_path / "hf"))


def point(kl: float, top1: float, num_bytes: int = 100, name: str = "Q4_0") -> Point:
    result = WidthResult(
        4,
        10.0,
        0.1,
        1.0,
        top1_agreement=top1,
        mean_kl=kl,
        median_kl=kl,
        p999_kl=kl,
        mean_kl_standard_error=kl,
    )
    return Point(name, num_bytes, num_bytes + 10, 4.5, result)


def test_permuted_rows_meet_pairwise_rotation():
    """Rotating rows i and i + n/2, then permuting, is permuting, then rotating rows 2i and 2i + 1."""
    heads, dim = 3, 8
    generator = np.random.default_rng(0)
    vector = generator.standard_normal((heads * dim, 1)).astype(np.float32)
    angles = generator.standard_normal(dim // 2)
    turn = np.exp(1j * angles)
    halves = vector.reshape(heads, 2, dim // 2)
    turned = (halves[:, 0] + 1j * halves[:, 1]) * turn
    expected = conversion.permute(
        np.stack([turned.real, turned.imag], axis=1).reshape(-1, 1).astype(np.float32), heads
    )
    pairs = conversion.permute(vector, heads).reshape(heads, dim // 2, 2)
    turned_pairs = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
    actual = np.stack([turned_pairs.real, turned_pairs.imag], axis=-1).reshape(-1, 1)
    # One multiplication in float64, stored in float32.
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_of_the_random_models(tmp_path: Path, tied: bool):
    opened = HfCheckpoint.open(tiny_hf_dir(tmp_path / "hf", tie_word_embeddings=tied))
    config = opened.config
    shape = gguf_models.Shape(
        "tiny", config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads,
        config.intermediate_size, config.vocab_size, tied,
    )  # fmt: skip
    assert {name: values.shape for name, values in conversion.converted(opened)} == dict(
        gguf_models.tensor_shapes(shape)
    )


def test_only_queries_and_keys_are_permuted(source: HfCheckpoint):
    tensors = dict(conversion.converted(source))
    config = source.config
    prefix = "model.layers.1.self_attn"
    for ours, theirs, heads in (("q", "q", config.num_heads), ("k", "k", config.num_kv_heads)):
        expected = conversion.permute(source.tensor(f"{prefix}.{ours}_proj.weight"), heads)
        np.testing.assert_array_equal(tensors[f"blk.1.attn_{theirs}.weight"], expected)
    for ours, theirs in (("v", "v"), ("o", "output")):
        expected = source.tensor(f"{prefix}.{ours}_proj.weight")
        np.testing.assert_array_equal(tensors[f"blk.1.attn_{theirs}.weight"], expected)


def test_metadata_has_the_checkpoints_numbers():
    config = tiny_config()
    fields = conversion.checkpoint_metadata(config, "tiny")
    assert fields["layer_norm_rms_eps"] == config.rms_norm_eps
    assert fields["rope_freq_base"] == config.rope.theta
    assert fields["file_type"] == conversion.FILE_TYPE_ALL_F32
    assert len(fields["token_list"]) == config.vocab_size


@pytest.mark.parametrize("changes", [{"qkv_bias": True}, {"architecture": "Qwen2ForCausalLM"}])
def test_models_that_would_be_converted_wrongly_are_refused(changes: dict[str, object]):
    with pytest.raises(BenchmarkError, match="not converted"):
        conversion.checkpoint_metadata(tiny_config(**changes), "tiny")


def test_importance_is_of_the_normalised_input_times_the_gain(source: HfCheckpoint):
    tokens = np.random.default_rng(1).integers(0, source.config.vocab_size, (2, 16), dtype=np.int32)
    squares = conversion.input_squares(source, tokens)
    x = source.tensor("model.embed_tokens.weight")[tokens.reshape(-1)].astype(np.float64)
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True) + source.config.rms_norm_eps)
    x *= source.tensor("model.layers.0.input_layernorm.weight")
    for name in ("attn_q", "attn_k", "attn_v"):
        # Sums of 32 squares of float32 values.
        np.testing.assert_allclose(squares[f"blk.0.{name}.weight"], (x**2).sum(axis=0), rtol=1e-5)
    names = {name for name, _ in conversion.converted(source)}
    assert set(squares) == {name for name in names if "blk" in name and "norm" not in name}


def test_imatrix_file_holds_sums_and_counts(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "imatrix.gguf"
    tokens = np.zeros((3, 8), dtype=np.int32)
    conversion.write_imatrix(path, {"blk.0.attn_q.weight": np.arange(4.0)}, tokens, "valid.txt")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight.in_sum2"].reshape(-1), np.arange(4.0))
    assert tensors["blk.0.attn_q.weight.counts"].item() == 24
    assert conversion.tensor_bytes(path) == 4 * 4 + 4


def test_formats_come_plain_and_weighted_where_both_exist():
    assert variants(["IQ2_XS", "Q4_0", "Q8_0"]) == [
        ("IQ2_XS", True), ("Q4_0", False), ("Q4_0", True), ("Q8_0", False),
    ]  # fmt: skip


def test_largest_reading_within_the_limit():
    candidates = [2.0, 2.5, 3.0, 8.0]
    assert largest_fitting(candidates, lambda bits: int(100 * bits), 300) == 3.0
    assert largest_fitting(candidates, lambda bits: int(100 * bits), 299) == 2.5
    assert largest_fitting(candidates, lambda bits: int(100 * bits), 9999) == 8.0
    assert largest_fitting(candidates, lambda bits: int(100 * bits), 199) is None


def test_budgets_leave_out_whole_numbers_within():
    fractions = budgets(2, 4, True)
    assert budgets(2, 4, False) == [2.0, 3.0, 4.0]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1], len(fractions)) == (2.0, 4.0, 200)
    assert 3.0 not in fractions
    assert {2.99, 3.01} <= set(fractions)


def test_bytes_of_a_reading_are_planes_one_row_of_scales_signs_and_norm(tmp_path: Path):
    file = TaperFile.open(tiny_taper(tmp_path / "tiny.taper"))
    entries = read_header(file.path).entries
    widths = {spec.name: 2 + index % 3 for index, spec in enumerate(file.matrices)}
    expected = 4 * file.config.hidden_size
    for spec in file.matrices:
        planes = sum(entries[f"{spec.name}.plane{plane}"].num_bytes for plane in range(widths[spec.name]))
        expected += planes + 2 * spec.out_features + -(-spec.in_features // 8)
    assert reading_bytes(entries, file.matrices, widths) == expected


def test_tables_count_at_the_width_read_and_outliers_whole(tmp_path: Path):
    file = TaperFile.open(tiny_taper(tmp_path / "tiny.taper"))
    entries = read_header(file.path).entries
    widths = {spec.name: 3 for spec in file.matrices}
    plain = reading_bytes(entries, file.matrices, widths)
    rows_of_embed = file.matrices[0].out_features
    columns = 4 + 8 + 16
    extra = (
        TensorEntry("embed.tables", "U8", (rows_of_embed, columns), 0, rows_of_embed * columns),
        TensorEntry("embed.outliers.values", "F16", (7,), 0, 14),
    )
    added = entries | {entry.name: entry for entry in extra}
    assert reading_bytes(added, file.matrices, widths) == plain + 8 * rows_of_embed + 14


def test_reading_within_a_limit_holds_its_planes_only(tmp_path: Path):
    ours = OurFile(TaperFile.open(tiny_taper(tmp_path / "tiny.taper")))
    limit = ours.num_bytes(5.0) - 1
    reading = ours.fitting(limit)
    assert reading is not None
    assert (reading.bits, reading.num_bytes) == (4.0, ours.num_bytes(4.0))
    assert set(reading.decoder.widths(reading.decoder.max_bits).values()) == {4}
    assert reading is ours.reading(4.0)
    assert ours.fitting(ours.num_bytes(2.0) - 1) is None


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (point(0.8, 0.9), "ahead"),
        (point(0.81, 0.9), "even"),
        (point(0.8, 0.89), "even"),
        (point(1.01, 0.99), "behind"),
        (None, "no reading"),
    ],
)
def test_verdict(ours: Point | None, verdict: str):
    assert Row("Q4_0", point(1.0, 0.9), ours, True).verdict == verdict


def test_summary_counts_each_format_at_its_better_variant():
    theirs = [
        ("Q4_0", point(1.0, 0.9)),
        ("Q4_0", point(0.5, 0.9, name="Q4_0 imatrix")),
        ("Q6_K", point(1.0, 0.9)),
    ]
    measured = rows(theirs, [point(0.45, 0.9), point(0.45, 0.9), None])
    assert [row.best for row in measured] == [False, True, True]
    assert summary(measured).endswith("ahead of 0, even with 1, behind with 0")
    lines = table(measured).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "**Q4_0 imatrix**" in lines[3]


def test_a_file_of_another_checkpoint_is_refused(tmp_path: Path, source: HfCheckpoint):
    with pytest.raises(BenchmarkError, match="was made from the checkpoint"):
        check_source(TaperFile.open(tiny_taper(tmp_path / "tiny.taper")), source)


def test_nothing_is_compared_when_the_float_models_differ():
    check_float(point(1e-8, 1.0).result)
    for wrong in (point(1e-6, 1.0), point(1e-8, 0.99)):
        with pytest.raises(BenchmarkError, match="nothing can be compared"):
            check_float(wrong.result)
