"""The decoder over planes and in float: splits, widths, hooks, accounting, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from taper import kernels
from taper.config import RopeConfig
from taper.errors import DoesNotFitError, TaperError, UsageError
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.formats.spec import FINAL_NORM, PlanedMatrix, TaperHeader
from taper.formats.writer import write_taper
from taper.kvcache import KvCache
from taper.layers.embedding import FloatEmbedding, PlanedEmbedding
from taper.layers.linear import Before, FloatLinear, Linear, Norm, Rotation, Swiglu
from taper.models.block import Block
from taper.models.decoder import Decoder
from taper.models.families import matrix_sources, read_matrix
from taper.models.parts import FLOAT_BITS, LAYER_MATRICES, Parts, native_decoder, planed_parts
from taper.testing.tiny import tiny_config, tiny_hf_dir, tiny_taper

F32 = npt.NDArray[np.float32]
MIN_BITS, MAX_BITS = 2, 6
TOKENS = np.array([0, 17, 299, 4, 4, 120, 33, 250, 1, 77, 62, 5, 180, 9, 211, 40, 3], dtype=np.int32)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> TaperFile:
    """Untied, with biases, a gain before the head, and row scales of its own for every width."""
    folder = tmp_path_factory.mktemp("models")
    plain = TaperFile.open(
        tiny_taper(folder / "plain.taper", MIN_BITS, MAX_BITS, qkv_bias=True, tie_word_embeddings=False)
    )
    random = np.random.default_rng(3)

    def with_level_scales(matrix: PlanedMatrix) -> PlanedMatrix:
        factors = random.uniform(0.9, 1.1, (MAX_BITS - MIN_BITS + 1, 1))
        return replace(matrix, scales=(matrix.scales * factors).astype(np.float16))

    matrices = [with_level_scales(plain.matrix(spec.name)) for spec in plain.matrices]
    gain = random.uniform(0.5, 1.5, plain.config.hidden_size).astype(np.float32)
    header = TaperHeader(plain.config, MIN_BITS, MAX_BITS, plain.codebook)
    write_taper(folder / "file.taper", header, matrices, {FINAL_NORM: gain})
    return TaperFile.open(folder / "file.taper")


@pytest.fixture(scope="module")
def decoder(file: TaperFile) -> Decoder:
    return Decoder.from_taper(file)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> HfCheckpoint:
    path = tmp_path_factory.mktemp("models") / "hf"
    return HfCheckpoint.open(tiny_hf_dir(path, architecture="Qwen2ForCausalLM", qkv_bias=True))


@pytest.fixture
def keep_num_threads() -> Iterator[None]:
    before = kernels.num_threads()
    yield
    kernels.set_num_threads(before)


def all_logits(decoder: Decoder, bits: int, chunk: int = len(TOKENS)) -> F32:
    """Logits of every token, the sequence cut into calls of `chunk` tokens."""
    cache = decoder.new_cache(len(TOKENS))
    rows = [
        decoder.forward(TOKENS[begin : begin + chunk], cache, bits, logits="all")
        for begin in range(0, len(TOKENS), chunk)
    ]
    assert cache.num_tokens == len(TOKENS)
    return np.concatenate([row for row in rows if row is not None])


@pytest.mark.parametrize("bits", range(MIN_BITS, MAX_BITS + 1))
@pytest.mark.usefixtures("keep_num_threads")
def test_any_split_and_any_threads_give_the_same_bytes(decoder: Decoder, bits: int) -> None:
    whole = all_logits(decoder, bits)
    for threads in (1, 2):
        kernels.set_num_threads(threads)
        for chunk in (1, 3, 7, len(TOKENS)):
            assert all_logits(decoder, bits, chunk).tobytes() == whole.tobytes()


def test_every_width_gives_other_logits(decoder: Decoder) -> None:
    results = [all_logits(decoder, bits) for bits in range(MIN_BITS, MAX_BITS + 1)]
    for narrow, wide in pairwise(results):
        assert not np.array_equal(narrow, wide)


def test_widths_may_change_from_token_to_token(decoder: Decoder) -> None:
    """What a policy does; a token sees the keys of the widths that wrote them, so history matters."""
    cache = decoder.new_cache(len(TOKENS))
    decoder.forward(TOKENS[:8], cache, MAX_BITS, logits="none")
    narrow = decoder.forward(TOKENS[8:9], cache, MIN_BITS)
    assert narrow is not None
    fresh = decoder.new_cache(len(TOKENS))
    decoder.forward(TOKENS[:8], fresh, MIN_BITS, logits="none")
    other_history = decoder.forward(TOKENS[8:9], fresh, MIN_BITS)
    assert not np.array_equal(narrow, other_history)


@pytest.mark.parametrize("bits", [3, MAX_BITS])
def test_planes_compute_what_their_float_weights_do(decoder: Decoder, file: TaperFile, bits: int) -> None:
    """The float path, held to transformers by the goldens, over the dequantised and turned back planes.

    What is left is the rounding of activations to 1/127 of a row's largest value (relative error 0.009 for
    Gaussian rows of 96 with a largest value near 2.7 sigma, over 8 products in quadrature below 0.03) and
    float16 keys. A missing gain, bias, sign or rotation is off by more than 0.3.
    """
    exact = all_logits(Decoder(dequantised(file, bits)), FLOAT_BITS)
    planed = all_logits(decoder, bits)
    error = np.linalg.norm(planed - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.05


def test_truncation_replays_to_the_same_bytes(decoder: Decoder) -> None:
    cache = decoder.new_cache(len(TOKENS))
    decoder.forward(TOKENS[:10], cache, MAX_BITS, logits="none")
    first = decoder.forward(TOKENS[10:], cache, MAX_BITS)
    cache.truncate(10)
    decoder.forward(TOKENS[:3], cache, MIN_BITS, logits="none")  # a rejected draft
    cache.truncate(10)
    second = decoder.forward(TOKENS[10:], cache, MAX_BITS)
    assert first is not None
    assert second is not None
    assert first.tobytes() == second.tobytes()


def test_last_is_the_last_row_of_all_and_none_is_nothing(decoder: Decoder) -> None:
    full = decoder.new_cache(len(TOKENS))
    rows = decoder.forward(TOKENS, full, 4, logits="all")
    assert rows is not None
    assert rows.shape == (len(TOKENS), decoder.config.vocab_size)
    written = all_keys_and_values(full)
    last = decoder.forward(TOKENS, decoder.new_cache(len(TOKENS)), 4)
    assert last is not None
    np.testing.assert_array_equal(last, rows[-1:])
    cache = decoder.new_cache(len(TOKENS))
    assert decoder.forward(TOKENS[:-5], cache, 4, logits="none") is None
    assert cache.num_tokens == len(TOKENS) - 5
    np.testing.assert_array_equal(decoder.forward(TOKENS[-5:], cache, 4, logits="all"), rows[-5:])
    np.testing.assert_array_equal(all_keys_and_values(cache), written)


def test_a_file_cut_after_some_planes_is_the_same_model_at_those_widths(
    file: TaperFile, decoder: Decoder, tmp_path: Path
) -> None:
    """Narrow widths read no later plane, except that the embedding is looked up at all planes there are."""
    cut = tmp_path / "cut.taper"
    cut.write_bytes(file.path.read_bytes()[: file.bytes_at(4)])
    narrow = Decoder.from_taper(TaperFile.open(cut))
    assert (narrow.min_bits, narrow.max_bits) == (MIN_BITS, 4)
    cut_embedding = planed_parts(TaperFile.open(cut)).embedding
    with_cut_embedding = Decoder(replace(planed_parts(file), embedding=cut_embedding, native=None))
    for bits in (2, 3, 4):
        np.testing.assert_array_equal(all_logits(narrow, bits), all_logits(with_cut_embedding, bits))
    assert not np.array_equal(all_logits(narrow, 3), all_logits(decoder, 3))
    with pytest.raises(UsageError, match=r"5 bits are outside the model's 2\.\.4"):
        all_logits(narrow, 5)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    decoder = Decoder.from_taper(TaperFile.open(tiny_taper(tmp_path / "tied.taper", MIN_BITS, MAX_BITS)))
    names: list[str] = []
    decoder.forward(TOKENS, decoder.new_cache(32), 4, observe=lambda name, _: names.append(name))
    assert names[-1] == "embed"


def test_observer_sees_the_input_of_every_matrix(checkpoint: HfCheckpoint) -> None:
    """Each observed vector times the folded matrix is what the next step works with; names are the file's."""
    decoder = Decoder.from_hf(checkpoint)
    seen: dict[str, F32] = {}
    logits = decoder.forward(
        TOKENS, decoder.new_cache(len(TOKENS)), FLOAT_BITS, "all", lambda name, x: seen.update({name: x})
    )
    sources = {source.name: source for source in matrix_sources(checkpoint.config)}
    assert set(seen) == set(sources)  # tied: the head's input comes under the name embed
    for name, x in seen.items():
        assert x.shape == (len(TOKENS), sources[name].in_features)
    embed, _ = read_matrix(checkpoint, sources["embed"])
    x = embed[TOKENS].astype(np.float64)
    normalised = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + checkpoint.config.rms_norm_eps)
    np.testing.assert_allclose(seen["layers.0.qkv"], normalised, rtol=1e-5, atol=1e-6)
    gate_up, _ = read_matrix(checkpoint, sources["layers.1.gate_up"])
    gate, up = np.split(seen["layers.1.gate_up"].astype(np.float64) @ gate_up.T, 2, axis=1)
    np.testing.assert_allclose(seen["layers.1.down"], gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-5)
    assert logits is not None
    np.testing.assert_allclose(seen["embed"] @ embed.T, logits, rtol=1e-4, atol=1e-5)


