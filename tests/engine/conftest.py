"""A decoder that says what it is told to, and a tokenizer of one token a byte."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from taper.config import ModelConfig, RopeConfig
from taper.tokenizer import Tokenizer

WEIGHT_BYTES, KV_BYTES = 1000, 10  # a pass at b bits reads b * WEIGHT_BYTES, and KV_BYTES for each entry


@dataclass
class FakeCache:
    capacity: int
    num_tokens: int = 0

    def bytes_read(self, num_tokens: int) -> int:
        return KV_BYTES * num_tokens

    def bytes_at(self, num_tokens: int) -> int:
        return KV_BYTES * num_tokens

    def release_old(self):
        pass

    def keeps(self, num_tokens):
        return num_tokens


@dataclass
class FakeDecoder:
    """Its n-th logits favour `script[n]`; beyond the script, token 0. Keeps a record of every pass."""

    script: list[int] = field(default_factory=list)
    vocab_size: int = 258
    context_length: int = 64
    min_bits: int = 2
    max_bits: int = 8
    has_sensitivity: bool = False
    eos: tuple[int, ...] = (257,)
    passes: list[tuple[tuple[int, ...], int, str]] = field(default_factory=list)
    caches: list[weakref.ref[FakeCache]] = field(default_factory=list)
    capacities: list[int] = field(default_factory=list)
    on_pass: object = None

    def __post_init__(self) -> None:
        sizes = (8, 8, 1, 1, 1, 8, self.vocab_size, self.context_length)
        self.config = ModelConfig(
            "LlamaForCausalLM", *sizes, 1e-5, RopeConfig(), True, bos_token_id=256, eos_token_ids=self.eos
        )
        self.drawn = 0

    def new_cache(self, max_tokens: int) -> FakeCache:
        cache = FakeCache(max_tokens)
        self.caches.append(weakref.ref(cache))
        self.capacities.append(max_tokens)
        return cache

    def forward(self, tokens, cache, bits, logits):
        assert tokens.dtype == np.int32
        self.passes.append((tuple(tokens.tolist()), bits, logits))
        cache.num_tokens += len(tokens)
        assert cache.num_tokens <= cache.capacity
        if self.on_pass is not None:
            self.on_pass(self)
        if logits == "none":
            return None
        row = np.zeros((1, self.vocab_size), np.float32)
        row[0, self.script[self.drawn] if self.drawn < len(self.script) else 0] = 9
        self.drawn += 1
        return row

    def bytes_per_pass(self, bits: int) -> int:
        return bits * WEIGHT_BYTES


@pytest.fixture(scope="session")
def byte_tokenizer_json() -> str:
    """Token b is the byte b; 256 and 257 are the beginning and the end of text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(b if b in printable else 256 + hidden.index(b)): b for b in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def tokenizer(byte_tokenizer_json) -> Tokenizer:
    return Tokenizer(byte_tokenizer_json)


@pytest.fixture
def says():
    """A decoder whose output is the given bytes (or token ids), then zeros."""

    def build(output: str | bytes | list[int] = b"", **options: object) -> FakeDecoder:
        data = output.encode() if isinstance(output, str) else output
        return FakeDecoder(list(data), **options)

    return build
