"""CTranslate2 at INT8: tokens per second, as one line of JSON.

    PYTHON ctranslate2_int8.py CHECKPOINT MODEL --threads 2

Runs in a Python that has ctranslate2 and, for the conversion, torch and transformers below 5.
"""

import json
import time
from pathlib import Path

import ctranslate2
import numpy as np
from measure import measure, settings


def convert(checkpoint: Path, model: Path) -> None:
    """Convert the checkpoint; MODEL appears complete or not at all."""
    from ctranslate2.converters import TransformersConverter

    partial = model.with_suffix(".partial")
    converter = TransformersConverter(str(checkpoint), load_as_float16=True, low_cpu_mem_usage=True)
    converter.convert(str(partial), quantization="int8", force=True)
    partial.rename(model)


def main() -> None:
    """Print one JSON object."""
    given = settings(__doc__)
    if not given.model.exists():
        convert(given.checkpoint, given.model)
    generator = ctranslate2.Generator(
        str(given.model), device="cpu", compute_type="int8", inter_threads=1, intra_threads=given.threads
    )
    pieces = json.loads((given.model / "vocabulary.json").read_text(encoding="utf-8"))

    def seconds(tokens: np.ndarray, num_tokens: int) -> float:
        prompt = [[pieces[token] for token in tokens]]
        begin = time.perf_counter()
        options = {"max_length": num_tokens, "min_length": num_tokens, "sampling_topk": 1}
        generator.generate_batch(prompt, include_prompt_in_result=False, **options)
        return time.perf_counter() - begin

    def generate(tokens: np.ndarray, num_tokens: int) -> tuple[float, float]:
        """The interface tells no times of its own: the first token is taken from the whole."""
        first = seconds(tokens, 1)
        return first, (seconds(tokens, num_tokens) - first) / max(1, num_tokens - 1)

    print(json.dumps({"program": f"ctranslate2 {ctranslate2.__version__}", **measure(given, generate)}))


if __name__ == "__main__":
    main()