def test_observing_changes_nothing_and_works_without_logits(decoder: Decoder) -> None:
    names: list[str] = []
    cache = decoder.new_cache(len(TOKENS))
    decoder.forward(TOKENS[:-1], cache, 4, "none", lambda name, _: names.append(name))
    last = decoder.forward(TOKENS[-1:], cache, 4, observe=lambda name, _: names.append(name))
    layer = [f"layers.{index}.{matrix}" for index in range(2) for matrix in ("qkv", "o", "gate_up", "down")]
    assert names == [*layer, "head"] * 2
    np.testing.assert_array_equal(last, all_logits(decoder, 4)[-1:])


def test_folded_gains_are_in_the_columns(checkpoint: HfCheckpoint) -> None:
    source = next(source for source in matrix_sources(checkpoint.config) if source.name == "layers.1.qkv")
    weight, bias = read_matrix(checkpoint, source)
    layer = "model.layers.1"
    stacked = np.concatenate([checkpoint.tensor(f"{layer}.self_attn.{part}_proj.weight") for part in "qkv"])
    np.testing.assert_array_equal(weight, stacked * checkpoint.tensor(f"{layer}.input_layernorm.weight"))
    biases = [checkpoint.tensor(f"{layer}.self_attn.{part}_proj.bias") for part in "qkv"]
    np.testing.assert_array_equal(bias, np.concatenate(biases))


