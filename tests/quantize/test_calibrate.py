"""Calibration passages, and the layer-by-layer walk against the whole decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from taper.errors import TaperError, UsageError
from taper.formats.huggingface import HfCheckpoint
from taper.kernels import rotate
from taper.models import Decoder
from taper.quantize.calibrate import CalibrationRun, Moments, generate_tokens, sample_tokens
from taper.testing.tiny import tiny_hf_dir

F32 = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> HfCheckpoint:
    return HfCheckpoint.open(tiny_hf_dir(tmp_path_factory.mktemp("hf") / "tiny"))


def test_moments_are_those_of_the_whole_decoder(checkpoint: HfCheckpoint) -> None:
    # Ten sequences are a whole batch and a part of one.
    tokens = np.random.default_rng(0).integers(0, 300, (10, 20)).astype(np.int32)
    run = CalibrationRun(checkpoint, tokens)
    found = {name: moments for index in range(2) for name, moments in run.layer(index).items()}
    found["embed"] = run.head()

    seen: dict[str, list[F32]] = {name: [] for name in found}
    decoder = Decoder.from_hf(checkpoint)
    for sequence in tokens:
        decoder.forward(
            sequence, decoder.new_cache(20), 32, "none", observe=lambda name, x: seen[name].append(x.copy())
        )
    assert len(found) == 2 * 4 + 1
    for name, moments in found.items():
        inputs = np.concatenate(seen[name]).astype(np.float64)
        expected = inputs.T @ inputs
        assert moments.num_tokens == 200
        # Float32 inputs from the same operations, products of 160 rows: 1e-5 of the largest entry is ample.
        np.testing.assert_allclose(moments.total, expected, atol=1e-5 * np.abs(expected).max())


def test_unobserved_layers_still_move_the_hidden_states(checkpoint: HfCheckpoint) -> None:
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    watched, resumed = CalibrationRun(checkpoint, tokens), CalibrationRun(checkpoint, tokens)
    watched.layer(0)
    assert resumed.layer(0, observe=False) == {}
    for name, moments in watched.layer(1).items():
        if name == "layers.1.qkv":
            np.testing.assert_array_equal(moments.total, resumed.layer(1)[name].total)


def test_layers_run_in_order(checkpoint: HfCheckpoint) -> None:
    run = CalibrationRun(checkpoint, np.zeros((1, 4), dtype=np.int32))
    with pytest.raises(ValueError, match="layer 1 asked for, layer 0 is next"):
        run.layer(1)
    with pytest.raises(ValueError, match="layer 0 has not run"):
        run.head()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_inputs_that_are_not_finite_are_refused() -> None:
    moments = Moments.empty(64)
    moments.add(np.ones((2, 64), dtype=np.float32))
    moments.check("layers.0.o")
    moments.add(np.full((2, 64), 1e30, dtype=np.float32))  # its square is beyond float32
    with pytest.raises(TaperError, match=r"layers\.0\.o: .* not finite"):
        moments.check("layers.0.o")


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_walk_says_where_it_left_the_numbers(tmp_path: Path) -> None:
    folder = tiny_hf_dir(tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= np.float32(1e30)
    save_file(tensors, folder / "model.safetensors")
    run = CalibrationRun(HfCheckpoint.open(folder), np.arange(8, dtype=np.int32)[None])
    with pytest.raises(TaperError, match=r"layers\.0\.down: .* not finite"):
        run.layer(0)


def test_rotated_moments_are_those_of_rotated_inputs() -> None:
    generator = np.random.default_rng(1)
    inputs = generator.standard_normal((50, 96)).astype(np.float32)
    signs = generator.choice(np.array([-1, 1], dtype=np.float32), 96)
    moments = Moments.empty(96)
    moments.add(inputs)
    turned = rotate(inputs, signs, 32).astype(np.float64)
    result, mean = moments.rotated(signs, 32)
    np.testing.assert_allclose(result, turned.T @ turned / 50, atol=2e-5)
    np.testing.assert_array_equal(result, result.T)
    np.testing.assert_array_equal(mean, 0)


def test_moments_about_the_mean_are_those_of_scaled_inputs() -> None:
    generator = np.random.default_rng(2)
    inputs = (generator.standard_normal((50, 96)) + 3.0).astype(np.float32)
    signs = generator.choice(np.array([-1, 1], dtype=np.float32), 96)
    gain = generator.uniform(0.5, 2.0, 96).astype(np.float32)
    moments = Moments.empty(96)
    moments.add(inputs)
    turned = rotate(inputs * gain, signs, 32).astype(np.float64)
    result, mean = moments.rotated(signs, 32, gain, centred=True)
    # float32 products of 50 rows of size 3: 50 * 9 * 2^-24 relative to 50, and the gains' 4.
    np.testing.assert_allclose(result, np.cov(turned.T, bias=True), atol=2e-4)
    np.testing.assert_allclose(mean, turned.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(moments.variances(), inputs.astype(np.float64).var(axis=0), rtol=1e-4)


def test_passages_cover_the_whole_text(checkpoint: HfCheckpoint) -> None:
    text = "a" * 5000 + "z" * 5000
    tokens = sample_tokens(checkpoint, text, 1024)
    assert tokens.dtype == np.int32
    assert tokens.shape == (4, 256)  # the context of the tiny model
    assert len(np.unique(tokens[:2])) == len(np.unique(tokens[2:])) == 1
    assert tokens[0, 0] != tokens[3, 0]
    np.testing.assert_array_equal(tokens, sample_tokens(checkpoint, text, 1024))


def test_a_short_text_gives_one_short_sequence(checkpoint: HfCheckpoint) -> None:
    assert sample_tokens(checkpoint, "xyz", 32768).shape[0] >= 1
    assert sample_tokens(checkpoint, "xyz", 256).shape == (1, 3)
    with pytest.raises(UsageError, match="has 1 tokens"):
        sample_tokens(checkpoint, "x", 256)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    folder = tiny_hf_dir(tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        sample_tokens(HfCheckpoint.open(folder), "text", 256)


def test_generated_tokens_follow_the_model(checkpoint: HfCheckpoint) -> None:
    tokens = generate_tokens(checkpoint, 600, seed=3)
    assert tokens.shape == (2, 256)
    np.testing.assert_array_equal(tokens, generate_tokens(checkpoint, 600, seed=3))
    assert not np.array_equal(tokens, generate_tokens(checkpoint, 600, seed=4))
    decoder = Decoder.from_hf(checkpoint)
    logits = decoder.forward(tokens[0], decoder.new_cache(256), 32, logits="all")
    assert logits is not None
    scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    drawn = scores[np.arange(255), tokens[0, 1:]].mean()
    # A sample's mean log-probability is minus the entropy, give or take; uniform draws would lie far below.
    entropy = -(np.exp(scores) * scores).sum(axis=1).mean()
    spread = scores.std() / np.sqrt(255)
    assert abs(drawn + entropy) < 5 * spread
