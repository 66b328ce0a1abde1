"""One tiny file for every test of the container."""

from __future__ import annotations

from pathlib import Path

import pytest

from taper.testing.tiny import tiny_taper


@pytest.fixture(scope="session")
def taper_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file of 2 to 4 bits with biases, an untied head and a chat template."""
    path = tmp_path_factory.mktemp("container") / "tiny.taper"
    return tiny_taper(
        path,
        2,
        4,
        chat=True,
        tie_word_embeddings=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        num_layers=1,
    )