def test_bytes_per_pass_count_planes_scales_and_one_embedding_row(file: TaperFile, decoder: Decoder) -> None:
    head_and_layers = [spec for spec in file.matrices if spec.name != "embed"]
    for bits in (2, 5):
        planes = sum(bits * spec.plane_bytes for spec in head_and_layers)
        scales = sum(4 * spec.out_features for spec in head_and_layers)  # one float32 row at this width
        biases = sum(4 * spec.out_features for spec in head_and_layers if spec.has_bias)
        row = MAX_BITS * file.matrices[0].cols // 8 + 4
        assert decoder.bytes_per_pass(bits) == planes + scales + biases + row


def test_float_bytes_per_pass_count_every_weight_once(checkpoint: HfCheckpoint) -> None:
    sources = matrix_sources(checkpoint.config)
    weights = sum(source.out_features * source.in_features for source in sources)
    row = 4 * checkpoint.config.hidden_size
    assert Decoder.from_hf(checkpoint).bytes_per_pass(FLOAT_BITS) == 4 * weights + row


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "at least one"), ([[1, 2]], "at least one"), ([5, 300], "token 300"), ([-1, 5], "token -1")],
    ids=["empty", "two_rows", "beyond", "negative"],
)
def test_tokens_that_are_none_are_refused(decoder: Decoder, tokens: list[int], message: str) -> None:
    cache = decoder.new_cache(8)
    with pytest.raises(UsageError, match=message) as refusal:
        decoder.forward(tokens, cache, 4)
    assert refusal.value.hint
    assert cache.num_tokens == 0


