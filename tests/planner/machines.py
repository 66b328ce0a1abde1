"""A machine, traces and views for the planner's tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from taper.engine.schedule import EngineState, SequenceView, Terms
from taper.planner.simulator import Machine
from taper.planner.traces import TracedRequest

WIDTHS = (2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Linear:
    """1 ms for each 2 bits, 0.1 ms a row, 1 us for 10 entries: easy to reckon with; `speed` times as fast."""

    speed: float = 1.0

    def seconds(self, bits: float, decode_tokens: int, prefill_tokens: int, context_tokens: int) -> float:
        rows = decode_tokens + prefill_tokens
        return (5e-4 * bits + 1e-4 * rows + 1e-7 * context_tokens) / self.speed if rows else 0.0


MACHINE = Machine(Linear(), WIDTHS, kv_blocks=64, block_tokens=16, max_batch=8, max_step_tokens=64)


def view(number: int, deadline_s: float = inf, **changes: object) -> SequenceView:
    values: dict[str, object] = {
        "arrival_s": 0.0,
        "priority": 0,
        "min_bits": 0.0,
        "max_bits": inf,
        "on_miss": "reject",
        "prompt_tokens": 16,
        "num_prefilled": 0,
        "num_generated": 0,
        "max_tokens": 10,
        "expected_tokens": 10,
        "is_running": False,
    }
    return SequenceView(id=number, deadline_s=deadline_s, **(values | changes))  # type: ignore[arg-type]


def decoding(number: int, generated: int = 1, **changes: object) -> SequenceView:
    return view(number, num_prefilled=16, num_generated=generated, is_running=True, **changes)  # type: ignore[arg-type]


def state(
    waiting: Sequence[SequenceView] = (), running: Sequence[SequenceView] = (), **changes: int
) -> EngineState:
    values = {
        "kv_blocks": 64,
        "free_kv_blocks": 64,
        "block_tokens": 16,
        "max_batch": 8,
        "max_step_tokens": 64,
    }
    return EngineState(tuple(waiting), tuple(running), WIDTHS, step_time=Linear(), **(values | changes))


def random_trace(seed: int, rate: float, count: int = 120) -> list[TracedRequest]:
    generator = np.random.default_rng(seed)
    found, now = [], 0.0
    for _ in range(count):
        now += float(generator.exponential(1 / rate))
        limit = int(generator.integers(2, 40))
        terms = Terms(
            deadline_s=float(generator.choice([0.02, 0.1, 0.5, 3.0])),
            min_bits=float(generator.choice([0, 3, 4, 8])),
            priority=int(generator.integers(0, 2)),
            on_miss=generator.choice(["reject", "truncate"]),
        )
        prompt = int(generator.integers(1, 60))
        found.append(TracedRequest(now, prompt, int(generator.integers(1, limit + 1)), limit, terms))
    return found
