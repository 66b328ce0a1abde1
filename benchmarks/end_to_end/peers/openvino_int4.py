"""OpenVINO GenAI at INT4: tokens per second, as one line of JSON.

    PYTHON openvino_int4.py CHECKPOINT MODEL --threads 2 [--hint f32]

Runs in a Python that has openvino-genai and, for the conversion, optimum-intel. MODEL is converted from the
checkpoint where it is missing: asymmetric INT4 in groups of 128, embeddings and head INT8, which are
optimum's defaults for INT4. The prompts differ from run to run, since the pipeline keeps what it has read.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from measure import measure, settings

CONVERT_TIMEOUT_S = 1800


def convert(checkpoint: Path, model: Path) -> None:
    """Export the checkpoint with optimum's command line; MODEL appears complete or not at all."""
    partial = model.with_suffix(".partial")
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "openvino", "--model", checkpoint]
    options = ["--task", "text-generation-with-past", "--weight-format", "int4"]
    options += ["--ratio", "1.0", "--group-size", "128"]
    subprocess.run([*command, *options, partial], check=True, timeout=CONVERT_TIMEOUT_S, stdout=sys.stderr)
    partial.rename(model)


def main() -> None:
    """Print one JSON object."""
    given = settings(__doc__, hint=("--hint", "INFERENCE_PRECISION_HINT; default: the plugin's"))
    if not given.model.exists():
        convert(given.checkpoint, given.model)
    properties = {"INFERENCE_NUM_THREADS": given.threads}
    if given.hint:
        properties["INFERENCE_PRECISION_HINT"] = given.hint
    pipeline = genai.LLMPipeline(given.model, "CPU", properties)

    def generate(tokens: np.ndarray, num_tokens: int) -> tuple[float, float]:
        config = genai.GenerationConfig(max_new_tokens=num_tokens, ignore_eos=True, do_sample=False)
        ids = ov.Tensor(tokens[None].astype(np.int64))
        mask = ov.Tensor(np.ones((1, len(tokens)), np.int64))
        metrics = pipeline.generate(genai.TokenizedInputs(ids, mask), config).perf_metrics
        return metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3 if num_tokens > 1 else 0.0

    report = {"program": f"openvino-genai {genai.__version__}", **measure(given, generate)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
