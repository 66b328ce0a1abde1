"""Time to the first token while a file arrives at a fixed rate: progressive loading against waiting for it.

    python benchmarks/precision/loading.py [FILE] [--rate 200] [--prompts 64] [--rounds 5]

Each sample copies FILE at the rate into a file NAME.part, which is renamed when it is whole, and starts a
fresh process at the same moment that answers a prompt of random tokens from it. One side loads progressively,
the other waits for the whole file; they alternate. The clock starts with the copy, so it counts the
interpreter's start and imports on both sides. The ratio is that of the two samples of a round. FILE is made
where it does not exist: random weights in the shape of `--shape`. Rows for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import taper
from taper.formats.container import TaperFile
from taper.kernels import set_num_threads
from taper.testing.random_model import SHAPES, write_random_model

MODELS = Path.home() / ".cache" / "taper-bench" / "models"
COPY_S = 0.005
POLL_S = 0.005
SAMPLE_TIMEOUT_S = 600


def copy_at(source: Path, target: Path, bytes_per_s: float, began_s: float) -> None:
    """Copy so that no byte is there before its time; the last step gives the file its name."""
    partial = target.with_name(target.name + ".part")
    chunk_bytes = max(1, int(COPY_S * bytes_per_s))
    copied = 0
    with source.open("rb") as reader, partial.open("wb", buffering=0) as writer:
        while chunk := reader.read(chunk_bytes):
            copied += len(chunk)
            time.sleep(max(0.0, began_s + copied / bytes_per_s - time.monotonic()))
            writer.write(chunk)
    partial.rename(target)


def answer(target: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Load as the side says and generate; times are seconds since the copy began."""
    set_num_threads(options.threads)
    partial = target.with_name(target.name + ".part")
    while not (target.exists() or (options.side == "progressive" and partial.exists())):
        time.sleep(POLL_S)
    llm = taper.load(target, progressive=options.side == "progressive")
    loaded_s = time.monotonic() - options.began
    prompt = np.random.default_rng(options.seed).integers(0, llm.config.vocab_size, options.prompt).tolist()
    stream = llm.stream(
        prompt, policy=options.policy, max_tokens=options.tokens, temperature=0.0, ignore_eos=True
    )
    tokens = [(time.monotonic() - options.began, step.bits) for step in stream]
    done = stream.completion()
    llm.close()
    return {
        "loaded_s": loaded_s,
        "first_token_s": tokens[0][0],
        "last_token_s": tokens[-1][0],
        "prefill_s": done.usage.prefill_s,
        "token_bits": list(done.bits),
        "ceilings": [(token, bits, tokens[min(token, len(tokens) - 1)][0]) for token, bits in done.ceilings],
    }


def sample(source: Path, side: str, prompt: int, options: argparse.Namespace) -> dict[str, Any]:
    """One copy and one answer, in processes of their own."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        target = Path(folder) / "arriving.taper"
        began = time.monotonic()  # one clock for all processes of a machine
        common = [sys.executable, __file__, str(source), "--began", str(began), "--target", str(target)]
        copier = subprocess.Popen([*common, "--side", "copy", "--rate", str(options.rate)])
        arguments = ["--side", side, "--prompt", str(prompt), "--seed", str(options.seed)]
        arguments += ["--tokens", str(options.tokens), "--threads", str(options.threads)]
        arguments += ["--policy", options.policy]
        try:
            output = subprocess.run(
                [*common, *arguments],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                timeout=SAMPLE_TIMEOUT_S,
            ).stdout
        finally:
            status = copier.wait(SAMPLE_TIMEOUT_S)
        if status:
            raise SystemExit(f"the copy ended with status {status}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def measure(source: Path, prompt: int, options: argparse.Namespace) -> dict[str, Any]:
    """Alternating rounds of both sides, every second one backwards."""
    sides: dict[str, list[dict[str, Any]]] = {"progressive": [], "whole": []}
    for index in range(options.rounds):
        for side in sorted(sides, reverse=bool(index % 2)):
            sides[side].append(sample(source, side, prompt, options))
    first = {side: [run["first_token_s"] for run in runs] for side, runs in sides.items()}
    ratios = [whole / ours for ours, whole in zip(first["progressive"], first["whole"], strict=True)]
    return {
        "prompt_tokens": prompt,
        "first_token_s": {side: statistics.median(times) for side, times in first.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "rounds": sides,
    }


def rows(result: dict[str, Any]) -> list[str]:
    """The times, the ratio, and the width over time of the progressive side's median round."""
    first, ratios = result["first_token_s"], result["ratios"]
    lines = [
        f"prompt of {result['prompt_tokens']:4} tokens: first token after {first['progressive']:.2f} s, "
        f"waiting {first['whole']:.2f} s: {result['ratio']:.2f} x sooner "
        f"({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds)"
    ]
    runs = sorted(result["rounds"]["progressive"], key=lambda run: run["first_token_s"])
    ceilings = runs[len(runs) // 2]["ceilings"]
    steps = (f"{bits} bits from token {token} ({time_s:.2f} s)" for token, bits, time_s in ceilings)
    return [*lines, "    there were " + ", ".join(steps)]


def parsed() -> argparse.Namespace:
    """The command line; the hidden options are those of the processes of a sample."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", help="default: a file of random weights in the cache")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.1b")
    parser.add_argument("--rate", type=float, default=200.0, help="MB/s at which the file arrives")
    parser.add_argument("--prompts", default="64", help="lengths in tokens, separated by commas")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--policy", default="progressive")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    for name, kind in (("side", str), ("target", Path), ("began", float), ("prompt", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Print rows and the JSON line, or be one process of a sample."""
    options = parsed()
    if options.side == "copy":
        copy_at(options.file, options.target, options.rate * 1e6, options.began)
        return
    if options.side is not None:
        print(json.dumps(answer(options.target, options)))
        return
    source = options.file or MODELS / f"{options.shape}.taper"
    if not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        write_random_model(source, SHAPES[options.shape])
    file = TaperFile.open(source)
    print(
        f"{source.name}: {file.total_bytes / 1e6:.0f} MB, {file.bytes_at(file.min_bits) / 1e6:.0f} MB at "
        f"{file.min_bits} bits, arriving at {options.rate:g} MB/s; policy {options.policy}"
    )
    results = []
    for prompt in (int(word) for word in options.prompts.split(",")):
        results.append(measure(source, prompt, options))
        print("\n".join(rows(results[-1])), flush=True)
    record = {
        "benchmark": "loading",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "file_bytes": file.total_bytes,
        "first_bytes": file.bytes_at(file.min_bits),
        "rate_mb_per_s": options.rate,
        "policy": options.policy,
        "threads": options.threads,
        "results": results,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
