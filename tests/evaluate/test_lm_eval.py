"""The harness runs a task of its own with the model `taper`; skipped where lm_eval is not installed."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from taper.evaluate.choices import measure_tasks
from taper.evaluate.likelihood import Scorer
from taper.evaluate.perplexity import open_model
from taper.evaluate.tasks import Item, Task
from taper.testing.tiny import tiny_taper

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lm_eval is not installed")

TASK = """
task: taper_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


class Request:
    """What the adapter uses of lm_eval's Instance."""

    def __init__(self, *args: object) -> None:
        self.args = args


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_taper(tmp_path_factory.mktemp("model") / "tiny.taper", 2, 4)


@pytest.mark.skipif(HAS_HARNESS, reason="lm_eval is installed")
def test_without_the_package_the_hint_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import taper.evaluate.lm_eval"], capture_output=True, text=True, check=False
    )
    assert "lm-eval-harness cannot be imported" in done.stderr


@needs_harness
def test_answers_are_those_of_the_scorer(model: Path) -> None:
    from taper.evaluate.lm_eval import TaperLM

    lm = TaperLM.create_from_arg_string(f"file={model},bits=3", {"batch_size": 1, "device": None})
    scorer = Scorer(*open_model(model), 3)
    pairs = [("the sea", " of rain"), ("", "the"), ("the " * 300, " sea")]
    found = lm.loglikelihood([Request(*pair) for pair in pairs])
    expected = [scorer.score(*pair) for pair in pairs]
    assert found == [(score.log_likelihood, score.is_greedy) for score in expected]
    assert lm.loglikelihood_rolling([Request("the sea of rain " * 90)]) == [
        scorer.rolling("the sea of rain " * 90)
    ]
    (text,) = lm.generate_until([Request("the sea", {"until": [], "max_gen_toks": 5})])
    (shorter,) = lm.generate_until([Request("the sea", {"until": [text[1:2]], "max_gen_toks": 5})])
    assert text.startswith(shorter)
    assert len(shorter) < len(text)


@needs_harness
def test_the_harness_scores_as_our_own_tasks_do(model: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import taper.evaluate.lm_eval  # noqa: F401

    words = ["sea", "rain", "stone", "town", "water"]
    rows = [
        {"context": f"the {a} and the", "choices": [f" {b}", " old old old"], "answer": i % 2}
        for i, (a, b) in enumerate((a, b) for a in words for b in words)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "choice.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    found = lm_eval.simple_evaluate(
        model="taper",
        model_args=f"file={model},bits=3",
        tasks=["taper_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["taper_choice"]
    items = tuple(Item(row["context"], tuple(row["choices"]), row["answer"]) for row in rows)
    (report,) = measure_tasks(model, [Task("t", items)], bits=[3])
    assert found["acc,none"] == report.results[0].accuracy
    assert found["acc_norm,none"] == pytest.approx(report.results[0].normalised_accuracy)
    error = report.results[0].accuracy_standard_error
    assert error is not None
    assert not math.isnan(error)
