"""The bits of activations and KV cache that a file chooses: written, read, refused, and used."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from taper.errors import UsageError
from taper.formats.activations import ActivationBits
from taper.formats.container import TaperFile
from taper.formats.writer import rewrite_header
from taper.kvcache import KvPlanes
from taper.models import Decoder
from taper.testing.tiny import tiny_taper

TOKENS = np.arange(20, 45, dtype=np.int32)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_taper(tmp_path_factory.mktemp("activations") / "plain.taper")


def with_bits(plain: Path, path: Path, choice: ActivationBits) -> Path:
    shutil.copy(plain, path)
    rewrite_header(path, dataclasses.replace(TaperFile.open(path).header, activations=choice))
    return path


def logits(decoder: Decoder, chunk: int = 25):
    cache = decoder.new_cache(len(TOKENS))
    return np.concatenate(
        [decoder.forward(TOKENS[begin : begin + chunk], cache, 4, "all") for begin in range(0, 25, chunk)]
    )


def test_written_and_read_again(plain, tmp_path):
    choice = ActivationBits(
        {"qkv": 5, "down": [9, 6]}, "7,4@128", {"search": "paper", "held_out_loss": 0.004}
    )
    file = TaperFile.open(with_bits(plain, tmp_path / "file.taper", choice), verify=True)
    assert file.header.activations == choice
    assert TaperFile.open(plain).header.activations == ActivationBits()
    assert Decoder.from_taper(file).kv == KvPlanes(7, 7, 4, 4, 128)
    assert Decoder.from_taper(file, kv="float16").kv is None


def test_bits_of_a_type_change_its_matrices_and_no_others(plain):
    file = TaperFile.open(plain)
    by_width = {2: 7, 8: 14}
    choice = ActivationBits({"o": 5, "down": [9, 6]})
    assert choice.of_matrix("layers.1.o", by_width) == dict.fromkeys(range(1, 9), 5)
    assert choice.of_matrix("layers.0.down", by_width)[8] == 9
    assert choice.of_matrix("layers.1.down", by_width)[8] == 6
    for name in ("layers.0.qkv", "head", "embed"):
        assert choice.of_matrix(name, by_width) is by_width
    everywhere = dict.fromkeys(("qkv", "o", "gate_up", "down"), 7)
    assert np.array_equal(
        logits(Decoder.from_taper(file)),
        logits(Decoder.from_taper(file, activations=ActivationBits(everywhere))),
    )
    seen = {}
    for name in everywhere:
        decoder = Decoder.from_taper(file, activations=ActivationBits({name: 3}))
        seen[name] = logits(decoder).tobytes()
    assert len(set(seen.values())) == 4


@pytest.mark.parametrize("choice", [{"qkv": 4, "o": 7, "gate_up": 9, "down": 14}, {"qkv": [3, 11]}])
def test_cuts_batches_and_the_observed_step_agree(plain, choice):
    decoder = Decoder.from_taper(TaperFile.open(plain), activations=ActivationBits(choice, "7"))
    whole = logits(decoder)
    for chunk in (1, 7):
        np.testing.assert_array_equal(logits(decoder, chunk), whole)
    observed = decoder.forward(TOKENS, decoder.new_cache(25), 4, "all", observe=lambda name, x: None)
    np.testing.assert_array_equal(observed, whole)
    caches = [decoder.new_cache(25) for _ in range(16)]
    for count, cache in enumerate(caches, 1):
        decoder.forward(TOKENS[:count], cache, 4, "none")
    together = decoder.decode_batch(TOKENS[1:17], caches, 4)
    np.testing.assert_array_equal(together, whole[1:17])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"bits": {"head": 7}}, "'head', which is none of"),
        ({"bits": {"o": 0}}, "activations of o have 0 bits, expected 1..15"),
        ({"bits": {"o": 16}}, "16 bits, expected 1..15"),
        ({"bits": {"o": True}}, "True bits"),
        ({"bits": {"o": 7.0}}, "7.0 bits"),
        ({"bits": {"o": [7]}}, "bits for 1 of 2 layers"),
        ({"bits": {"o": [7, 0]}}, "0 bits"),
        ({"bits": [7]}, "must be objects"),
        ({"evidence": 1}, "must be objects"),
        ({"kv": 7}, "kv is no text"),
        ({"kv": "7" * 65}, "kv is no text"),
    ],
)
def test_hostile_choices_are_refused(raw, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ActivationBits.from_dict(raw, 2)


def test_no_file_is_written_with_such_a_choice_and_an_unknown_kv_is_named(plain, tmp_path):
    with pytest.raises(ValueError, match="activations of o have 99 bits"):
        with_bits(plain, tmp_path / "file.taper", ActivationBits({"o": 99}))
    path = with_bits(plain, tmp_path / "kv.taper", ActivationBits(kv="7,8@2"))
    with pytest.raises(UsageError, match="magnitude bits"):
        Decoder.from_taper(TaperFile.open(path))
