"""Float logits against transformers, live: `make parity`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from taper.formats.huggingface import HfCheckpoint
from taper.models.decoder import Decoder
from taper.testing.checkpoints import random_tokens
from taper.testing.parity_cases import GOLDEN_CASES, LIVE_CASES, TOLERANCE, ParityCase

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("case", GOLDEN_CASES + LIVE_CASES, ids=lambda case: case.name)
def test_float_logits_match_transformers(case: ParityCase, tmp_path: Path) -> None:
    from reference import transformers_run  # torch, which only this marker's runs have

    expected, _ = transformers_run(case, tmp_path / "checkpoint")
    decoder = Decoder.from_hf(HfCheckpoint.open(tmp_path / "checkpoint"))
    tokens = random_tokens(case.hf_config, case.num_tokens, case.seed)
    logits = decoder.forward(tokens, decoder.new_cache(case.num_tokens), decoder.max_bits, logits="all")
    assert logits is not None
    worst = np.abs(logits - expected).max() / np.abs(expected).max()
    print(f"{case.name}: {worst:.1e} of the largest logit")
    assert worst < TOLERANCE
