"""Encoding and decoding, and every way a tokenizer or a text can be wrong."""

from __future__ import annotations

import pytest

from taper.errors import CorruptFileError, UsageError
from taper.tokenizer import Tokenizer


def test_text_survives_a_round_trip(any_tokenizer):
    text = "The cat sat. 世界 😀 é"
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


def test_truncation_and_padding_of_the_file_are_off(byte_fallback):
    assert len(byte_fallback.encode("the cat sat on the mat and the cat")) > 8
    assert len(byte_fallback.encode("the")) == 2


def test_special_tokens_are_added_only_when_asked_for(byte_fallback):
    assert byte_fallback.encode("the")[0] == byte_fallback.token_id("<s>")
    assert byte_fallback.encode("the", special_tokens=False) == byte_fallback.encode("the")[1:]
    assert byte_fallback.encode("") == [1]


def test_special_tokens_are_left_out_of_text_unless_asked_for(byte_level):
    ids = [*byte_level.encode("the"), byte_level.token_id("<|end|>")]
    assert byte_level.decode(ids) == "the"
    assert byte_level.decode(ids, special_tokens=True) == "the<|end|>"


def test_vocabulary_counts_added_tokens(byte_level, byte_fallback):
    assert byte_fallback.vocab_size == 3 + 256 + 21
    assert byte_level.token(byte_level.vocab_size - 1) is not None
    assert byte_level.token(byte_level.vocab_size) is None
    assert byte_fallback.token(2) == "</s>"
    assert byte_fallback.token(10**6) is None
    assert byte_fallback.token_id("nothing") is None


def test_ids_without_a_token_are_silent(byte_level):
    assert byte_level.is_silent(10**6)
    assert byte_level.is_silent(byte_level.token_id("<|end|>"))
    assert not byte_level.is_silent(byte_level.encode("the")[0])


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"model": {"type": "Nothing"}}'])
def test_broken_tokenizer_json_is_a_corrupt_file(text):
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(text)


def test_half_a_surrogate_pair_is_refused(any_tokenizer):
    with pytest.raises(UsageError, match=r"'\\ud83d' at character 3"):
        any_tokenizer.encode("abc\ud83d")
