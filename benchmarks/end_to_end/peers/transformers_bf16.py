"""transformers on bfloat16 weights: tokens per second, as one line of JSON.

    PYTHON transformers_bf16.py CHECKPOINT CHECKPOINT --threads 2

Runs in a Python that has torch and transformers.
"""

import json
import time

import numpy as np
import torch
import transformers
from measure import measure, settings
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main() -> None:
    """Print one JSON object."""
    given = settings(__doc__)
    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).eval()

    def generate(tokens: np.ndarray, num_tokens: int) -> tuple[float, float]:
        """A plain greedy loop over the cache, which is faster than `generate` by its bookkeeping."""
        begin = time.perf_counter()
        out = model(torch.from_numpy(tokens)[None], use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first = time.perf_counter()
        for _ in range(num_tokens - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return first - begin, (time.perf_counter() - first) / max(1, num_tokens - 1)

    program = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps({"program": program, **measure(given, generate)}))


if __name__ == "__main__":
    main()
