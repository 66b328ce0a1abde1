"""onnxruntime-genai at INT4: tokens per second, as one line of JSON.

    PYTHON onnxruntime_int4.py CHECKPOINT MODEL --threads 2

Runs in a Python that has onnxruntime-genai and, for the conversion, onnx-ir, torch and transformers. Blocks
of 32 weights and accuracy level 4 (integer products) are the fastest choice of its builder for processors.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from measure import measure, settings

CONVERT_TIMEOUT_S = 1800


def convert(checkpoint: Path, model: Path, threads: int) -> None:
    """Run its builder; MODEL appears complete or not at all."""
    partial = model.with_suffix(".partial")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", partial]
    options = ["-p", "int4", "-e", "cpu", "-c", partial.with_suffix(".cache")]
    options += ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
    subprocess.run([*command, *options], check=True, timeout=CONVERT_TIMEOUT_S, stdout=sys.stderr)
    path = partial / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config), encoding="utf-8")
    partial.rename(model)


def main() -> None:
    """Print one JSON object."""
    given = settings(__doc__)
    if not given.model.exists():
        convert(given.checkpoint, given.model, given.threads)
    model = og.Model(str(given.model))

    def generate(tokens: np.ndarray, num_tokens: int) -> tuple[float, float]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(tokens) + num_tokens + 1, do_sample=False)
        generator = og.Generator(model, params)
        begin = time.perf_counter()
        generator.append_tokens(tokens.astype(np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(num_tokens - 1):
            generator.generate_next_token()
        return first - begin, (time.perf_counter() - first) / max(1, num_tokens - 1)

    print(json.dumps({"program": f"onnxruntime-genai {og.__version__}", **measure(given, generate)}))


if __name__ == "__main__":
    main()
