"""The linear layers of a decode step in half precision by torch: steps per second, as one line of JSON.

    PYTHON linear_half.py CHECKPOINT CHECKPOINT --threads 2

Runs in a Python that has torch and transformers. All matrices of the model are met in turn, so that none is
in a cache when its turn comes again.
"""

import json
import statistics
import time

import torch
from measure import settings
from transformers import AutoModelForCausalLM

NUM_STEPS = 8


@torch.inference_mode()
def steps_per_s(matrices: list[torch.Tensor], dtype: torch.dtype) -> float:
    """One product of each matrix with one row is a step; the median step counts."""
    converted = [matrix.to(dtype) for matrix in matrices]
    rows = {matrix.shape[1]: torch.randn(1, matrix.shape[1]).to(dtype) for matrix in matrices}
    seconds = []
    for _ in range(NUM_STEPS + 1):
        begin = time.perf_counter()
        for matrix in converted:
            torch.nn.functional.linear(rows[matrix.shape[1]], matrix)
        seconds.append(time.perf_counter() - begin)
    return 1 / statistics.median(seconds[1:])


def main() -> None:
    """Print one JSON object."""
    given = settings(__doc__)
    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16)
    linear = [part.weight for part in model.modules() if isinstance(part, torch.nn.Linear)]
    report = {
        str(dtype).removeprefix("torch."): steps_per_s(linear, dtype)
        for dtype in (torch.float16, torch.bfloat16)
    }
    print(json.dumps({"program": f"torch {torch.__version__}", **report}))


if __name__ == "__main__":
    main()
