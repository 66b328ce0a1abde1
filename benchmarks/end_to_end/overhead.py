"""What a decode step costs besides its work, as one line of JSON.

    python benchmarks/end_to_end/overhead.py [FILE] --threads 2

A model of the same family with as many layers, whose matrices are 64 by 64, goes through the same Python, the
same native calls and the same barriers, and has next to nothing to compute: its step is the overhead.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from taper.config import ModelConfig
from taper.engine import embedded_model
from taper.formats.container import TaperFile
from taper.kernels import set_num_threads
from taper.models import Decoder
from taper.testing.random_model import write_random_model

BITS = 4
NUM_STEPS = 48
NUM_SAMPLES = 5
SMALL = 64


def thin(config: ModelConfig) -> ModelConfig:
    """The same model with one head of 64 features and matrices of 64 rows and columns."""
    return replace(
        config,
        hidden_size=SMALL,
        intermediate_size=SMALL,
        num_heads=1,
        num_kv_heads=1,
        head_dim=SMALL,
        vocab_size=SMALL,
        bos_token_id=None,
        eos_token_ids=(),
    )


def step_s(decoder: Decoder) -> float:
    """Seconds of a decode step, median of samples of `NUM_STEPS` from an empty cache."""
    cache = decoder.new_cache(NUM_STEPS)
    tokens = np.arange(NUM_STEPS, dtype=np.int32)
    samples = []
    for _ in range(NUM_SAMPLES + 1):
        cache.truncate(0)
        begin = time.perf_counter()
        for index in range(NUM_STEPS):
            decoder.forward(tokens[index : index + 1], cache, BITS)
        samples.append((time.perf_counter() - begin) / NUM_STEPS)
    return statistics.median(samples[1:])


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", help="default: the embedded model")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    set_num_threads(options.threads)
    file = TaperFile.open(options.file or embedded_model())
    full_s = step_s(Decoder.from_taper(file))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "thin.taper"
        write_random_model(path, thin(file.config))
        thin_s = step_s(Decoder.from_taper(TaperFile.open(path)))
    report = {"overhead_percent": 100 * thin_s / full_s, "thin_us": thin_s * 1e6, "step_us": full_s * 1e6}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
