"""A whole task of lm-eval-harness, unmodified, against `taper serve`, beside the items scored without HTTP.

    pip install 'lm-eval[api]==0.4.13' transformers      # any environment; no torch is needed
    python benchmarks/serving/lm_eval_task.py --items arc-easy-test.json.xz --lm-eval PYTHON [--count 200]

ITEMS is what `taper eval --tasks` reads. The harness sends every choice with its context as tokens
(`local-completions`, echo and logprobs), four at a time, and reports accuracy; ours comes from
`taper.evaluate` over the same KV format. The last line is JSON; the exit status is 1 where the two differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

from harness import serving

from taper.engine import embedded_model
from taper.evaluate.choices import measure_tasks
from taper.evaluate.tasks import Task, read_task
from taper.formats.container import TaperFile

KV = "7"
TASK = """
task: taper_items
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc}}
"""


def write_task(folder: Path, file: TaperFile, task: Task) -> None:
    """The items as the harness reads them, and the file's tokenizer as a folder."""
    rows = [
        {"context": item.context, "choices": list(item.choices), "answer": item.answer} for item in task.items
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    (folder / "taper_items.yaml").write_text(TASK.format(data=folder / "items.jsonl"), encoding="utf-8")
    assert file.tokenizer_json is not None
    (folder / "tokenizer.json").write_text(file.tokenizer_json, encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def by_harness(python: str, folder: Path, port: int) -> float:
    """Accuracy that the harness finds."""
    arguments = {
        "model": "tiny",
        "base_url": f"http://127.0.0.1:{port}/v1/completions",
        "tokenizer": folder,
        "tokenized_requests": True,
        "add_bos_token": True,  # the tokenizer puts one there, and ours follows it
        "num_concurrent": 4,
    }
    command = [python, "-m", "lm_eval", "--model", "local-completions", "--tasks", "taper_items"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--include_path", str(folder), "--output_path", str(folder / "results")]
    subprocess.run(command, check=True)
    (found,) = (folder / "results").rglob("results_*.json")
    accuracy = json.loads(found.read_text(encoding="utf-8"))["results"]["taper_items"]["acc,none"]
    assert isinstance(accuracy, float)
    return accuracy


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", required=True)
    parser.add_argument("--lm-eval", required=True, help="the interpreter that has it")
    parser.add_argument("--model", default=str(embedded_model()), help="default: the one in the package")
    parser.add_argument("--count", type=int, help="of the items, evenly spaced; default: all")
    options = parser.parse_args()
    file = TaperFile.open(Path(options.model))
    task = read_task(options.items, options.count)
    with tempfile.TemporaryDirectory() as name, serving("--kv", KV, model=options.model) as server:
        write_task(Path(name), file, task)
        began = time.perf_counter()
        harness = by_harness(options.lm_eval, Path(name), server.port)
        seconds = time.perf_counter() - began
    (report,) = measure_tasks(options.model, [task], bits=[file.max_bits], kv=KV)
    ours = report.results[0].accuracy
    found = {"items": len(task.items), "requests": sum(len(item.choices) for item in task.items)}
    print(json.dumps({**found, "seconds": round(seconds, 1), "lm_eval": harness, "without_http": ours}))
    raise SystemExit(harness != ours)


if __name__ == "__main__":
    main()
