"""Load of several times what the server can do: a bounded queue, and a refusal within 50 ms.

    python benchmarks/serving/overload.py [--times 5] [--seconds 20] [--model FILE]

First as many clients as the queue holds ask without pause, which gives the capacity; then requests arrive by
a Poisson process at `--times` that rate, whatever becomes of the earlier ones.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import time
from typing import Any

from harness import Reply, Server, exchange, monitor, percentile, serving

from taper.engine import embedded_model

PATH = "/v1/completions"


def body(tokens: int) -> bytes:
    """A greedy request."""
    fields = {"model": "tiny", "prompt": "hello", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return json.dumps(fields).encode()


async def capacity(server: Server, seconds: float, clients: int, sent: bytes) -> float:
    """Requests a second of clients that ask again as soon as they are answered."""
    done = 0
    end = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < end:
            reply = await exchange(server, "POST", PATH, sent)
            done += reply.status == 200  # not one line: the old count would be read before the wait

    await asyncio.gather(*(client() for _ in range(clients)))
    return done / seconds


async def overload(server: Server, rate: float, seconds: float, sent: bytes, seed: int) -> dict[str, Any]:
    """Open-loop arrivals; what became of them."""
    generator = random.Random(seed)
    replies: list[asyncio.Task[Reply]] = []
    waiting: list[int] = []
    memory = [server.anonymous_bytes()]
    began = time.perf_counter()
    next_s = 0.0
    while next_s < seconds:
        await asyncio.sleep(max(0.0, began + next_s - time.perf_counter()))
        replies.append(asyncio.create_task(exchange(server, "POST", PATH, sent)))
        if len(replies) % 100 == 0:
            waiting.append((await monitor(server))["num_waiting"])
            memory.append(server.anonymous_bytes())
        next_s += generator.expovariate(rate)
    done = await asyncio.gather(*replies)
    refused = [reply.seconds for reply in done if reply.status == 429]
    served = [reply.seconds for reply in done if reply.status == 200]
    return {
        "sent": len(done),
        "served": len(served),
        "refused": len(refused),
        "other": sorted({reply.status for reply in done} - {200, 429}),
        "retry_after_on_all": all(b"retry-after" in r.headers.lower() for r in done if r.status == 429),
        "refused_p50_ms": round(1e3 * percentile(refused, 0.5), 2),
        "refused_p99_ms": round(1e3 * percentile(refused, 0.99), 2),
        "refused_max_ms": round(1e3 * max(refused, default=0), 2),
        "served_p50_ms": round(1e3 * percentile(served, 0.5), 2),
        "served_p99_ms": round(1e3 * percentile(served, 0.99), 2),
        "most_waiting": max(waiting, default=0),
        "memory_growth_bytes": max(memory) - memory[0],
    }


def main() -> None:
    """Run it, and print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=float, default=5)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--queue", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--model", default=str(embedded_model()), help="default: the one in the package")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    gc.disable()  # a collection here would be measured as a server that is late
    sent = body(options.tokens)
    with serving("--threads", "1", "--max-queue", str(options.queue), model=options.model) as server:
        rate = asyncio.run(capacity(server, min(5.0, options.seconds), options.queue, sent))
        figures = asyncio.run(overload(server, options.times * rate, options.seconds, sent, options.seed))
    print(json.dumps({"capacity_per_s": round(rate, 1), "times": options.times, **figures}))
    raise SystemExit(bool(figures["other"]))


if __name__ == "__main__":
    main()
