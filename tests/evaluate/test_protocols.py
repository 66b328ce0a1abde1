"""How texts are cut: numbers of blocks, first scored token, special tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest

from taper.errors import UsageError
from taper.evaluate.protocols import cut
from taper.testing.tiny import tiny_tokenizer_json
from taper.tokenizer import Tokenizer

# "#" merges with nothing, so it is one token.
TEXT = "#" * 5000


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return Tokenizer(tiny_tokenizer_json())


@pytest.fixture(scope="module")
def with_bos() -> Tokenizer:
    raw = json.loads(tiny_tokenizer_json())
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
    }
    return Tokenizer(json.dumps(raw))


def test_llama_cpp_scores_255_of_512(plain: Tokenizer) -> None:
    # llama-perplexity: first = n_ctx / 2, the predictions at first .. n_ctx - 2 count.
    blocks = cut(TEXT, plain, 4096, "llama.cpp")
    assert blocks.tokens.shape == (5000 // 512, 512)
    assert blocks.first_scored == 257
    assert blocks.num_scored == 9 * 255
    assert blocks.label == "llama.cpp, 512-token blocks, last 255 tokens scored"
    assert blocks.tokens_per_byte == 1.0


def test_blocks_score_all_but_the_first(plain: Tokenizer) -> None:
    blocks = cut(TEXT, plain, 4096, "blocks")
    assert blocks.tokens.shape == (2, 2048)
    assert blocks.num_scored == 2 * 2047


def test_a_shorter_context_shortens_and_is_named(plain: Tokenizer) -> None:
    blocks = cut(TEXT, plain, 256, "blocks")
    assert blocks.tokens.shape == (19, 256)
    assert "256-token blocks" in blocks.label


def test_the_beginning_token_takes_the_first_place_of_every_window(with_bos: Tokenizer) -> None:
    windows = cut(TEXT, with_bos, 4096, "llama.cpp")
    assert (windows.tokens[:, 0] == 0).all()
    assert (windows.tokens[:, 1:] != 0).all()
    assert windows.tokens_per_byte == 1.0  # the special token is no text
    blocks = cut(TEXT, with_bos, 4096, "blocks")
    np.testing.assert_array_equal(blocks.tokens[:, 0] == 0, [True, False])


def test_max_blocks_keeps_the_first(plain: Tokenizer) -> None:
    text = "a" * 512 + "#" * 2000
    whole, first = cut(text, plain, 4096, "llama.cpp"), cut(text, plain, 4096, "llama.cpp", 1)
    np.testing.assert_array_equal(first.tokens, whole.tokens[:1])


def test_refusals(plain: Tokenizer) -> None:
    with pytest.raises(UsageError, match="511 tokens, one block takes 512"):
        cut("#" * 511, plain, 4096, "llama.cpp")
    with pytest.raises(UsageError, match="protocol 'strided' is none of"):
        cut(TEXT, plain, 4096, "strided")
    with pytest.raises(UsageError, match="max_blocks is 0"):
        cut(TEXT, plain, 4096, "blocks", 0)
