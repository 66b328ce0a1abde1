"""What transformers computes for a parity case; the one file of the tests that needs torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from taper.testing.checkpoints import random_tokens, write_checkpoint
from taper.testing.parity_cases import ParityCase

F32 = npt.NDArray[np.float32]


def transformers_run(case: ParityCase, folder: Path) -> tuple[F32, F32]:
    """Write the case's checkpoint to `folder` and run it in float32 with eager attention.

    Returns:
        Logits (tokens, vocab_size), and the inverse frequencies in use with the attention factor behind them.
    """
    write_checkpoint(folder, case.hf_config, case.seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = random_tokens(case.hf_config, case.num_tokens, case.seed)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    rotary = model.model.rotary_emb
    rope = np.append(rotary.inv_freq.numpy(), np.float32(rotary.attention_scaling))
    return logits.numpy(), rope
