"""kill -9 of Ray replicas under load: every client gets its answer or an error that says to ask again.

    python benchmarks/serving/ray_kill.py [--kills 10] [--clients 8] [--replicas 2] [--signal KILL]

Clients of `taper serve --ray` ask without pause, every other request as a stream. Every few seconds a replica
that has work is killed, or stopped with `--signal STOP`, where nothing but silence tells that it is gone. The
last line is JSON; the exit status is 1 where a client hung, or got another error or another text than
that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from harness import Reply, Server, exchange, monitor, percentile, serving

from taper.engine import embedded_model

PATH = "/v1/completions"
HANG_S = 60.0  # three tries of 10 s of silence, and the answer
STOPPED_S = 25.0
REPLACED_S = 60.0


@dataclass
class Seen:
    """What the clients got."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    first_others: list[str] = field(default_factory=list)


def body(number: int, tokens: int) -> bytes:
    """A request that has one right answer; every other one is a stream."""
    fields = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": tokens, "seed": number % 4}
    return json.dumps({**fields, "ignore_eos": True, "stream": number % 2 == 1}).encode()


def text_of(reply: Reply) -> str | None:
    """The whole text; None where the reply is no whole answer."""
    if reply.status != 200:
        return None
    if not reply.body.startswith(b"data: "):
        return str(reply.json()["choices"][0]["text"])
    events = [line[6:] for line in reply.body.split(b"\n\n") if line]
    if events[-1] != b"[DONE]":
        return None
    return "".join(json.loads(one)["choices"][0]["text"] for one in events[:-1])


def kind_of(reply: Reply) -> str:
    """answered, retryable, retryable_in_stream, hang or other."""
    if text_of(reply) is not None:
        return "answered"
    if reply.status == 0 and reply.seconds >= HANG_S:
        return "hang"
    if reply.status == 503 and b"retry-after:" in reply.headers.lower():
        return "retryable" if set(reply.json()["error"]) == {"message", "type", "param", "code"} else "other"
    if reply.status == 200 and b'"code":"replica_lost"' in reply.body.split(b"\n\n")[-2]:
        return "retryable_in_stream"
    return "other"


async def client(server: Server, first: int, options: argparse.Namespace, end_s: float, seen: Seen) -> None:
    """Ask until the end."""
    number = first
    while time.perf_counter() < end_s:
        reply = await ask(server, body(number, options.tokens))
        kind = kind_of(reply)
        if kind == "answered" and text_of(reply) != options.right[number % 4]:
            kind = "wrong"
        seen.outcomes[kind] += 1
        seen.seconds.append(reply.seconds)
        if kind in ("other", "wrong"):
            seen.first_others.append(f"{reply.status} {reply.body[:300]!r}")
        number += options.clients


async def ask(server: Server, sent: bytes) -> Reply:
    """One request; its chunks put together."""
    reply = await exchange(server, "POST", PATH, sent, HANG_S)
    if b"transfer-encoding: chunked" not in reply.headers.lower():
        return reply
    whole, rest = b"", reply.body
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        whole, rest = whole + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return Reply(reply.status, reply.seconds, whole, reply.headers)


async def kill(server: Server, options: argparse.Namespace, downs: list[float]) -> None:
    """Kill one replica after the other, each when all are there again."""
    for _ in range(options.kills):
        await asyncio.sleep(options.every)
        working = []
        while not working:
            replicas = (await monitor(server))["replicas"]
            working = [one["pid"] for one in replicas if one["num_running"]]
            await asyncio.sleep(0.02)
        os.kill(working[0], getattr(signal, f"SIG{options.signal}"))
        began = time.perf_counter()
        if options.signal == "STOP":  # Ray cannot end a stopped process, and its CPU stays taken
            await asyncio.sleep(STOPPED_S)
            os.kill(working[0], signal.SIGKILL)
        pids = {working[0]}
        while working[0] in pids or len(pids) < options.replicas:
            await asyncio.sleep(0.1)
            pids = {one["pid"] for one in (await monitor(server))["replicas"]}
            if time.perf_counter() - began > REPLACED_S:
                raise TimeoutError(f"no new replica within {REPLACED_S:g} s")
        downs.append(time.perf_counter() - began)


async def run(server: Server, options: argparse.Namespace) -> dict[str, object]:
    """The figures."""
    options.right = [text_of(await ask(server, body(seed, options.tokens))) for seed in range(4)]
    seen, downs = Seen(), list[float]()
    killing = asyncio.create_task(kill(server, options, downs))
    # The clients go on for as long as replicas die, and a while after it.
    rounds = 0
    while not killing.done() or rounds < 2:
        rounds += killing.done()
        end_s = time.perf_counter() + 3
        await asyncio.gather(*(client(server, n, options, end_s, seen) for n in range(options.clients)))
    await killing
    return {
        "signal": options.signal,
        "kills": len(downs),
        "clients": options.clients,
        "replicas": options.replicas,
        "requests": sum(seen.outcomes.values()),
        **{kind: seen.outcomes[kind] for kind in ("answered", "retryable", "retryable_in_stream")},
        "hangs": seen.outcomes["hang"],
        "other_errors": seen.outcomes["other"],
        "wrong_answers": seen.outcomes["wrong"],
        "first_others": seen.first_others[:3],
        "p50_s": round(percentile(seen.seconds, 0.5), 3),
        "longest_s": round(max(seen.seconds), 3),
        "longest_until_replaced_s": round(max(downs), 1),
    }


def main() -> None:
    """Run it, and print one JSON line; status 1 where a client did not get what it must."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between a recovery and a kill")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--signal", choices=("KILL", "STOP"), default="KILL")
    parser.add_argument("--model", default=str(embedded_model()))
    options = parser.parse_args()
    arguments = ("--ray", "--replicas", str(options.replicas), "--threads", "1")
    with serving(*arguments, model=options.model) as server:
        figures = asyncio.run(run(server, options))
    print(json.dumps(figures))
    raise SystemExit(bool(figures["hangs"] or figures["other_errors"] or figures["wrong_answers"]))


if __name__ == "__main__":
    main()