@pytest.mark.parametrize("bits", [MIN_BITS - 1, MAX_BITS + 1, 0, -3])
def test_bits_that_the_file_lacks_are_refused(decoder: Decoder, bits: int) -> None:
    with pytest.raises(UsageError, match=rf"{bits} bits are outside the model's 2\.\.6"):
        decoder.forward(TOKENS, decoder.new_cache(32), bits)
    with pytest.raises(UsageError, match=rf"{bits} bits"):
        decoder.bytes_per_pass(bits)


def test_logits_of_another_kind_are_refused(decoder: Decoder) -> None:
    with pytest.raises(UsageError, match="logits 'first' is none of last, all, none"):
        decoder.forward(TOKENS, decoder.new_cache(32), 4, logits="first")  # type: ignore[arg-type]


def test_a_context_longer_than_the_model_is_refused(decoder: Decoder) -> None:
    assert decoder.new_cache(decoder.context_length).capacity == 256
    with pytest.raises(DoesNotFitError, match="257 tokens is longer than the model's 256"):
        decoder.new_cache(257)


def test_a_full_cache_refuses_and_stays_as_it_was(decoder: Decoder) -> None:
    cache = decoder.new_cache(5)
    decoder.forward(TOKENS[:4], cache, 4, logits="none")
    with pytest.raises(DoesNotFitError, match="2 tokens after 4 are 6, the context holds 5"):
        decoder.forward(TOKENS[4:6], cache, 4)
    assert cache.num_tokens == 4
    assert decoder.forward(TOKENS[4:5], cache, 4) is not None


@pytest.mark.parametrize("logits", ["last", "none"])
def test_a_result_that_is_not_finite_is_reported(file: TaperFile, logits: str) -> None:
    parts = planed_parts(file)

    class Broken(FloatEmbedding):
        def __call__(self, tokens: npt.NDArray[np.int32]) -> F32:
            return np.full((len(tokens), file.config.hidden_size), np.nan, dtype=np.float32)

    embedding = Broken(np.zeros((1, 1), dtype=np.float32))
    check_not_finite(Decoder(replace(parts, embedding=embedding, native=None)), logits)


@pytest.mark.parametrize("logits", ["last", "none"])
def test_a_native_result_that_is_not_finite_is_reported(file: TaperFile, logits: str) -> None:
    parts = planed_parts(file)
    linears = {
        f"{block.name}.{part}": getattr(block, part) for block in parts.blocks for part in LAYER_MATRICES
    } | {"head": parts.head}
    gain = np.full(file.config.hidden_size, np.nan, dtype=np.float32)
    planes, outliers, signs, width, _ = parts.embedding.native  # type: ignore[attr-defined]
    embedding = PlanedEmbedding(planes, Rotation(signs, width), outliers, gain)
    native = native_decoder(file.config, embedding, linears)
    check_not_finite(Decoder(replace(parts, native=native)), logits)


def check_not_finite(broken: Decoder, logits: str) -> None:
    cache = broken.new_cache(8)
    with pytest.raises(TaperError, match="after position 0 at 4 bits is not finite") as report:
        broken.forward(TOKENS[:3], cache, 4, logits=logits)  # type: ignore[arg-type]
    assert report.value.hint
    assert cache.num_tokens == 0


def test_an_unknown_architecture_is_refused_with_the_known_ones(file: TaperFile) -> None:
    parts = planed_parts(file)
    alien = replace(parts, config=replace(parts.config, architecture="BloomForCausalLM"))
    with pytest.raises(UsageError, match="'BloomForCausalLM' is not supported; supported are Llama"):
        Decoder(alien)


def test_a_rope_variant_reaches_the_tables(tmp_path: Path) -> None:
    rope = RopeConfig(variant="linear", parameters={"factor": 4.0})
    plain = Decoder.from_taper(TaperFile.open(tiny_taper(tmp_path / "plain.taper")))
    scaled = Decoder.from_taper(TaperFile.open(tiny_taper(tmp_path / "scaled.taper", rope=rope)))
    assert not np.array_equal(all_logits(plain, 4), all_logits(scaled, 4))
    assert scaled.context_length == 4 * tiny_config().max_position_embeddings


def by_blocks(decoder: Decoder, tokens: npt.NDArray[np.int32], cache: KvCache, bits: float) -> F32:
    """All logits by one call a layer and operation: whoever observes takes that way."""
    logits = decoder.forward(tokens, cache, bits, "all", lambda name, x: None)
    assert logits is not None
    return logits


