"""The search for bits of activations and KV cache on a model: what it tries, tests, chooses and refuses."""

from __future__ import annotations

import numpy as np
import pytest

from taper.errors import UsageError
from taper.formats.activations import TENSOR_TYPES, ActivationBits
from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.testing.tiny import tiny_config
from taper.tune import activation_spaces, activations
from taper.tune.activation_spaces import ActivationOptions, multiplications
from taper.tune.activations import tune_activations


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts of some thousand tokens of the tiny tokenizer."""
    folder, found = tmp_path_factory.mktemp("texts"), []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        words = rng.choice(["the ", "cat ", "sat ", "on ", "a ", "mat ", "and ", "went ", "home "], 12000)
        found.append(folder / f"{seed}.txt")
        found[-1].write_text("".join(words))
    return tuple(found)


def options(texts, **changes):
    return ActivationOptions(texts, **({"calibration_windows": 2, "held_out_windows": 12} | changes))


def test_multiplications_are_those_of_the_matrices():
    config = tiny_config(num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64, intermediate_size=96)
    assert multiplications(config) == (64 * (4 + 2 * 2) * 16, 64 * 64, 2 * 64 * 96, 64 * 96)


def test_the_search_holds_its_limit_on_both_halves_and_names_its_path(model, texts):
    tried = []
    report = tune_activations(model, options(texts, max_loss=0.05, bits=4), tried.append)
    assert report.names == TENSOR_TYPES
    assert tuple(tried) == report.result.evaluations
    assert report.bits == 4
    best = report.result.best
    assert best.loss <= 0.05
    assert report.winner.bound <= 0.05
    assert report.winner.bits in [tested.bits for tested in report.tested]
    assert report.chosen.bits == dict(zip(TENSOR_TYPES, report.winner.bits, strict=True))
    assert report.chosen.evidence["held_out_bound"] == report.winner.bound
    assert report.saving == pytest.approx(
        16 / np.average(report.winner.bits, weights=multiplications(TaperFile.open(model).config))
    )
    # The held-out loss again, by hand.
    windows = held_out_windows(model, texts, 12)
    exact = nll(model, ActivationBits(dict.fromkeys(TENSOR_TYPES, 14)), windows)
    found = nll(model, report.chosen, windows)
    tested = next(tested for tested in report.tested if tested.bits == report.winner.bits)
    assert tested.loss == pytest.approx(np.expm1((found - exact).mean()), abs=1e-9)


def test_without_texts_the_first_windows_that_the_model_writes_calibrate(model, monkeypatch):
    written = {}

    def write(decoder, bits, num_windows, length, begin, progress):
        rng = np.random.default_rng(3)
        written.update(windows=rng.integers(5, 60, (num_windows, length)).astype(np.int32), bits=bits)
        return written["windows"]

    seen = []
    monkeypatch.setattr(activations, "write_windows", write)
    monkeypatch.setattr(
        activations,
        "window_losses",
        lambda decoder, windows, bits: seen.append(windows) or np.zeros(len(windows)),
    )
    report = tune_activations(model, options((), bits=3, max_evaluations=1, held_out_windows=24))
    assert written["windows"].shape == (2 + 24, 512)
    assert written["bits"] == 3
    np.testing.assert_array_equal(seen[0], written["windows"][:2])
    np.testing.assert_array_equal(seen[-1], written["windows"][2:])
    assert report.texts == ("own text",)
    assert report.num_tokens == (2 * 255, 24 * 255)


def held_out_windows(model, texts, count):
    file = TaperFile.open(model)
    from taper.evaluate.protocols import cut
    from taper.tokenizer import Tokenizer

    tokenizer = Tokenizer(file.tokenizer_json)
    return np.concatenate(
        [cut(text.read_text(), tokenizer, 512, "llama.cpp").tokens[-count:] for text in texts]
    )


def nll(model, choice, windows):
    decoder, found = Decoder.from_taper(TaperFile.open(model), activations=choice), []
    for window in windows:
        logits = decoder.forward(window, decoder.new_cache(512), 4, "all")[256:-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found.append(-scores[np.arange(255), window[257:]].mean())
    return np.array(found)


def test_the_dearest_is_tested_first_and_a_failure_ends_the_test(model, texts, monkeypatch):
    """Three dearer ones and the first best hold on held-out text, the second best does not: nothing after it
    is looked at."""
    bounds = iter([0.001, 0.002, 0.001, 0.003, 0.5, 0.001])
    monkeypatch.setattr(activations, "upper_bound", lambda differences: np.log1p(next(bounds)))
    losses = iter([0.0] * 50)
    monkeypatch.setattr(activations._Losses, "loss", lambda self, choice: next(losses))
    report = tune_activations(model, options(texts, max_loss=0.01, max_evaluations=4))
    bests = [tried.bits for tried in report.result.evaluations if tried.is_best]
    assert len(bests) > 2
    safer = [(7,) * 4, (6,) * 4, (5,) * 4]
    assert [tested.bits for tested in report.tested] == [*safer, *bests[:2]]
    assert report.winner.bits == bests[0] == (4, 4, 4, 4)


def test_a_dearer_one_is_chosen_where_the_path_does_not_hold_on_other_text(model, texts, monkeypatch):
    bounds = iter([0.001, 0.002, 0.5])
    monkeypatch.setattr(activations, "upper_bound", lambda differences: np.log1p(next(bounds)))
    monkeypatch.setattr(activations._Losses, "loss", lambda self, choice: 0.0)
    report = tune_activations(model, options(texts, max_loss=0.01, max_evaluations=2))
    assert report.winner.bits == (6, 6, 6, 6)


def test_times_rise_with_the_bits_whatever_the_noise():
    assert activation_spaces._rising([3.0, 1.0, 2.0, 9.0, 4.0]) == [3.0, 3.0, 3.0, 4.0, 4.0]


def test_nothing_is_chosen_where_nothing_holds(model, texts):
    report = tune_activations(model, options(texts, max_loss=-1.0))
    assert report.winner is None
    assert report.chosen is None
    assert report.result.best is None


def steady(monkeypatch):
    """Every step takes a millisecond, those with wide activations two."""
    monkeypatch.setattr(
        activation_spaces._StepCosts,
        "_times",
        lambda self, choices, bits: {c: 0.002 if c[0] > 7 else 0.001 for c in choices},
    )


def test_the_joint_search_chooses_bands_keys_and_values(model, texts, monkeypatch):
    steady(monkeypatch)
    limit = 0.02

    # Wide activations in the first layer's o, and keys of at least 5 bits, are what holds the loss.
    def loss(self, choice):
        o, kv = choice.bits["o"], Decoder.from_taper(self.file, activations=choice).kv
        return 0.0 if kv.key_bits >= 5 and kv.value_bits >= 3 and o == 7 else 1.0

    monkeypatch.setattr(activations._Losses, "loss", loss)
    monkeypatch.setattr(activations, "upper_bound", lambda differences: 0.0)
    report = tune_activations(model, options(texts, max_loss=limit, search="joint"))
    assert report.names[-2:] == ("keys", "values")
    assert report.result.best.bits[-2:] == (5, 3)
    assert report.chosen.kv == "k5v3"
    assert report.chosen.bits == dict.fromkeys(TENSOR_TYPES, 7)
    assert report.saving > 1


def test_bands_become_bits_by_layer(model, texts, monkeypatch):
    steady(monkeypatch)
    file = TaperFile.open(model)
    space = activation_spaces.JointSpace(file, 4, options(texts))
    chosen = space.chosen((7, 7, 14, 7, 7, 7, 7, 14, 6, 4))
    assert chosen.bits == {"qkv": 7, "o": [14, 7], "gate_up": 7, "down": [7, 14]}
    assert chosen.kv == "k6v4"
    assert ActivationBits.from_dict(chosen.to_dict(), file.config.num_layers) == chosen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": "x"}, "search 'x' is none of paper, joint"),
        ({"bits": 9}, "9 bits are outside the file's 2..8"),
        ({"held_out_windows": 10**6}, "windows of 512 tokens; 1000002 are needed"),
    ],
)
def test_what_cannot_be_searched_is_refused(model, texts, changes, message):
    with pytest.raises(UsageError, match=message):
        tune_activations(model, options(**({"texts": texts} | changes)))
