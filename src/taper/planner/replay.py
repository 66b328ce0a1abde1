"""Traces on the real batch engine, in real time; the same results as the simulator's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np

from taper.engine import LLM
from taper.engine.batch import BatchEngine, BatchSizes, Member
from taper.engine.sampler import SampledToken, Sampler
from taper.engine.schedule import EngineState, Scheduler, SequenceView, StepPlan, StepTime
from taper.planner.least_squares import non_negative_least_squares
from taper.planner.simulator import Outcome, SimulationResult
from taper.planner.step_time import Measurement
from taper.planner.traces import TracedRequest


class EndsAfter:
    """A sampler whose answer has a given length, as the trace has it.

    Args:
        sampler: draws, so that it takes the time that it takes.
        count: tokens.
        end: id of the last one.
        filler: id in the place of an end that comes too early.
    """

    def __init__(self, sampler: Sampler, count: int, end: int, filler: int) -> None:
        self._sampler, self._left, self._end, self._filler = sampler, count, end, filler

    def sample(self, logits: np.typing.NDArray[np.float32]) -> SampledToken:
        """The next token."""
        token = self._sampler.sample(logits)
        self._left -= 1
        if self._left == 0:
            return SampledToken(self._end)
        return SampledToken(self._filler) if token.token_id == self._end else token


def replay(
    llm: LLM, scheduler: Scheduler, step_time: StepTime, trace: Sequence[TracedRequest], sizes: BatchSizes
) -> SimulationResult:
    """Run a trace on a fresh engine, each request when its time has come. Prompts are random tokens. It ends
    with the last deadline at the latest; what runs then was late.

    Args:
        llm: with a KV cache of planes.
        scheduler: fresh.
        step_time: what the scheduler is told of the machine.
        trace: in order of arrival.
        sizes: of the engine.
    """
    engine = BatchEngine(llm.engine, scheduler, step_time, sizes)
    generator = np.random.default_rng(0)
    end = llm.config.eos_token_ids[0]
    prepared = []
    for index, one in enumerate(trace):
        ids = generator.integers(end + 1, llm.config.vocab_size, one.prompt_tokens).tolist()
        request = llm.request(ids, policy=f"fixed:{llm.max_bits}", max_tokens=one.max_tokens, seed=index)
        sequence = engine.prepare(request)
        assert isinstance(sequence.sampler, Sampler)
        sequence.sampler = EndsAfter(sequence.sampler, one.output_tokens, end, end + 1)  # type: ignore[assignment]
        prepared.append(sequence)
    members: list[Member] = []
    last_s = max(one.arrival_s + one.terms.deadline_s for one in trace)
    begin = time.monotonic()
    while len(members) < len(trace) or engine.has_work:
        if time.monotonic() - begin > last_s:
            break  # nothing that is left can count
        now = time.monotonic() - begin
        while len(members) < len(trace) and trace[len(members)].arrival_s <= now:
            one = trace[len(members)]
            members.append(engine.submit(prepared[len(members)], one.terms, begin + one.arrival_s))
        if engine.has_work:
            engine.step()
        elif len(members) < len(trace):
            time.sleep(max(0.0, trace[len(members)].arrival_s - (time.monotonic() - begin)))
    for member in members:
        engine.cancel(member)
    outcomes = [_outcome(member, one, begin) for member, one in zip(members, trace, strict=True)]
    result = SimulationResult(outcomes, passes=engine.num_passes, busy_s=engine.passes_s)
    result.planner_s = engine.planner_s
    result.seconds = max((one.finished_s or 0.0 for one in outcomes), default=0.0) - trace[0].arrival_s
    result.span_s = trace[-1].arrival_s - trace[0].arrival_s
    for member in members:
        result.bits.update(member.sequence.bits)
    result.floor_violations = sum(
        outcome.started and outcome.min_bits < member.terms.min_bits
        for outcome, member in zip(outcomes, members, strict=True)
    )
    return result


def _outcome(member: Member, one: TracedRequest, begin: float) -> Outcome:
    bits, terms = member.sequence.bits, member.terms
    if member.started_s is None:
        return Outcome(reason=member.refused or str(member.error or "not served"))
    if member.finished_s is None:
        return Outcome(reason=str(member.error or "too late"), min_bits=min(bits, default=inf), started=True)
    finished = member.finished_s - begin
    deadline = one.arrival_s + terms.deadline_s
    is_whole = len(bits) >= one.output_tokens or terms.on_miss == "truncate"
    return Outcome(
        finished_s=finished,
        generated=len(bits),
        min_bits=min(bits),
        met=min(bits) >= terms.min_bits and is_whole and finished <= deadline,
        started=True,
        late_start=member.started_s - begin > deadline,
    )


@dataclass(slots=True)
class Recording:
    """A scheduler that notes what its passes were and took, all that is around them included.

    Attributes:
        inner: decides.
        passes: (bits, decoded rows, prompt rows, entries, seconds).
    """

    inner: Scheduler
    passes: list[Measurement] = field(default_factory=list)
    _began_s: float = 0.0
    _last: tuple[int, int, int] = (0, 0, 0)
    _clock: Callable[[], float] = time.perf_counter

    def admit(self, now_s: float, state: EngineState, new: SequenceView) -> str | None:
        """As the inner one."""
        return self.inner.admit(now_s, state, new)

    def schedule(self, now_s: float, state: EngineState) -> StepPlan:
        """As the inner one."""
        now = self._clock()
        if self.passes and self.passes[-1].seconds < 0:
            last = self.passes[-1]
            self.passes[-1] = Measurement(
                last.bits, last.decode_tokens, last.prefill_tokens, last.context_tokens, now - self._began_s
            )
        self._began_s = now
        plan = self.inner.schedule(now_s, state)
        views = {view.id: view for view in (*state.running, *state.waiting)}
        context = sum(views[number].num_prefilled + 1 for number in plan.decode)
        unread = 0
        for number, count in plan.prefill:
            unread += count
            context += count * views[number].num_prefilled + count * (count + 1) // 2
        if plan.decode or plan.prefill:
            self.passes.append(Measurement(plan.bits, len(plan.decode), unread, context, -1.0))
        return plan

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """As the inner one."""
        self.inner.observe(plan, seconds)


@dataclass(frozen=True, slots=True)
class WithHost:
    """Step times with what the engine does around a pass: sampling, text, planning.

    Attributes:
        inner: of the model's passes alone.
        factor: of its times while the rest of the machine does what it does.
        pass_s, row_s: seconds a pass and a decoded row.
    """

    inner: StepTime
    factor: float
    pass_s: float
    row_s: float

    def seconds(self, bits: float, decode_tokens: int, prefill_tokens: int, context_tokens: int) -> float:
        """Seconds of a pass; 0 for one without rows."""
        if decode_tokens + prefill_tokens == 0:
            return 0.0
        inner = self.inner.seconds(bits, decode_tokens, prefill_tokens, context_tokens)
        return self.factor * inner + self.pass_s + self.row_s * decode_tokens


def with_host(inner: StepTime, passes: Sequence[Measurement]) -> WithHost:
    """Fit what the engine adds to recorded passes, by non-negative least squares of the relative error."""
    whole = [one for one in passes if one.seconds > 0]
    seconds = np.array([one.seconds for one in whole])
    matrix = np.array(
        [
            [
                inner.seconds(one.bits, one.decode_tokens, one.prefill_tokens, one.context_tokens),
                1.0,
                float(one.decode_tokens),
            ]
            for one in whole
        ]
    )
    factor, pass_s, row_s = non_negative_least_squares(matrix / seconds[:, None], np.ones(len(whole)))
    return WithHost(inner, float(factor), float(pass_s), float(row_s))
