"""Perplexity against a direct computation from the decoder's logits in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import taper.evaluate.perplexity as perplexity
from taper.errors import UsageError
from taper.evaluate import measure_perplexity
from taper.evaluate.protocols import Blocks, cut
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.models import Decoder
from taper.testing.tiny import tiny_hf_dir, tiny_taper, tiny_tokenizer_json
from taper.tokenizer import Tokenizer

F64 = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held.txt"
    generator = np.random.default_rng(0)
    path.write_text(
        " ".join(generator.choice(["the", "sea", "of", "rain", "and", "x"], 600)), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_taper(tmp_path_factory.mktemp("model") / "tiny.taper", 2, 4)


def blocks_of(text: Path, protocol: str) -> Blocks:
    return cut(text.read_text(encoding="utf-8"), Tokenizer(tiny_tokenizer_json()), 256, protocol)


def log_probabilities(decoder: Decoder, block: Any, bits: int) -> F64:
    logits = decoder.forward(block, decoder.new_cache(len(block)), bits, logits="all")
    assert logits is not None
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def mean_nll(decoder: Decoder, blocks: Blocks, bits: int) -> F64:
    """Mean negative log-likelihood of each block's scored tokens."""
    found = []
    for block in blocks.tokens:
        scores = log_probabilities(decoder, block, bits)
        at = np.arange(blocks.first_scored, len(block))
        found.append(-scores[at - 1, block[at]].mean())
    return np.array(found)


@pytest.mark.parametrize("protocol", ["llama.cpp", "blocks"])
def test_figures_are_those_of_the_logits(model: Path, text: Path, protocol: str) -> None:
    report = measure_perplexity(model, text, bits=[2, 4], protocol=protocol)
    blocks = blocks_of(text, protocol)
    decoder = Decoder.from_taper(TaperFile.open(model))
    assert [result.bits for result in report.results] == [2, 4]
    assert report.num_blocks == len(blocks.tokens) > 1
    for result in report.results:
        nll = mean_nll(decoder, blocks, result.bits)
        # Scores are float32 with magnitudes below 16: 1e-6 each.
        assert result.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
        error = math.exp(nll.mean()) * nll.std(ddof=1) / math.sqrt(len(nll))
        assert result.standard_error == pytest.approx(error, rel=1e-2)
        expected = nll.mean() / math.log(2) * blocks.tokens_per_byte
        assert result.bits_per_byte == pytest.approx(expected, rel=1e-5)
        assert result.mean_kl is None


def test_pieces_of_a_block_change_nothing(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_perplexity(model, text, bits=[3], protocol="blocks").width(3)
    monkeypatch.setattr(perplexity, "_MAX_LOGITS", 7 * 300)
    pieces = measure_perplexity(model, text, bits=[3], protocol="blocks").width(3)
    # Planes give the same logits however a block is split; only the sums of scores associate differently.
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-9)


def test_comparison_with_the_float_checkpoint(text: Path, tmp_path: Path) -> None:
    folder = tiny_hf_dir(tmp_path / "hf")
    model = tiny_taper(tmp_path / "other.taper", 2, 4)  # unrelated weights: far from the checkpoint
    report = measure_perplexity(model, text, bits=[4], against=folder)
    assert [result.bits for result in report.results] == [32, 4]
    blocks = blocks_of(text, "llama.cpp")
    reference, decoder = Decoder.from_hf(HfCheckpoint.open(folder)), Decoder.from_taper(TaperFile.open(model))
    divergences, agreements = [], []
    for block in blocks.tokens:
        p, q = log_probabilities(reference, block, 32), log_probabilities(decoder, block, 4)
        scored = slice(blocks.first_scored - 1, -1)
        divergences.append((np.exp(p) * (p - q)).sum(axis=1)[scored])
        agreements.append((p.argmax(axis=1) == q.argmax(axis=1))[scored])
    result = report.width(4)
    assert result.mean_kl == pytest.approx(np.mean(divergences), rel=1e-4)
    assert result.top1_agreement == pytest.approx(np.mean(agreements))
    rise = mean_nll(decoder, blocks, 4) - mean_nll(reference, blocks, 32)
    assert result.increase_frac == pytest.approx(math.expm1(rise.mean()), rel=1e-3, abs=1e-5)


def test_a_checkpoint_agrees_with_itself(text: Path, tmp_path: Path) -> None:
    folder = tiny_hf_dir(tmp_path / "hf")
    report = measure_perplexity(folder, text, against=folder, max_blocks=1)
    itself = report.results[1]
    assert (itself.mean_kl, itself.top1_agreement, itself.increase_frac) == (0.0, 1.0, 0.0)
    assert itself.standard_error is None


def test_compressed_text_reads_the_same(model: Path, text: Path, tmp_path: Path) -> None:
    import lzma

    packed = tmp_path / "held.txt.xz"
    packed.write_bytes(lzma.compress(text.read_bytes()))
    assert measure_perplexity(model, packed, bits=[2]) == measure_perplexity(model, text, bits=[2])


def test_progress_counts_blocks(model: Path, text: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    measure_perplexity(
        model,
        text,
        bits=[2],
        max_blocks=3,
        progress=lambda done, total, left: seen.append((done, total, left)),
    )
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1][2] == 0.0


def test_refusals(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"5 bits are outside the model's 2\.\.4"):
        measure_perplexity(model, text, bits=[5])
    with pytest.raises(UsageError, match="is not a file"):
        measure_perplexity(model, tmp_path / "none.txt")
    other = tiny_hf_dir(tmp_path / "hf", vocab_size=400)
    with pytest.raises(UsageError, match="the reference has 400 tokens, the model 300"):
        measure_perplexity(model, text, against=other)
