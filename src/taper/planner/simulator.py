"""A fast simulator of the batch engine: any scheduler on a virtual clock, passes of fitted time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from taper.engine.schedule import EngineState, Scheduler, SequenceView, StepPlan, StepTime
from taper.errors import TaperError
from taper.planner.traces import TracedRequest


@dataclass(frozen=True, slots=True)
class Machine:
    """What the engine has.

    Attributes:
        step_time: seconds of a pass.
        widths: bits that the model can be read at, rising.
        kv_blocks, block_tokens: of the KV cache.
        max_batch: sequences that run at once.
        max_step_tokens: rows of one pass.
        noise: standard deviation of the logarithm of a pass's time around the fitted one; 0: exact.
    """

    step_time: StepTime
    widths: tuple[float, ...]
    kv_blocks: int = 4096
    block_tokens: int = 64
    max_batch: int = 32
    max_step_tokens: int = 128
    noise: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What became of a request.

    Attributes:
        finished_s: time of the last token, None when it was refused.
        generated: tokens it got.
        reason: why it was refused.
        min_bits: the fewest bits that a pass of it was read at.
        met: it was served whole, by its deadline, never below its floor.
        started: it ran in at least one pass.
        late_start: its first pass began after its deadline.
    """

    finished_s: float | None = None
    generated: int = 0
    reason: str = ""
    min_bits: float = float("inf")
    met: bool = False
    started: bool = False
    late_start: bool = False


@dataclass(slots=True)
class SimulationResult:
    """Of a run.

    Attributes:
        outcomes: of each request of the trace.
        seconds: from the first arrival to the last event.
        span_s: from the first arrival to the last arrival.
        passes: that were run.
        busy_s: seconds of them.
        planner_s: seconds that the scheduler took on this machine's clock, all calls.
        bits: tokens by the bits of their pass.
        floor_violations: requests with a pass below their floor.
        violations: requests that were served, but late or cut short.
    """

    outcomes: list[Outcome]
    seconds: float = 0.0
    span_s: float = 0.0
    passes: int = 0
    busy_s: float = 0.0
    planner_s: float = 0.0
    bits: Counter[float] = field(default_factory=Counter)
    floor_violations: int = 0

    @property
    def met(self) -> int:
        """Requests that met deadline and floor."""
        return sum(outcome.met for outcome in self.outcomes)

    @property
    def admitted(self) -> int:
        """Requests that ran."""
        return sum(outcome.started for outcome in self.outcomes)

    @property
    def refused(self) -> int:
        """Requests that never ran."""
        return len(self.outcomes) - self.admitted

    @property
    def violations(self) -> int:
        """Requests that ran and did not meet deadline and floor."""
        return sum(outcome.started and not outcome.met for outcome in self.outcomes)

    @property
    def goodput(self) -> float:
        """Requests that met deadline and floor, for each second in which requests came.

        Policies that serve what arrived last, or what is long, end later: over the time to the last event
        they would be worse off for it. Where all came at once that time counts.
        """
        seconds = self.span_s or self.seconds
        return self.met / seconds if seconds else 0.0


class InvalidPlanError(TaperError):
    """A scheduler asked for what the engine cannot do."""


def simulate(
    scheduler: Scheduler, trace: Sequence[TracedRequest], machine: Machine, seed: int = 0
) -> SimulationResult:
    """Run a trace to its end.

    A sequence's first token comes with the pass that ends its prompt, every other with a pass of its own. KV
    blocks are taken as entries are written. The clock stands still while the scheduler thinks; what that
    takes is in `planner_s`.

    Args:
        scheduler: fresh, or with what it learned.
        trace: in order of arrival.
        machine: what to run on.
        seed: of the noise.

    Raises:
        InvalidPlanError: for a plan beyond blocks, rows or batch, or about requests that are not there.
    """
    run = _Run(scheduler, trace, machine, seed)
    while run.step():
        pass
    return run.result


