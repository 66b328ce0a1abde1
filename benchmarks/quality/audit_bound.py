"""How often an audit's bound holds, and what the audit costs: python benchmarks/quality/audit_bound.py FILE.

Several answers to each prompt are drawn and audited. The bound of an answer's first half is set against the
mean KL of its second half, which is as noisy as the mean that the bound comes from (a bound that is right at
95 % holds for it in 88 %), and against the mean of all answers' first halves. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import fields, replace
from typing import Any

import numpy as np

import taper
from taper.engine import LLM, Audit
from taper.errors import TaperError

PROMPTS = (
    "Once upon a time",
    "The president said that the new law",
    '"Where are you going?" asked',
    "To make a simple soup, first",
)
# The defaults of `taper run`: greedy answers of one prompt would all be the same.
SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


def first_tokens(audit: Audit, count: int) -> Audit:
    """The audit of the first tokens of an answer; its cost stays that of the whole."""
    per_token = [field.name for field in fields(Audit) if isinstance(getattr(audit, field.name), tuple)]
    return replace(audit, **{name: getattr(audit, name)[:count] for name in per_token})


def measure(llm: LLM, prompt: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Shares of a prompt's answers whose bound holds, and seconds of decoding and of the audit."""
    half = arguments.tokens // 2
    completions = [
        llm.generate(
            prompt,
            policy=arguments.policy,
            max_tokens=2 * half,
            ignore_eos=True,
            seed=seed,
            audit=True,
            **SAMPLING,
        )
        for seed in range(arguments.answers)
    ]
    audits = [completion.audit for completion in completions if completion.audit is not None]
    bounds = np.array([first_tokens(audit, half).mean_kl_bound for audit in audits], dtype=np.float64)
    kl = np.array([audit.kl for audit in audits])
    common = kl[:, :half].mean()
    return {
        "prompt": prompt,
        "kl_mean": float(common),
        "bound_over_mean": float(bounds.mean() / common),
        "holds_for_second_half_frac": float((bounds >= kl[:, half:].mean(axis=1)).mean()),
        "holds_for_all_answers_frac": float((bounds >= common).mean()),
        "decode_s": statistics.median(completion.usage.decode_s for completion in completions),
        "audit_s": statistics.median(audit.seconds for audit in audits),
    }


def main() -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure how often an audit's bound holds.")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--policy", default="fixed:3")
    parser.add_argument("--answers", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    try:
        llm = taper.load(arguments.file)
        print(
            "| prompt | KL | bound / KL | second half | all answers | decoding | audit |\n" + "|---" * 7 + "|"
        )
        rows = []
        for prompt in PROMPTS:
            row = measure(llm, prompt, arguments)
            rows.append(row)
            print(
                f"| {prompt} | {row['kl_mean']:.4f} | {row['bound_over_mean']:.2f} | "
                f"{row['holds_for_second_half_frac']:.0%} | {row['holds_for_all_answers_frac']:.0%} | "
                f"{row['decode_s']:.2f} s | {row['audit_s']:.2f} s |",
                flush=True,
            )
    except TaperError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"policy": arguments.policy, "answers": arguments.answers, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
