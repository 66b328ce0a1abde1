"""Two small tokenizers, one of each kind that the Llama family uses."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from taper.tokenizer import Tokenizer

SAMPLE = "The cat sat on the mat. Le chat é assis. 世界你好, こんにちは. 😀😀👍🏽 the end of the story."


@pytest.fixture(scope="session")
def byte_level_json() -> str:
    """GPT-2 style: tokens are byte strings, and merges join parts of characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE] * 20, trainer)
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def byte_fallback_json() -> str:
    """SentencePiece style, as Llama 2: a leading space is stripped, unknown characters become byte tokens."""
    words = ["▁", *"Thecatsonmd.", "th", "he", "▁t", "▁c", "at", "▁th", "▁the", "▁cat"]
    spellings = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(words)]
    merges = [
        ("t", "h"),
        ("h", "e"),
        ("▁", "t"),
        ("▁", "c"),
        ("a", "t"),
        ("▁", "th"),
        ("▁th", "e"),
        ("▁c", "at"),
    ]
    vocab = {spelling: index for index, spelling in enumerate(spellings)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(length=8)
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def byte_level(byte_level_json: str) -> Tokenizer:
    return Tokenizer(byte_level_json)


@pytest.fixture(scope="session")
def byte_fallback(byte_fallback_json: str) -> Tokenizer:
    return Tokenizer(byte_fallback_json)


@pytest.fixture(scope="session", params=["byte_level", "byte_fallback"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def metaspace() -> Tokenizer:
    """The newer SentencePiece form: Metaspace in place of the normaliser."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "b": 2, "▁a": 3}, merges=[("▁", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return Tokenizer(tokenizer.to_str())
