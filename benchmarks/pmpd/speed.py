"""Measured time per token of every policy, alternating, through the engine.

python benchmarks/pmpd/speed.py models/taper-small.taper --data ../shared/data --out speed.json

Each round takes the next prompt and runs every policy on it once, beginning with another policy each time;
answers run to the task's limit. Medians over rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "llama_cpp"))

from common import BenchmarkError, progress, run_main
from machine import CpuClock, processor
from pmpd_tasks import TASKS, prompts_of
from schedules import chosen_policies, policy_of

import taper
from taper.engine import LLM, Request
from taper.tune.prompts import PromptSet

Times = dict[str, list[float]]


def one_run(llm: LLM, text: str, prompt_ids: Sequence[int], limit: int) -> tuple[float, float, float]:
    """Milliseconds a token of the decode passes, milliseconds of the prompt, average bits."""
    policy = policy_of(llm, text, limit)
    usage = llm.engine.generate(Request(prompt_ids, policy, max_tokens=limit, ignore_eos=True)).usage
    decode_ms = 1e3 * usage.decode_s / (usage.num_completion_tokens - 1)
    return decode_ms, 1e3 * usage.prefill_s, usage.average_bits


def time_task(llm: LLM, prompts: PromptSet, texts: Sequence[str], rounds: int) -> dict[str, Times]:
    """Policy text to the samples of all rounds; the first round of each policy is not counted."""
    samples: dict[str, Times] = {text: {"decode_ms": [], "prefill_ms": [], "bits": []} for text in texts}
    for number in range(rounds + 1):
        prompt_ids = prompts.prompts[number % len(prompts)]
        first = number * 7 % len(texts)
        for text in [*texts[first:], *texts[:first]]:
            values = one_run(llm, text, prompt_ids, prompts.max_tokens)
            if number:
                for kept, value in zip(samples[text].values(), values, strict=True):
                    kept.append(value)
    return samples


def others_frac(began: CpuClock, own_s: float) -> float | None:
    """Share of all cores that other processes took since then."""
    end = CpuClock.now()
    if began.busy_s is None or end.busy_s is None:
        return None
    others_s = end.busy_s - began.busy_s - own_s
    return min(1.0, max(0.0, others_s / ((end.wall_s - began.wall_s) * (os.cpu_count() or 1))))


def summary(samples: dict[str, Times]) -> dict[str, dict[str, float]]:
    """Policy text to median and quartiles."""
    found = {}
    for text, times in samples.items():
        low, median, high = statistics.quantiles(times["decode_ms"], n=4, method="inclusive")
        found[text] = {
            "decode_ms": median,
            "decode_ms_low": low,
            "decode_ms_high": high,
            "tokens_per_s": 1e3 / median,
            "prefill_ms": statistics.median(times["prefill_ms"]),
            "bits": statistics.fmean(times["bits"]),
        }
    return found


def main() -> None:
    """Time, and write the samples' medians; the last line is the same JSON."""
    parser = argparse.ArgumentParser(description="Time per token of precision policies.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the tasks' data")
    parser.add_argument("--tasks", default="stories", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=9, help="timed; at least 5")
    parser.add_argument("--policy", action="append", default=[], help="one more: TEXT or FAMILY=TEXT")
    parser.add_argument("--only-given", action="store_true", help="leave the default policies out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.rounds < 5:
        raise BenchmarkError(f"--rounds {args.rounds} is below 5, too few for a median and its quartiles")
    llm = taper.load(args.model)
    if llm.tokenizer is None:
        raise BenchmarkError(f"{args.model} has no tokenizer; give a file with one")
    families = chosen_policies(llm, args.policy, args.only_given)
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "model": args.model.name,
        "version": taper.__version__,
        "processor": processor(),
        "rounds": args.rounds,
        "tasks": {},
    }
    for name in args.tasks.split(","):
        prompts = prompts_of(name, args.data, llm.tokenizer, args.rounds + 1)
        began, own_s = CpuClock.now(), time.process_time()
        samples = time_task(llm, prompts, list(families), args.rounds)
        others = others_frac(began, time.process_time() - own_s)
        progress(f"{name}: other work took {'an unknown share' if others is None else f'{others:.0%}'}")
        record["tasks"][name] = {
            "limit": TASKS[name].limit,
            "others_frac": others,
            "policies": summary(samples),
        }
        args.out.write_text(json.dumps(record), encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    run_main(main)
