"""Quality against average bits: uniform, phase-aware, static, learned, Taper's own schedules, and controls.

python benchmarks/pmpd/quality.py models/taper-small.taper --data ../shared/data --out quality.json

For each prompt of each task and each policy: the logits of the reference answer with the schedule's own KV
entries (likelihood, KL divergence from all planes), and the greedy answer (ROUGE-L to that of all planes and
to the reference). `pmpd_report.py` makes tables and pictures of the result; `docs/pmpd.md` says what they
mean.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "llama_cpp"))

from common import BenchmarkError, progress, run_main
from forcing import OnePrompt, answers
from machine import processor
from pmpd_tasks import TASKS, prompts_of
from schedules import FULL, chosen_policies

import taper
from taper.engine import LLM
from taper.evaluate.divergence import kl_divergences, log_likelihoods, log_normalisers
from taper.evaluate.sequences import rouge_l
from taper.tune.prompts import PromptSet

Scores = dict[str, float]
# Prompts that decode together. Each keeps its cache at every width that the policies read prompts at: nine
# times 500 tokens of the 27 M model are 37 MB.
BATCH = 10


def forced_scores(prompt: OnePrompt, texts: Sequence[str]) -> dict[str, Scores]:
    """Of every policy: `nll` and `kl` over the reference's tokens in nats, `bits` over its decode passes."""
    targets = np.array(prompt.reference_ids, dtype=np.int32)
    full, _ = prompt.forced(FULL)
    full_norms = log_normalisers(full)
    found = {}
    for text in texts:
        logits, bits = prompt.forced(text)
        norms = log_normalisers(logits)
        found[text] = {
            "bits": statistics.fmean(bits[1:] or bits),
            "nll": -float(log_likelihoods(logits, norms, targets).mean()),
            "kl": float(kl_divergences(full, full_norms, logits, norms).mean()),
        }
    return found


def answer_scores(
    llm: LLM, batch: Sequence[OnePrompt], texts: Sequence[str], limit: int
) -> list[dict[str, Scores]]:
    """Of every prompt and policy's greedy answer: `answer_bits`, ROUGE-L to all planes' and the reference."""
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    wanted = [tokenizer.decode(one.reference_ids) for one in batch]
    full = [tokenizer.decode(tokens) for tokens, _ in answers(llm, batch, FULL, limit)]
    found: list[dict[str, Scores]] = [{} for _ in batch]
    for text in texts:
        for index, (tokens, bits) in enumerate(answers(llm, batch, text, limit)):
            given = tokenizer.decode(tokens)
            found[index][text] = {
                "answer_bits": statistics.fmean(bits[1:] or bits),
                "rouge_full": rouge_l(full[index], given),
                "rouge_reference": rouge_l(wanted[index], given),
            }
    return found


def measure(
    llm: LLM, prompts: PromptSet, is_generated: bool, texts: Sequence[str]
) -> list[dict[str, Scores]]:
    """Of every prompt, the scores of every policy."""
    limit = prompts.max_tokens
    pairs = zip(prompts.prompts, prompts.references, strict=True)
    batch = [OnePrompt(llm, prompt_ids, reference_ids, limit) for prompt_ids, reference_ids in pairs]
    found = [forced_scores(one, texts) for one in batch]
    if is_generated:
        for scores, more in zip(found, answer_scores(llm, batch, texts, limit), strict=True):
            for text in texts:
                scores[text] |= more[text]
    return found


def add(task: dict[str, Any], prompts: PromptSet, found: Sequence[dict[str, Scores]]) -> None:
    """Put some prompts' scores behind those of a task."""
    task["documents"] += prompts.documents
    for scores in found:
        for text, values in scores.items():
            for score, value in values.items():
                task["samples"].setdefault(text, {}).setdefault(score, []).append(value)


def means(tasks: dict[str, Any]) -> dict[str, dict[str, Scores]]:
    """Task to policy to the mean of each score."""
    return {
        name: {
            text: {score: statistics.fmean(values) for score, values in samples.items()}
            for text, samples in task["samples"].items()
        }
        for name, task in tasks.items()
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quality of precision policies on four tasks.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the tasks' data")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--prompts", type=int, default=100, help="of each task")
    parser.add_argument("--policy", action="append", default=[], help="one more: TEXT or FAMILY=TEXT")
    parser.add_argument("--only-given", action="store_true", help="leave the default policies out")
    parser.add_argument("--out", type=Path, required=True, help="JSON with every sample")
    return parser.parse_args()


def main() -> None:
    """Measure, write the samples, and print the means as JSON on the last line."""
    args = parse_arguments()
    llm = taper.load(args.model)
    if llm.tokenizer is None:
        raise BenchmarkError(f"{args.model} has no tokenizer; give a file with one")
    families = chosen_policies(llm, args.policy, args.only_given)
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "model": args.model.name,
        "version": taper.__version__,
        "processor": processor(),
        "top": llm.max_bits,
        "families": families,
        "tasks": {},
    }
    sets = {name: prompts_of(name, args.data, llm.tokenizer, args.prompts) for name in args.tasks.split(",")}
    for name, prompts in sets.items():
        record["tasks"][name] = {"limit": prompts.max_tokens, "documents": [], "samples": {}}
    # Batch by batch through all tasks, so that what is there may be looked at, and kept, at any time.
    for begin in range(0, args.prompts, BATCH):
        for name, prompts in sets.items():
            batch = prompts.select(range(begin, min(begin + BATCH, args.prompts)))
            found = measure(llm, batch, TASKS[name].is_generated, list(families))
            add(record["tasks"][name], batch, found)
            args.out.write_text(json.dumps(record), encoding="utf-8")
            progress(f"{name}: {begin + len(batch)} of {args.prompts} prompts")
    print(json.dumps({**record, "tasks": means(record["tasks"])}))


if __name__ == "__main__":
    run_main(main)
