"""Decode throughput of several clients at once over that of one, through the server.

    python benchmarks/serving/batch.py [--model FILE] [--clients 8] [--tokens 64] [--bits 4] [--rounds 5]

A 1.1 B model of random weights: python -m taper.testing.random_model --out FILE --shape 1.1b --bits 2-4.
One client and all clients take turns; a client's tokens are counted from its first token's event to its last.
The ratio is of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time

from harness import Server, serving


async def client(server: Server, options: argparse.Namespace, seed: int) -> tuple[float, float, int]:
    """Times of the first and the last event, and the tokens between them."""
    fields = {"model": "tiny", "prompt": [5 + seed, 6, 7, 8], "max_tokens": options.tokens, "seed": seed}
    body = json.dumps({**fields, "ignore_eos": True, "bits": options.bits, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    times = []
    async for line in reader:
        # Not text, of which a random model may give none; a token has bits.
        if line.startswith(b"data: {") and json.loads(line[6:]).get("taper", {}).get("bits") is not None:
            times.append(time.perf_counter())
    writer.close()
    return times[0], times[-1], len(times) - 1


async def tokens_per_s(server: Server, options: argparse.Namespace, clients: int) -> float:
    """All clients together, while all of them decode."""
    found = await asyncio.gather(*(client(server, options, seed) for seed in range(clients)))
    begin, end = min(one[0] for one in found), max(one[1] for one in found)
    return sum(one[2] for one in found) / (end - begin)


async def rounds(server: Server, options: argparse.Namespace) -> dict[str, object]:
    """One client and all of them in turns, after a warm-up."""
    await tokens_per_s(server, options, options.clients)
    one, many = [], []
    for _ in range(options.rounds):
        one.append(await tokens_per_s(server, options, 1))
        many.append(await tokens_per_s(server, options, options.clients))
    return {
        "clients": options.clients,
        "bits": options.bits,
        "one_tokens_per_s": statistics.median(one),
        "all_tokens_per_s": statistics.median(many),
        "ratio": statistics.median(many) / statistics.median(one),
        "ratios": [round(many_ / one_, 2) for one_, many_ in zip(one, many, strict=True)],
    }


def main() -> None:
    """Serve, measure, print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: a tiny random one")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with serving(model=options.model) as server:
        print(json.dumps(asyncio.run(rounds(server, options))))


if __name__ == "__main__":
    main()
