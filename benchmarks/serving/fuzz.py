"""Damaged, odd and hostile bodies: the answer is 4xx, or 200 where a body happens to be good, and never 5xx.

    python benchmarks/serving/fuzz.py [--bodies 200000] [--described 4000] [--seed 0]

`--described` bodies are made by schemathesis from /openapi.json, good and bad; the rest are raw: good bodies
with bytes or values changed, and the attacks in ATTACKS.
"""

from __future__ import annotations

import argparse
import copy
import http.client
import json
import random
import threading
import time
from collections import Counter
from typing import Any

from harness import Server, serving

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
GOOD: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"model": "tiny", "messages": HELLO, "max_tokens": 1, "stop": ["x"], "logit_bias": {"3": 1}, "n": 1},
        {
            "model": "tiny",
            "messages": HELLO,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 2,
            "stream": True,
        },
        {"model": "tiny", "messages": HELLO, "max_tokens": 1, "tools": [TOOL], "tool_choice": "auto"},
        {
            "model": "tiny",
            "messages": HELLO,
            "max_tokens": 1,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        },
    ],
    "/v1/completions": [
        {"model": "tiny", "prompt": "hello", "max_tokens": 1, "echo": True, "logprobs": 1, "seed": 1},
        {
            "model": "tiny",
            "prompt": [[1, 2], [3]],
            "max_tokens": 1,
            "bits": {"min": 2, "max": 4},
            "top_p": 0.5,
        },
        {
            "model": "tiny",
            "prompt": "a",
            "max_tokens": 1,
            "deadline_ms": 10,
            "on_miss": "truncate",
            "priority": 1,
        },
    ],
    "/v1/responses": [{"model": "tiny", "input": [{"role": "user", "content": "x"}], "max_output_tokens": 1}],
}
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**40, 1e308, -0.0, 0.5, "", "x", "\u0000",
    "\U0010ffff", "x" * 5000, [], {}, [[]], [None], [[[[[[]]]]]], {"type": "x"}, {"min": 9}, {"": ""},
]  # fmt: skip
ATTACKS = [
    b"[" * 100_000,
    b'{"a":' * 30_000,
    b"\xff" * 100,
    b'{"model":"tiny","prompt":"\\ud800","max_tokens":1}',
    b'{"model":"tiny","prompt":"x","seed":' + b"9" * 100_000 + b"}",
    b'{"model":"tiny","prompt":"x","temperature":NaN}',
    b'{"model":"tiny","prompt":"x","temperature":1e999}',
    b'{"model":"tiny","model":"tiny","prompt":"x","max_tokens":1}',
    b'{"model":"../../etc/passwd","prompt":"x"}',
    b'{"model":"tiny","prompt":"' + b"a" * 500_000 + b'"}',
    b'{"model":"tiny","prompt":' + json.dumps(list(range(100_000))).encode() + b"}",
    json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "{{ ''.__class__ }}"}], "n": 10**9}
    ).encode(),
]


def raw_body(generator: random.Random, path: str) -> bytes:
    """One body of the raw kind."""
    kind = generator.random()
    if kind < 0.01:
        return generator.choice(ATTACKS)
    body = json.loads(json.dumps(generator.choice(GOOD[path])))
    if kind < 0.5:
        for _ in range(generator.randint(1, 3)):
            _change(generator, body)
        return json.dumps(body).encode("utf-8", "surrogatepass")
    text = bytearray(json.dumps(body).encode())
    for _ in range(generator.randint(1, 6)):
        at = generator.randrange(len(text))
        text[at : at + generator.randint(0, 4)] = generator.randbytes(generator.randint(0, 4))
    return bytes(text)


def _change(generator: random.Random, place: Any) -> None:
    """Set, add or remove something somewhere in a tree."""
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = generator.choice(keys)
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and generator.random() < 0.6:
            place = inner
            continue
        choice = generator.random()
        if choice < 0.2:
            del place[key]
        elif choice < 0.35 and isinstance(place, dict):
            name = generator.choice(["x", "type", "role", "schema", "$ref", "user", ""])
            place[name] = copy.deepcopy(generator.choice(VALUES))  # a later change may reach into it
        else:
            place[key] = copy.deepcopy(generator.choice(VALUES))
        return


class Tally:
    """Statuses, the slowest answer, and bodies that were answered with 5xx or not at all."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.slowest_s = 0.0
        self.failed: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def add(self, path: str, body: bytes, status: int, seconds: float) -> None:
        with self._lock:
            self.statuses[status] += 1
            self.slowest_s = max(self.slowest_s, seconds)
            if status >= 500 or status == 0:
                self.failed.append((path, body[:300].decode("latin-1")))


def send_raw(server: Server, number: int, seed: int, tally: Tally) -> None:
    """So many raw bodies over one connection that is kept."""
    generator = random.Random(seed)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Content-Type": "application/json", "Host": "localhost"}
    for _ in range(number):
        path = generator.choice(list(GOOD))
        body = raw_body(generator, path)
        began = time.perf_counter()
        try:
            connection.request("POST", path, body, headers)
            reply = connection.getresponse()
            reply.read()
            status = reply.status
        except (OSError, http.client.HTTPException):
            connection.close()
            status = 0
        tally.add(path, body, status, time.perf_counter() - began)


def send_described(server: Server, number: int, seed: int, tally: Tally) -> None:
    """So many bodies that schemathesis makes from the description, a third for each route."""
    import hypothesis
    import schemathesis
    from schemathesis import GenerationMode

    url = f"http://localhost:{server.port}"
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    settings = hypothesis.settings(
        max_examples=max(1, number // 3),
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    for path in GOOD:
        operation = schema[path]["POST"]
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
        cases = [operation.as_strategy(generation_mode=mode) for mode in modes]

        @hypothesis.seed(seed)
        @settings
        @hypothesis.given(hypothesis.strategies.one_of(cases))
        def send(case: Any) -> None:
            began = time.perf_counter()
            reply = case.call(base_url=url)
            tally.add(case.path, repr(case.body).encode(), reply.status_code, time.perf_counter() - began)

        send()


def main() -> None:
    """Run it, and print one JSON line; status 1 where a body was answered with 5xx or not at all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bodies", type=int, default=200_000)
    parser.add_argument("--described", type=int, default=4_000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tally = Tally()
    began = time.perf_counter()
    with serving("--threads", "1") as server:
        if options.described:
            send_described(server, options.described, options.seed, tally)
        rest = max(0, options.bodies - sum(tally.statuses.values()))
        share = -(-rest // options.threads)
        threads = [
            threading.Thread(target=send_raw, args=(server, share, options.seed * 1000 + i, tally))
            for i in range(options.threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        is_alive = server.process.poll() is None
    for path, body in tally.failed[:20]:
        print("failed:", path, body)
    print(
        json.dumps(
            {
                "bodies": sum(tally.statuses.values()),
                "statuses": dict(sorted(tally.statuses.items())),
                "failed": len(tally.failed),
                "server_alive": is_alive,
                "slowest_s": round(tally.slowest_s, 3),
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    )
    raise SystemExit(bool(tally.failed) or not is_alive)


if __name__ == "__main__":
    main()
