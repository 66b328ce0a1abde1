"""Families, the checkpoint reader and the file's layout name the same matrices."""

from __future__ import annotations

import math

import pytest

from taper.formats.hf_config import parse_config
from taper.formats.huggingface import expected_tensors
from taper.formats.spec import expected_matrices
from taper.models.families import FAMILIES, family_of, matrix_sources
from taper.testing.checkpoints import TINY_LLAMA


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_tensor_of_a_checkpoint_goes_into_one_matrix(architecture: str, tied: bool) -> None:
    changes = {"attention_bias": True, "mlp_bias": True, "sliding_window": None, "tie_word_embeddings": tied}
    config = parse_config(TINY_LLAMA | changes | {"architectures": [architecture]}, {})
    sources = matrix_sources(config)
    weights = [(name, rows * source.in_features) for source in sources for name, rows in source.parts]
    biases = [
        (name, rows)
        for source in sources
        for name, (_, rows) in zip(source.biases, source.parts, strict=bool(source.biases))
    ]
    norms = [(source.gain, source.in_features) for source in sources if source.gain is not None]
    norms.append((f"{family_of(config).final_norm}.weight", config.hidden_size))
    in_checkpoint = [(name, math.prod(shape)) for name, shape in expected_tensors(config)]
    assert sorted(weights + biases + norms) == sorted(in_checkpoint)


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_are_those_of_the_file_in_its_order(tied: bool) -> None:
    changes = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": tied}
    config = parse_config(TINY_LLAMA | changes, {})
    ours = [
        (source.name, source.out_features, source.in_features, bool(source.biases))
        for source in matrix_sources(config)
    ]
    files = [
        (spec.name, spec.out_features, spec.in_features, spec.has_bias) for spec in expected_matrices(config)
    ]
    assert ours == files
