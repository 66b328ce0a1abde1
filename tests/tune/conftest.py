"""A tiny model whose widths differ enough to disagree."""

from __future__ import annotations

import pytest

from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.testing.tiny import tiny_taper, tiny_tokenizer_json
from taper.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    return tiny_taper(folder / "tiny.taper", tie_word_embeddings=False, max_position_embeddings=512)


@pytest.fixture(scope="session")
def decoder(model):
    return Decoder.from_taper(TaperFile.open(model))


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(tiny_tokenizer_json())
