"""The diagonal Fisher against differences of the float model's loss. Needs the extra `train`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taper.formats.huggingface import HfCheckpoint
from taper.models import Decoder
from taper.models.families import matrix_sources
from taper.quantize.fisher import measure_fisher
from taper.quantize.fisher_file import FisherFile
from taper.testing.tiny import tiny_hf_dir

pytest.importorskip("torch")
pytest.importorskip("transformers")

TOKENS = np.arange(24, dtype=np.int32)[None] * 7 % 300


def loss(folder: Path) -> float:
    decoder = Decoder.from_hf(HfCheckpoint.open(folder))
    logits = decoder.forward(TOKENS[0], decoder.new_cache(32), 32, "all")
    assert logits is not None
    rows = logits[:-1].astype(np.float64)
    log_sum = np.log(np.sum(np.exp(rows - rows.max(axis=1, keepdims=True)), axis=1)) + rows.max(axis=1)
    return float(np.mean(log_sum - rows[np.arange(len(rows)), TOKENS[0, 1:]]))


def test_fisher_is_the_squared_slope_of_the_loss(tmp_path: Path) -> None:
    # Fails when the gain is not folded (it is not 1 here), rows of q, k and v are mixed up, or the loss is
    # summed instead of averaged.
    folder = tiny_hf_dir(tmp_path / "tiny")
    path = folder / "model.safetensors"
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    source = matrix_sources(HfCheckpoint.open(folder).config)[1]
    assert source.gain is not None
    generator = np.random.default_rng(0)
    tensors[source.gain] = generator.uniform(0.5, 2, tensors[source.gain].shape).astype(
        tensors[source.gain].dtype
    )
    save_file(tensors, path, {"format": "pt"})
    measure_fisher(folder, TOKENS, tmp_path / "fisher.safetensors")
    figures = FisherFile(tmp_path / "fisher.safetensors").matrix(source)
    name, rows = source.parts[2]  # v: its slopes are the largest
    first = sum(count for _, count in source.parts[:2])
    row, col = np.unravel_index(int(np.argmax(figures[first : first + rows])), (rows, source.in_features))
    # A step of w g by 0.02 is one of w by 0.02 / g.
    step = 0.02 / float(tensors[source.gain][col])
    losses = []
    for sign in (1, -1):
        changed = {key: array.copy() for key, array in tensors.items()}
        changed[name][row, col] += sign * step
        save_file(changed, path, {"format": "pt"})
        losses.append(loss(folder))
    slope = (losses[0] - losses[1]) / 0.04
    assert figures[first + row, col] == pytest.approx(slope**2, rel=0.05)
