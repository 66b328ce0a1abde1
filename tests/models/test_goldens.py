"""Float logits against the stored ones of transformers (tests/parity/make_goldens.py), without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from taper.formats.huggingface import HfCheckpoint
from taper.models.decoder import Decoder
from taper.testing.checkpoints import random_tokens, write_checkpoint
from taper.testing.parity_cases import GOLDEN_CASES, TOLERANCE, ParityCase, golden_positions

GOLDENS = np.load(Path(__file__).parent.parent / "goldens" / "logits.npz")


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: case.name)
def test_float_logits_match_transformers(case: ParityCase, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, case.hf_config, case.seed, num_shards=2)
    decoder = Decoder.from_hf(HfCheckpoint.open(tmp_path))
    tokens = random_tokens(case.hf_config, case.num_tokens, case.seed)
    logits = decoder.forward(tokens, decoder.new_cache(case.num_tokens), decoder.max_bits, logits="all")
    assert logits is not None
    golden = GOLDENS[case.name]
    assert np.abs(logits[golden_positions(case)] - golden).max() < TOLERANCE * np.abs(golden).max()


def test_there_is_one_golden_for_every_case() -> None:
    assert set(GOLDENS) == {case.name for case in GOLDEN_CASES}