class _Run:
    def __init__(
        self, scheduler: Scheduler, trace: Sequence[TracedRequest], machine: Machine, seed: int
    ) -> None:
        self._scheduler, self._trace, self._machine = scheduler, trace, machine
        self._generator = np.random.default_rng(seed)
        self._now = trace[0].arrival_s if trace else 0.0
        self._begin, self._next = self._now, 0
        self._waiting: dict[int, SequenceView] = {}
        self._running: dict[int, SequenceView] = {}
        self._used = 0
        self.result = SimulationResult([Outcome() for _ in trace])
        if trace:
            self.result.span_s = trace[-1].arrival_s - trace[0].arrival_s

    def step(self) -> bool:
        """One arrival or pass. Returns whether anything is left to do."""
        self._arrive()
        if not (self._waiting or self._running):
            if self._next == len(self._trace):
                return False
            self._now = self._trace[self._next].arrival_s
            return True
        state = self._state()
        begin = time.perf_counter()
        plan = self._scheduler.schedule(self._now, state)
        self.result.planner_s += time.perf_counter() - begin
        self._remove(plan)
        if not (plan.prefill or plan.decode):
            return self._idle(bool(plan.refuse or plan.finish or plan.preempt))
        seconds = self._pass(plan)
        begin = time.perf_counter()
        self._scheduler.observe(plan, seconds)
        self.result.planner_s += time.perf_counter() - begin
        return True

    def _arrive(self) -> None:
        while self._next < len(self._trace) and self._trace[self._next].arrival_s <= self._now:
            request, number = self._trace[self._next], self._next
            self._next += 1
            terms = request.terms
            view = SequenceView(
                id=number,
                arrival_s=request.arrival_s,
                deadline_s=request.arrival_s + terms.deadline_s,
                priority=terms.priority,
                min_bits=terms.min_bits,
                max_bits=terms.max_bits,
                on_miss=terms.on_miss,
                prompt_tokens=request.prompt_tokens,
                num_prefilled=0,
                num_generated=0,
                max_tokens=request.max_tokens,
                expected_tokens=request.max_tokens,
                is_running=False,
            )
            state = self._state()
            begin = time.perf_counter()
            reason = self._scheduler.admit(self._now, state, view)
            self.result.planner_s += time.perf_counter() - begin
            if reason is None:
                self._waiting[number] = view
            else:
                self.result.outcomes[number].reason = reason

    def _state(self) -> EngineState:
        machine = self._machine
        return EngineState(
            waiting=tuple(self._waiting.values()),
            running=tuple(self._running.values()),
            widths=machine.widths,
            kv_blocks=machine.kv_blocks,
            free_kv_blocks=machine.kv_blocks - self._used,
            block_tokens=machine.block_tokens,
            max_batch=machine.max_batch,
            max_step_tokens=machine.max_step_tokens,
            step_time=machine.step_time,
        )

    def _idle(self, has_moved: bool) -> bool:
        """Nothing to run: on to the next arrival, or the end when nobody else comes."""
        if has_moved:
            return True
        if self._next < len(self._trace):
            self._now = max(self._now, self._trace[self._next].arrival_s)
            return True
        for number in self._waiting:
            self.result.outcomes[number].reason = "never scheduled"
        if self._running:
            raise InvalidPlanError("running sequences are left and nothing is planned")
        return False

    def _remove(self, plan: StepPlan) -> None:
        for number, reason in plan.refuse:
            self._take(self._waiting, number)
            self.result.outcomes[number].reason = reason
        for number in plan.finish:
            self._end(self._take(self._running, number))
        for number in plan.preempt:
            view = self._take(self._running, number)
            self._used -= self._blocks(view)
            self._waiting[number] = replace(view, num_prefilled=0, is_running=False)

    def _pass(self, plan: StepPlan) -> float:
        machine, views = self._machine, []
        prefill = decode = context = 0
        for number, count in plan.prefill:
            view = self._running.get(number) or self._take(self._waiting, number)
            if not 0 < count <= self._unread(view):
                raise InvalidPlanError(
                    f"{count} prompt tokens of request {number}, {self._unread(view)} are left"
                )
            prefill += count
            context += count * view.num_prefilled + count * (count + 1) // 2
            views.append((view, count))
        for number in plan.decode:
            view = self._running[number]
            if self._unread(view):
                raise InvalidPlanError(f"request {number} decodes before its prompt is read")
            decode += 1
            context += view.num_prefilled + 1
            views.append((view, 0))
        self._check(plan, prefill + decode, views)
        seconds = machine.step_time.seconds(plan.bits, decode, prefill, context)
        if machine.noise:
            seconds *= float(np.exp(self._generator.normal(0.0, machine.noise)))
        begin, self._now = self._now, self._now + seconds
        self.result.passes += 1
        self.result.busy_s += seconds
        for view, count in views:
            self._advance(view, count, plan.bits, begin)
        if self._used > machine.kv_blocks:
            raise InvalidPlanError(f"{self._used} KV blocks are needed, there are {machine.kv_blocks}")
        return seconds

    def _check(self, plan: StepPlan, rows: int, views: Sequence[tuple[SequenceView, int]]) -> None:
        machine, ids = self._machine, {view.id for view, _ in views}
        if len(ids) < len(views):
            raise InvalidPlanError("a request is twice in a pass")
        if rows > machine.max_step_tokens or len(ids | self._running.keys()) > machine.max_batch:
            raise InvalidPlanError(f"{rows} rows of {len(ids | self._running.keys())} sequences are too many")
        if plan.bits not in machine.widths:
            raise InvalidPlanError(f"no width of {plan.bits} bits")

    def _advance(self, view: SequenceView, count: int, bits: float, begin_s: float) -> None:
        outcome = self.result.outcomes[view.id]
        if not outcome.started:
            outcome.started, outcome.late_start = True, begin_s > view.deadline_s
        outcome.min_bits = min(outcome.min_bits, bits)
        before = self._blocks(view) if view.is_running else 0
        prefilled = view.num_prefilled + (count or 1)
        is_token = count == 0 or prefilled == view.prompt_tokens + view.num_generated
        moved = replace(
            view,
            num_prefilled=prefilled,
            num_generated=view.num_generated + is_token,
            is_running=True,
        )
        self._used += self._blocks(moved) - before
        self.result.bits[bits] += is_token
        if moved.num_generated >= self._trace[view.id].output_tokens:
            self._running.pop(view.id, None)
            self._end(moved)
        else:
            self._running[view.id] = moved

    def _end(self, view: SequenceView) -> None:
        self._used -= self._blocks(view)
        outcome, request = self.result.outcomes[view.id], self._trace[view.id]
        outcome.finished_s, outcome.generated = self._now, view.num_generated
        keeps_floor = outcome.min_bits >= view.min_bits
        self.result.floor_violations += not keeps_floor
        is_whole = view.num_generated >= request.output_tokens or view.on_miss == "truncate"
        outcome.met = keeps_floor and is_whole and self._now <= view.deadline_s
        self.result.seconds = self._now - self._begin

    @staticmethod
    def _unread(view: SequenceView) -> int:
        """Prompt tokens, and after a preemption generated ones, that are not in the cache yet."""
        if view.is_running and view.num_prefilled >= view.prompt_tokens + max(0, view.num_generated - 1):
            return 0
        return view.prompt_tokens + view.num_generated - view.num_prefilled

    def _blocks(self, view: SequenceView) -> int:
        return -(-view.num_prefilled // self._machine.block_tokens)

    @staticmethod
    def _take(group: dict[int, SequenceView], number: int) -> SequenceView:
        if number not in group:
            raise InvalidPlanError(f"request {number} is not there")
        return group.pop(number)