@pytest.mark.parametrize("bits", [MIN_BITS, 4, MAX_BITS])
def test_the_native_step_gives_the_bytes_of_the_blocks(decoder: Decoder, bits: int) -> None:
    for end in (1, 3, len(TOKENS)):
        native, blocks = decoder.new_cache(20), decoder.new_cache(20)
        got, expected = (
            decoder.forward(TOKENS[:end], native, bits, "all"),
            by_blocks(decoder, TOKENS[:end], blocks, bits),
        )
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(native.array, blocks.array)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_sequences_in_one_step_get_what_each_would_get_alone(decoder: Decoder, num_threads: int) -> None:
    lengths = [3, 1, 9, 5]
    before = kernels.num_threads()
    kernels.set_num_threads(num_threads)
    try:
        caches = []
        for length in lengths:
            caches.append(decoder.new_cache(12))
            decoder.forward(TOKENS[:length], caches[-1], 3, "none")
        together = decoder.decode_batch(TOKENS[: len(lengths)], caches, 3)
    finally:
        kernels.set_num_threads(before)
    for row, length in enumerate(lengths):
        alone = decoder.new_cache(12)
        decoder.forward(TOKENS[:length], alone, 3, "none")
        np.testing.assert_array_equal(
            decoder.forward(TOKENS[row : row + 1], alone, 3), together[row : row + 1]
        )
        np.testing.assert_array_equal(alone.array, caches[row].array)
        assert caches[row].num_tokens == length + 1


def test_a_batch_needs_a_cache_for_each_token(decoder: Decoder, checkpoint: HfCheckpoint) -> None:
    cache = decoder.new_cache(4)
    with pytest.raises(UsageError, match="2 tokens come with 1 caches"):
        decoder.decode_batch([1, 2], [cache, cache], 3)
    full = decoder.new_cache(1)
    decoder.forward([1], full, 3)
    with pytest.raises(DoesNotFitError):
        decoder.decode_batch([1, 2], [cache, full], 3)
    assert (cache.num_tokens, full.num_tokens) == (0, 1)
    model = Decoder.from_hf(checkpoint)
    with pytest.raises(UsageError, match="one sequence at a time"):
        model.decode_batch([1], [model.new_cache(4)], 32)


def test_the_time_of_a_step_is_known_by_stage(file: TaperFile) -> None:
    decoder = Decoder.from_taper(file)
    decoder.times = {}
    decoder.forward(TOKENS, decoder.new_cache(20), 3)
    assert set(decoder.times) >= {"embed", "qkv", "attention", "gate_up", "down", "head"}
    assert min(decoder.times.values()) >= 0
    assert sum(decoder.times.values()) > 0


def all_keys_and_values(cache: KvCache) -> npt.NDArray[np.float16]:
    return np.stack([array.ravel() for layer in cache.layers for array in layer])


def dequantised(file: TaperFile, bits: int) -> Parts:
    """The file's model at one width with float32 weights, its rotations undone."""
    parts, widest = planed_parts(file), file.max_bits

    def weight(name: str, width: int) -> F32:
        matrix = file.matrix(name)
        rows = kernels.Planes(
            list(matrix.planes),
            file.codebook.values,
            file.codebook.level_scales,
            matrix.scales.astype(np.float32),
            None,
            matrix.spec.in_features,
        ).rows(np.arange(matrix.spec.out_features), width)
        return kernels.rotate(rows, matrix.signs, matrix.block, inverse=True)

    def linear(name: str, before: Before) -> Linear:
        return FloatLinear(weight(name, bits), file.matrix(name).bias, before)

    norm = Norm(file.config.rms_norm_eps)
    blocks = tuple(
        Block(
            name=block.name,
            qkv=linear(f"{block.name}.qkv", norm),
            o=linear(f"{block.name}.o", None),
            gate_up=linear(f"{block.name}.gate_up", norm),
            down=linear(f"{block.name}.down", Swiglu()),
            attention=block.attention,
        )
        for block in parts.blocks
    )
    head = linear("head", Norm(file.config.rms_norm_eps, file.tensor("norm.final")))
    embedding = FloatEmbedding(weight("embed", widest))
    return Parts(file.config, embedding, blocks, head, "head", np.float32, FLOAT_BITS, FLOAT_BITS)
