"""What a scheduler of the batch engine sees and says: plain values, no clock, no arrays."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Terms:
    """What a client asks for beside the text.

    Attributes:
        deadline_s: seconds from submission to the last token.
        priority: larger is served first among equals.
        min_bits: quality floor of the passes; 0: the model's least width.
        max_bits: more is not wanted.
        on_miss: what becomes of a request that cannot make its deadline.
    """

    deadline_s: float = inf
    priority: int = 0
    min_bits: float = 0
    max_bits: float = inf
    on_miss: Literal["lower_bits", "truncate", "reject"] = "reject"


@dataclass(slots=True, eq=False)
class SequenceView:
    """A request as a scheduler sees it; times are absolute seconds of one monotonic clock.

    The engine keeps one for each request up to date: making 32 anew for every pass took 80 us. A scheduler
    must not write to it.

    Attributes:
        expected_tokens: bound on the output for planning, at most max_tokens.
        is_running: it holds KV blocks.
    """

    id: int
    arrival_s: float
    deadline_s: float
    priority: int
    min_bits: float
    max_bits: float
    on_miss: str
    prompt_tokens: int
    num_prefilled: int
    num_generated: int
    max_tokens: int
    expected_tokens: int
    is_running: bool


class StepTime(Protocol):
    """The time of a pass."""

    def seconds(self, bits: float, decode_tokens: int, prefill_tokens: int, context_tokens: int) -> float:
        """Seconds; context_tokens is the sum over the rows of the entries that they see."""
        ...


@dataclass(frozen=True, slots=True)
class EngineState:
    """Everything that a decision may depend on beside the time.

    Attributes:
        waiting: in order of arrival, preempted ones among them.
        running: hold KV blocks.
        widths: bits that the model can be read at now, rising.
        max_batch: sequences that run at once.
        max_step_tokens: rows of one pass.
    """

    waiting: tuple[SequenceView, ...]
    running: tuple[SequenceView, ...]
    widths: tuple[float, ...]
    kv_blocks: int
    free_kv_blocks: int
    block_tokens: int
    max_batch: int
    max_step_tokens: int
    step_time: StepTime


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The next pass.

    Attributes:
        bits: of the pass, at least every member's floor.
        prefill: (id, prompt tokens to run now).
        decode: ids.
        preempt: ids that give their KV blocks back and wait again.
        refuse: waiting ones that are refused, with the reason.
        finish: running ones that end now.
    """

    bits: float = 0
    prefill: tuple[tuple[int, int], ...] = ()
    decode: tuple[int, ...] = ()
    preempt: tuple[int, ...] = ()
    refuse: tuple[tuple[int, str], ...] = ()
    finish: tuple[int, ...] = ()


class Scheduler(Protocol):
    """Decides what each pass does."""

    def schedule(self, now_s: float, state: EngineState) -> StepPlan:
        """The next pass; empty when there is nothing to run."""
        ...

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Learn the time that a pass took."""
        ...

    def admit(self, now_s: float, state: EngineState, new: SequenceView) -> str | None:
        """Reason to refuse a new request at once, or None."""
        ...
