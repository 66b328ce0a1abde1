"""Clients that leave: nobody else notices, no KV block stays behind, no memory is lost.

    python benchmarks/serving/disconnects.py [--requests 20000] [--leave 0.34] [--concurrency 16]

Every client asks for a greedy answer of one of a few prompts, half of them as a stream; those that leave do
so at a random moment, also while they wait in the queue. Those that stay must get the bytes of an undisturbed
run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import time
from collections import Counter
from typing import Any

import numpy as np
from harness import Reply, Server, exchange, monitor, percentile, serving

PATH = "/v1/completions"
PROMPTS = [
    "hello",
    "the cat in the hat",
    "one two three",
    "once upon a time there was",
    "a",
    "stones and rings",
]
WARM_UP = 0.25  # share of the requests before memory is looked at: caches and arenas fill


def body(prompt: str, is_stream: bool) -> bytes:
    """A request; at a fixed width, so that load cannot change the answer."""
    fields = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "bits": 4}
    return json.dumps({**fields, "ignore_eos": True, "stream": is_stream}).encode()


def text_of(reply: Reply, is_stream: bool) -> str:
    """The answer's text; chunked transfer leaves the events' lines whole."""
    if not is_stream:
        return str(reply.json()["choices"][0]["text"])
    events = re.findall(rb"data: (\{.*\})", reply.body)
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


async def run(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """All requests; the figures."""
    before = await monitor(server)
    expected = {p: text_of(await exchange(server, "POST", PATH, body(p, False)), False) for p in PROMPTS}
    statuses: Counter[int] = Counter()
    wrong: list[str] = []
    memory: list[tuple[int, int]] = []
    times = [(await exchange(server, "POST", PATH, body(p, True))).seconds for p in PROMPTS]
    numbers = iter(range(options.requests))

    async def client(seed: int) -> None:
        generator = random.Random(seed)
        for number in numbers:
            prompt, is_stream = generator.choice(PROMPTS), generator.random() < 0.5
            leaves = generator.random() < options.leave
            # Before the time that an answer takes now, so that nearly all of them leave in the middle.
            span_s = percentile(times[-64:], 0.5)
            leave_after_s = generator.uniform(0.0001, span_s) if leaves else None
            reply = await exchange(server, "POST", PATH, body(prompt, is_stream), leave_after_s)
            left = leaves and reply.status == 0
            statuses[-1 if left else reply.status] += 1
            if not left:
                times.append(reply.seconds)
                if reply.status != 200 or text_of(reply, is_stream) != expected[prompt]:
                    wrong.append(f"{reply.status} {reply.body[:200]!r}")
            if number % 200 == 0 and number >= WARM_UP * options.requests:
                memory.append((number, server.anonymous_bytes()))

    await asyncio.gather(*(client(options.seed * 1000 + i) for i in range(options.concurrency)))
    after = await _idle(server)
    points = np.array(memory, float)
    slope = float(np.polyfit(points[:, 0], points[:, 1], 1)[0]) if len(points) > 2 else None
    return {
        "requests": options.requests,
        "left": statuses.pop(-1, 0),
        "statuses": dict(sorted(statuses.items())),
        "wrong_answers": len(wrong),
        "first_wrong": wrong[:3],
        "free_kv_blocks_before": before["free_kv_blocks"],
        "free_kv_blocks_after": after["free_kv_blocks"],
        "memory_slope_bytes_a_request": None if slope is None else round(slope, 1),
        "p50_s": round(percentile(times, 0.5), 4),
        "p99_s": round(percentile(times, 0.99), 4),
    }


async def _idle(server: Server) -> dict[str, Any]:
    """The state once nothing runs: a client that left is noticed within a step."""
    for _ in range(500):
        state = await monitor(server)
        if not state["num_running"] and not state["num_waiting"]:
            break
        await asyncio.sleep(0.01)
    return state


def main() -> None:
    """Run it, and print one JSON line; status 1 where something was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--leave", type=float, default=0.34, help="who try; some are answered first")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    with serving("--threads", "1") as server:
        figures = asyncio.run(run(server, options))
    figures["seconds"] = round(time.perf_counter() - began, 1)
    print(json.dumps(figures))
    blocks = figures["free_kv_blocks_before"] == figures["free_kv_blocks_after"]
    raise SystemExit(bool(figures["wrong_answers"]) or not blocks)


if __name__ == "__main__":
    main()
