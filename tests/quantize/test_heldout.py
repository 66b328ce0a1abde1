"""Held-out passages never touch what calibration reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from taper.formats.huggingface import HfCheckpoint
from taper.models import Decoder
from taper.quantize.calibrate import sample_tokens
from taper.quantize.heldout import ReferenceRun, held_out_passages, spaced_passages
from taper.testing.tiny import tiny_hf_dir, tiny_tokenizer_json
from taper.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> HfCheckpoint:
    return HfCheckpoint.open(tiny_hf_dir(tmp_path_factory.mktemp("hf") / "hf"))


def numbered(length: int) -> str:
    """Text whose every 8 characters say where they lie."""
    return "".join(f"{i:07d} " for i in range(length // 8))


@pytest.mark.parametrize(("tokens", "num_passages"), [(1024, 3), (1024, 16), (256, 5)])
def test_no_character_is_in_both(checkpoint: HfCheckpoint, tokens: int, num_passages: int) -> None:
    text = numbered(80_000)
    passages = held_out_passages(checkpoint, text, tokens, num_passages)
    assert len(passages) == num_passages
    tokenizer = Tokenizer(tiny_tokenizer_json())
    read = [tokenizer.decode(row.tolist()) for row in sample_tokens(checkpoint, text, tokens)]
    spans = [(text.index(piece), text.index(piece) + len(piece)) for piece in read]
    for passage in passages:
        begin = text.index(passage)
        assert all(begin >= end or begin + len(passage) <= start for start, end in spans)
        # Each holds one 256-token block of this tokenizer, a character a token at worst.
        assert len(tokenizer.encode(passage)) >= 256
    assert len({text.index(passage) for passage in passages}) == num_passages


def test_a_text_that_calibration_reads_whole_has_none(checkpoint: HfCheckpoint) -> None:
    assert held_out_passages(checkpoint, numbered(8_000), 1024, 4) == []


def test_passages_of_another_text_span_it(checkpoint: HfCheckpoint) -> None:
    text = numbered(40_000)
    passages = spaced_passages(checkpoint, text, 4)
    assert [text.startswith(passages[0]), text.endswith(passages[-1]), len(passages)] == [True, True, 4]
    assert spaced_passages(checkpoint, "short", 4) == ["short"]


@pytest.mark.parametrize("tied", [True, False])
def test_reference_logits_are_those_of_the_float_decoder(tmp_path: Path, tied: bool) -> None:
    checkpoint = HfCheckpoint.open(tiny_hf_dir(tmp_path / "hf", tie_word_embeddings=tied))
    tokens = np.random.default_rng(0).integers(0, 300, (3, 40)).astype(np.int32)
    found = ReferenceRun(checkpoint, tokens).logits(21)
    assert (found.shape, found.dtype) == ((3, 19, 300), np.float32)
    decoder = Decoder.from_hf(checkpoint)
    for block, rows in zip(tokens, found, strict=True):
        expected = decoder.forward(block, decoder.new_cache(40), 32, logits="all")
        assert expected is not None
        # Two float32 products of the same numbers in another order, through two layers: some 1e-6 each.
        np.testing.assert_allclose(rows, expected[20:39], rtol=1e-4, atol=1e-4)
