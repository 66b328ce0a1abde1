"""Exact mode against its high width alone: mismatches, speed, and how many drafts are right.

    python benchmarks/precision/exact.py FILE --mismatches 1000
    python benchmarks/precision/exact.py FILE --speed
    python benchmarks/precision/exact.py FILE --acceptance

Prompts are the beginnings of documents of two texts: children's stories and general English. Each command
prints a table and, as its last line, JSON. With mismatches the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from taper.engine import LLM, Completion, SamplingParams, load
from taper.engine.sampler import candidates, race
from taper.formats.text import read_text
from taper.kernels import isa, num_threads, set_num_threads

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TEXTS = {
    "stories": SHARED / "tinystories" / "tinystories_test.txt.xz",
    "general": SHARED / "heldout" / "test.txt.xz",
}
SAMPLINGS = {
    "greedy": SamplingParams(),
    "temperature 1": SamplingParams(temperature=1.0),
    "taper run": SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
    "penalties": SamplingParams(temperature=0.9, repetition_penalty=1.2, frequency_penalty=0.2),
}
PROMPT_TOKENS = 32
# A document is long enough to begin with a prompt of prose.
SHORTEST_DOCUMENT = 400

Prompts = dict[str, list[list[int]]]


@dataclasses.dataclass(slots=True)
class Tally:
    """What the drafts of some generations came to."""

    generations: int = 0
    mismatches: int = 0
    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, exact: Completion, expected: Completion) -> bool:
        """Count a generation; whether it is the expected one."""
        usage = exact.usage
        same = _output(exact) == _output(expected)
        self.generations += 1
        self.mismatches += not same
        self.tokens += usage.num_completion_tokens
        self.passes += usage.num_decode_passes
        self.drafted += usage.num_drafted_tokens
        self.accepted += usage.num_accepted_tokens
        return same


def _output(completion: Completion) -> tuple[Any, ...]:
    return completion.token_ids, completion.text, completion.bits, completion.finish_reason


def read_prompts(llm: LLM, texts: dict[str, Path], count: int) -> Prompts:
    """The first tokens of `count` documents of each text, spread over it."""
    assert llm.tokenizer is not None
    prompts = {}
    for task, path in texts.items():
        documents = [text.strip() for text in read_text(path).split("<|endoftext|>")]
        documents = [text for text in documents if len(text) >= SHORTEST_DOCUMENT]
        chosen = documents[:: max(1, len(documents) // count)][:count]
        prompts[task] = [llm.tokenizer.encode(text[:SHORTEST_DOCUMENT])[:PROMPT_TOKENS] for text in chosen]
    return prompts


def policies(llm: LLM) -> list[tuple[str, str]]:
    """Exact policies over several high and draft widths, each with the fixed one that it must equal."""
    low, high = llm.min_bits, llm.max_bits
    middle = (low + high) // 2
    named = [
        ("exact", high),
        (f"exact:{high}/{middle}", high),
        (f"exact:{high}/{low}", high),
        (f"exact:{middle}", middle),
        (f"exact:{middle}/{low}", middle),
        (f"exact:{high - 1}", high - 1),
        (f"exact:{low}", low),
    ]
    if llm.engine.model.has_sensitivity:
        named += [(f"exact:{middle}.4/{low}.5", middle + 0.4)]
    return [(policy, f"fixed:{width}") for policy, width in named]


def measure_mismatches(
    llm: LLM, prompts: Prompts, seeds: range, num_tokens: int, tallies: dict[str, Tally]
) -> None:
    """Count a generation for each seed, by policy and by sampling."""
    cases = list(itertools.product(policies(llm), SAMPLINGS.items()))
    flat = list(itertools.chain.from_iterable(zip(*prompts.values(), strict=True)))
    for seed in seeds:
        prompt, ((exact, fixed), (name, sampling)) = (
            flat[seed // len(cases) % len(flat)],
            cases[seed % len(cases)],
        )
        asked = {"sampling": sampling, "seed": seed, "max_tokens": num_tokens, "ignore_eos": True}
        expected = llm.generate(prompt, policy=fixed, **asked)
        found = llm.generate(prompt, policy=exact, **asked)
        same = [tallies[key].add(found, expected) for key in ("all", exact, name)]
        if not all(same):
            print(f"MISMATCH: {exact}, {name}, seed {seed}, prompt {prompt}", flush=True)


@dataclasses.dataclass(slots=True)
class Round:
    """Some generations under one policy.

    Attributes:
        decode_s: of all tokens after the first, inside the engine.
        wall_s: of whole requests, prompts included.
        tally: of tokens, passes and drafts.
    """

    decode_s: float
    wall_s: float
    tally: Tally


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """One way to sample one task: a round of the fixed width and one of the exact policy, time after time."""

    task: str
    sampling: str
    fixed: list[Round]
    exact: list[Round]

    @property
    def ratios(self) -> list[float]:
        """How many times the speed of the high width alone, by round."""
        return [fixed.decode_s / exact.decode_s for fixed, exact in zip(self.fixed, self.exact, strict=True)]

    @property
    def wall_ratios(self) -> list[float]:
        """The same for whole requests."""
        return [fixed.wall_s / exact.wall_s for fixed, exact in zip(self.fixed, self.exact, strict=True)]

    def figures(self) -> dict[str, Any]:
        """Medians over the rounds after the first, in which the planner may still learn."""
        tally = Tally(*map(sum, zip(*(dataclasses.astuple(r.tally) for r in self.exact[1:]), strict=True)))
        speeds = {
            f"{name}_tokens_per_s": statistics.median(
                (r.tally.tokens - r.tally.generations) / r.decode_s for r in rounds[1:]
            )
            for name, rounds in (("fixed", self.fixed), ("exact", self.exact))
        }
        return {
            "task": self.task,
            "sampling": self.sampling,
            **speeds,
            "ratio": statistics.median(self.ratios[1:]),
            "ratios": self.ratios,
            "wall_ratio": statistics.median(self.wall_ratios[1:]),
            "accepted_frac": tally.accepted / max(1, tally.drafted),
            "drafts_per_pass": tally.drafted / tally.passes,
            "tokens_per_pass": (tally.tokens - tally.generations) / tally.passes,
        }


def measure_speed(
    llm: LLM, prompts: Prompts, samplings: Sequence[str], policy: str, rounds: int, num_tokens: int
) -> Iterator[Speed]:
    """Fixed and exact take turns over the same prompts and seeds, and turns in who is first."""
    fixed = f"fixed:{llm.policy(policy).width:.9g}"  # type: ignore[attr-defined]
    for task, name in itertools.product(prompts, samplings):
        speed = Speed(task, name, [], [])
        for turn in range(rounds + 1):
            sides = [(fixed, speed.fixed), (policy, speed.exact)]
            for each, taken in sides if turn % 2 else reversed(sides):
                asked = {"sampling": SAMPLINGS[name], "max_tokens": num_tokens, "ignore_eos": True}
                taken.append(_round(llm, prompts[task], each, 1000 * turn, asked))
        yield speed


def _round(llm: LLM, prompts: list[list[int]], policy: str, first_seed: int, asked: dict[str, Any]) -> Round:
    tally, decode_s, begin = Tally(), 0.0, time.perf_counter()
    for seed, prompt in enumerate(prompts, first_seed):
        completion = llm.generate(prompt, policy=policy, seed=seed, **asked)
        decode_s += completion.usage.decode_s
        tally.add(completion, completion)
    return Round(decode_s, time.perf_counter() - begin, tally)


@dataclasses.dataclass(frozen=True, slots=True)
class Acceptance:
    """How often a draft of one token at `bits` is right, over the tokens that the high width draws.

    Attributes:
        race: by the race that the sampler draws with, both with one key.
        inverse: by one uniform number on the running sums, both with one number.
        rejection: 1 - total variation, which rejection sampling accepts and no method can exceed.
    """

    task: str
    sampling: str
    bits: int
    race: float
    inverse: float
    rejection: float
    num_tokens: int


def measure_acceptance(llm: LLM, prompts: Prompts, num_tokens: int) -> Iterator[Acceptance]:
    """Decode at all bits; at every token, each width draws it too, over the same KV entries."""
    for task, (name, sampling) in itertools.product(prompts, list(SAMPLINGS.items())[:3]):
        found: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
        for seed, prompt in enumerate(prompts[task]):
            for bits, figures in _judged(llm, prompt, sampling, seed, num_tokens):
                found[bits].append(figures)
        for bits, rows in sorted(found.items()):
            yield Acceptance(
                task, name, bits, *(float(np.mean(c)) for c in zip(*rows, strict=True)), len(rows)
            )


def _judged(
    llm: LLM, prompt: Sequence[int], sampling: SamplingParams, seed: int, num_tokens: int
) -> Iterator[tuple[int, tuple[float, float, float]]]:
    model: Any = llm.engine.model
    generator = np.random.default_rng(seed)
    cache = model.new_cache(len(prompt) + num_tokens)
    row = model.forward(prompt, cache, llm.max_bits)[0]
    for _ in range(num_tokens):
        key, uniform = int(generator.integers(2**63)), generator.random()
        token = _drawn(row, sampling, key)
        position = cache.num_tokens
        rows = {}
        for bits in range(llm.min_bits, llm.max_bits + 1):
            rows[bits] = model.forward([token], cache, bits)[0]
            cache.truncate(position)
        row = model.forward([token], cache, llm.max_bits)[0]
        key, uniform = int(generator.integers(2**63)), generator.random()
        for bits in range(llm.min_bits, llm.max_bits):
            yield bits, _agreement(row, rows[bits], sampling, key, uniform)


def _agreement(
    high: npt.NDArray[np.float32], low: npt.NDArray[np.float32], sampling: SamplingParams, key: int, u: float
) -> tuple[float, float, float]:
    """Whether races and running sums draw the same token, and 1 - total variation."""
    same = float(_drawn(high, sampling, key) == _drawn(low, sampling, key))
    if sampling.is_greedy:
        return same, same, same
    one, other = _probabilities(high, sampling), _probabilities(low, sampling)
    inverse = [int(np.searchsorted(np.cumsum(p), u * p.sum(), side="right")) for p in (one, other)]
    return same, float(inverse[0] == inverse[1]), float(np.minimum(one, other).sum())


def _drawn(row: npt.NDArray[np.float32], sampling: SamplingParams, key: int) -> int:
    if sampling.is_greedy:
        return int(row.argmax())
    ids, weights = candidates(row, sampling)
    index = race(weights, ids, key)
    return index if ids is None else int(ids[index])


def _probabilities(row: npt.NDArray[np.float32], sampling: SamplingParams) -> npt.NDArray[np.float64]:
    ids, weights = candidates(row, sampling)
    result = np.zeros(len(row))
    result[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return result


def _report(llm: LLM, arguments: argparse.Namespace, **figures: Any) -> str:
    head = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": "embedded" if arguments.model is None else arguments.model.name,
        "isa": isa(),
        "threads": num_threads(),
        "tokens": arguments.tokens,
    }
    return json.dumps({**head, **figures})


def _mismatches(llm: LLM, arguments: argparse.Namespace) -> int:
    prompts = read_prompts(llm, arguments.texts, arguments.prompts)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.mismatches)
    tallies: dict[str, Tally] = defaultdict(Tally)
    try:
        measure_mismatches(llm, prompts, seeds, arguments.tokens, tallies)
    except KeyboardInterrupt:
        print("interrupted; these are done:")
    for name, tally in tallies.items():
        print(
            f"{name:18} {tally.mismatches} mismatches in {tally.generations} generations, {tally.tokens} "
            f"tokens; {tally.accepted / max(1, tally.drafted):.1%} of {tally.drafted} drafts accepted"
        )
    rows = {name: dataclasses.asdict(tally) for name, tally in tallies.items()}
    print(_report(llm, arguments, first_seed=arguments.first_seed, mismatches=rows))
    return int(tallies["all"].mismatches > 0)


def _speed(llm: LLM, arguments: argparse.Namespace) -> int:
    prompts = read_prompts(llm, arguments.texts, arguments.prompts)
    rows = []
    how = (arguments.sampling, arguments.policy, arguments.rounds, arguments.tokens)
    for speed in measure_speed(llm, prompts, *how):
        row = speed.figures()
        ratios = row["ratios"][1:]
        print(
            f"{speed.task}, {speed.sampling:13} fixed {row['fixed_tokens_per_s']:6.1f} tok/s, exact "
            f"{row['exact_tokens_per_s']:6.1f}: {row['ratio']:.3f} x ({min(ratios):.3f} to "
            f"{max(ratios):.3f}), whole requests {row['wall_ratio']:.3f} x; {row['accepted_frac']:.1%} of "
            f"drafts accepted, {row['tokens_per_pass']:.2f} tokens a pass",
            flush=True,
        )
        rows.append(row)
    print(_report(llm, arguments, policy=arguments.policy, rounds=arguments.rounds, speed=rows))
    return 0


def _acceptance(llm: LLM, arguments: argparse.Namespace) -> int:
    prompts = read_prompts(llm, arguments.texts, arguments.prompts)
    rows = []
    for row in measure_acceptance(llm, prompts, arguments.tokens):
        print(
            f"{row.task}, {row.sampling:13} {row.bits} bits: race {row.race:.1%}, running sum "
            f"{row.inverse:.1%}, rejection sampling {row.rejection:.1%} ({row.num_tokens} tokens)",
            flush=True,
        )
        rows.append(dataclasses.asdict(row))
    print(_report(llm, arguments, acceptance=rows))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="a .taper file; default: the embedded model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--mismatches", type=int, metavar="N", help="compare N generations")
    what.add_argument("--speed", action="store_true", help="time fixed and exact in turns")
    what.add_argument("--acceptance", action="store_true", help="count right drafts of every width")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="for --mismatches, which Ctrl-C may end early"
    )
    parser.add_argument("--policy", default="exact", help="for --speed")
    parser.add_argument(
        "--sampling",
        nargs="+",
        choices=SAMPLINGS,
        default=["greedy", "taper run", "temperature 1"],
        help="for --speed",
    )
    parser.add_argument("--tokens", type=int, default=128, help="of a generation")
    parser.add_argument("--prompts", type=int, default=4, help="documents of each text")
    parser.add_argument("--rounds", type=int, default=7, help="for --speed, after a first one")
    parser.add_argument("--threads", type=int, help="default: one a core")
    parser.add_argument("--task", nargs="+", choices=TEXTS, default=[*TEXTS])
    for task, path in TEXTS.items():
        parser.add_argument(
            f"--{task}", type=Path, default=path, help="text; documents end with <|endoftext|>"
        )
    arguments = parser.parse_args()
    arguments.texts = {task: getattr(arguments, task) for task in arguments.task}
    if arguments.threads:
        set_num_threads(arguments.threads)
    llm = load(arguments.model)
    if arguments.mismatches:
        return _mismatches(llm, arguments)
    return _speed(llm, arguments) if arguments.speed else _acceptance(llm, arguments)


if __name__ == "__main__":
    sys.exit(main())
