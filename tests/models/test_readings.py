"""Readings with a width per matrix: ceilings, fractions of bits, their bytes, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from taper.errors import UsageError
from taper.formats.container import TaperFile
from taper.formats.sensitivity import Sensitivity
from taper.formats.writer import rewrite_header
from taper.models import Decoder
from taper.precision import Bits, LayerBits
from taper.testing.tiny import tiny_taper

MIN_BITS, MAX_BITS = 2, 6
TOKENS = np.array([0, 17, 299, 4, 4, 120, 33, 250, 1, 77], dtype=np.int32)


def made_up(file: TaperFile) -> Sensitivity:
    """Some matrices matter a hundred times as much as others."""
    generator = np.random.default_rng(5)
    rows = {
        spec.name: [float(10 ** generator.uniform(-2, 0) * 4.0**-bits) for bits in range(MIN_BITS, MAX_BITS)]
        + [0.0]
        for spec in file.matrices
    }
    return Sensitivity(
        {name: sorted(row, reverse=True) for name, row in rows.items()}, (2,), "6 bits", "t", 1
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> TaperFile:
    path = tiny_taper(
        tmp_path_factory.mktemp("models") / "tiny.taper", MIN_BITS, MAX_BITS, tie_word_embeddings=False
    )
    plain = TaperFile.open(path)
    rewrite_header(path, replace(plain.header, sensitivity=made_up(plain)))
    return TaperFile.open(path)


def logits(decoder: Decoder, bits: Bits) -> np.ndarray:
    out = decoder.forward(TOKENS, decoder.new_cache(16), bits, logits="all")
    assert out is not None
    return out


@pytest.mark.parametrize("bits", [2.4, 3.3, 5.5])
def test_a_fraction_reads_each_matrix_at_its_own_width(file: TaperFile, bits: float) -> None:
    decoder = Decoder.from_taper(file)
    widths = decoder.widths(bits)
    assert len(set(widths.values())) > 1
    # The look-up reads all planes of `embed`, which is no other matrix here.
    same = Decoder.from_taper(file, {name: width for name, width in widths.items() if name != "embed"})
    np.testing.assert_array_equal(logits(decoder, bits), logits(same, MAX_BITS))
    assert not np.array_equal(logits(decoder, bits), logits(decoder, round(bits)))


@pytest.mark.parametrize("bits", [2.001, 2.4, 3.3, 5.999])
def test_a_fraction_stays_within_its_budget(file: TaperFile, bits: float) -> None:
    decoder = Decoder.from_taper(file)
    least = min(spec.num_weights for spec in file.matrices)
    # Nothing that still helps fits in what is left, and the least matrix's plane is the least step.
    assert bits - MAX_BITS * least / file.num_weights < decoder.bits_per_weight(bits) <= bits


def test_whole_bits_need_the_prefix_of_the_file(file: TaperFile) -> None:
    decoder = Decoder.from_taper(file)
    for bits in range(MIN_BITS, MAX_BITS + 1):
        assert decoder.reading_bytes(bits) == decoder.reading_bytes(float(bits)) == file.bytes_at(bits)
        assert decoder.bits_per_weight(bits) == bits
        assert set(decoder.widths(bits).values()) == {bits}
    assert file.bytes_at(3) < decoder.reading_bytes(3.3) < file.bytes_at(4)
    assert decoder.bytes_per_pass(3) < decoder.bytes_per_pass(3.3) < decoder.bytes_per_pass(5)


def test_whole_bits_stop_at_a_ceiling(file: TaperFile) -> None:
    ceilings = {"layers.0.down": 3, "embed": 2}
    capped = Decoder.from_taper(file, ceilings)
    assert capped.widths(5)["layers.0.down"] == 3
    assert capped.widths(2)["layers.0.down"] == 2
    assert capped.widths(5)["layers.1.down"] == 5
    assert capped.bytes_per_pass(5) < Decoder.from_taper(file).bytes_per_pass(5)
    at_two, at_five = logits(capped, 2), logits(capped, 5)
    whole = Decoder.from_taper(file)
    assert not np.array_equal(at_two, logits(whole, 2))  # the look-up reads two planes only
    assert not np.array_equal(at_five, logits(whole, 5))


def test_each_layer_is_read_at_its_own_bits(file: TaperFile) -> None:
    decoder, bits = Decoder.from_taper(file), LayerBits((5, 2.4), 3)
    widths = decoder.widths(bits)
    assert {name: width for name, width in widths.items() if name.startswith("layers.0.")} == dict.fromkeys(
        (f"layers.0.{part}" for part in ("qkv", "o", "gate_up", "down")), 5
    )
    for part in ("qkv", "o", "gate_up", "down"):
        assert widths[f"layers.1.{part}"] == decoder.widths(2.4)[f"layers.1.{part}"]
    assert (widths["head"], widths["embed"]) == (3, 3)
    same = Decoder.from_taper(file, {name: width for name, width in widths.items() if name != "embed"})
    np.testing.assert_array_equal(logits(decoder, bits), logits(same, MAX_BITS))
    observed = decoder.forward(TOKENS, decoder.new_cache(16), bits, "all", observe=lambda name, x: None)
    np.testing.assert_array_equal(observed, logits(decoder, bits))


def test_layers_are_counted_by_their_weights(file: TaperFile) -> None:
    decoder = Decoder.from_taper(file)
    weights = {spec.name: spec.num_weights for spec in file.matrices}
    layer = sum(count for name, count in weights.items() if name.startswith("layers.0."))
    rest = weights["embed"] + weights["head"]
    assert decoder.bits_per_weight(LayerBits((6, 2), 4)) == (8 * layer + 4 * rest) / (2 * layer + rest)
    assert decoder.bits_per_weight(LayerBits((3, 3), 3)) == 3
    alike = LayerBits((3, 3), 3)
    assert decoder.bytes_per_pass(alike) == decoder.bytes_per_pass(3)
    saved = decoder.bytes_per_pass(3) - decoder.bytes_per_pass(LayerBits((3, 2), 3))
    assert saved == decoder.bytes_per_pass(LayerBits((3, 3), 2)) - decoder.bytes_per_pass(
        LayerBits((3, 2), 2)
    )
    assert saved > 0


def test_layer_bits_outside_the_model_are_refused(file: TaperFile) -> None:
    decoder = Decoder.from_taper(file)
    for layers in ((3,), (3, 3, 3), ()):
        with pytest.raises(UsageError, match=f"{len(layers)} layers have bits, the model has 2"):
            decoder.widths(LayerBits(layers, 3))
    for bits in (LayerBits((3, 7), 3), LayerBits((1, 3), 3), LayerBits((3, 3), 9)):
        with pytest.raises(UsageError, match=r"outside the model's 2\.\.6"):
            logits(decoder, bits)


def test_bits_outside_the_model_are_refused(file: TaperFile) -> None:
    decoder = Decoder.from_taper(file)
    for bits in (1.9, 6.1, float("nan")):
        with pytest.raises(UsageError, match=r"outside the model's 2\.\.6"):
            decoder.widths(bits)


def test_a_fraction_needs_sensitivity(tmp_path: Path) -> None:
    plain = Decoder.from_taper(TaperFile.open(tiny_taper(tmp_path / "tiny.taper", MIN_BITS, MAX_BITS)))
    assert not plain.has_sensitivity
    with pytest.raises(UsageError, match=r"3\.3 bits: a fraction") as error:
        logits(plain, 3.3)
    assert "taper allocate" in error.value.hint
