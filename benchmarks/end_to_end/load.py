"""Time from opening a file to its first decode step, and the anonymous memory then, as one line of JSON.

    python benchmarks/end_to_end/load.py FILE --bits 4 --threads 2

The clock starts when Python and the package are loaded. Anonymous memory is all that the process holds
without a file behind it, the interpreter included, less the KV cache; a second copy of the weights would be
in it.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from taper.formats.container import TaperFile
from taper.kernels import set_num_threads
from taper.models import Decoder

NUM_STEPS = 8


def anonymous_bytes() -> int:
    """Resident memory of this process that no file is behind (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    set_num_threads(options.threads)
    begin = time.perf_counter()
    decoder = Decoder.from_taper(TaperFile.open(options.file))
    cache = decoder.new_cache(NUM_STEPS)
    ready = time.perf_counter()
    decoder.forward(np.array([1], np.int32), cache, options.bits)
    first = time.perf_counter()
    for token in range(2, NUM_STEPS):
        decoder.forward(np.array([token], np.int32), cache, options.bits)
    report = {
        "ready_ms": (ready - begin) * 1e3,
        "first_step_ms": (first - begin) * 1e3,
        "anonymous_mb": (anonymous_bytes() - cache.bytes_used) / 1e6,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
