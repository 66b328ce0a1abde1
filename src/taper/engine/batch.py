"""The batch engine: sequences that share passes, planned anew before each of them by a scheduler.

What a sequence gets depends on the bits of its passes alone, never on who shares them: the kernels give
each row the bytes that a pass of its own would give it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from taper.engine.admission import Admission
from taper.engine.audit import run_audit
from taper.engine.completion import StepOutput
from taper.engine.engine import PREFILL_CHUNK_TOKENS, Engine
from taper.engine.model_runner import ModelRunner
from taper.engine.request import Request
from taper.engine.sampler import logit_features
from taper.engine.schedule import EngineState, Scheduler, SequenceView, StepPlan, StepTime, Terms
from taper.engine.sequence import Sequence
from taper.errors import DoesNotFitError, TaperError
from taper.kvcache import KvPool, PrefixCache
from taper.precision import Bits, Fixed, LayerBits, StepContext

LOG = logging.getLogger("taper.engine")
BLOCK_TOKENS = 64  # entries of a KV block


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """How much runs at once.

    Attributes:
        max_batch: sequences that hold KV blocks.
        max_step_tokens: rows of one pass.
        kv_blocks: of 64 entries; None takes enough for `max_batch` sequences of the whole context.
    """

    max_batch: int = 32
    max_step_tokens: int = 128
    kv_blocks: int | None = None


@dataclass(slots=True, eq=False)
class Member:
    """A request in the batch engine.

    Attributes:
        sequence: its tokens and figures.
        terms: what it asks for beside the text.
        view: what the scheduler sees, kept up to date.
        cache: KV entries while it runs.
        started_s: time of its first pass, by the engine's clock.
        first_token_s: likewise, of its first token.
        num_cached: prompt tokens that were found in the prefix cache.
        refused: why it never ran, or why it failed; None otherwise.
        error: of a pass that failed.
        finished_s: when it ended.
    """

    sequence: Sequence
    terms: Terms
    view: SequenceView
    cache: Any = None
    started_s: float | None = None
    first_token_s: float | None = None
    num_cached: int = 0
    refused: str | None = None
    error: TaperError | None = None
    finished_s: float | None = None
    entry_bits: list[float] = field(default_factory=list)
    last_logits: NDArray[np.float32] | None = None

    @property
    def id(self) -> int:
        """Of the request."""
        return self.view.id

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes, an audit included."""
        return self.sequence.state == "finished" and (
            self.sequence.audit_log is None or self.refused is not None or self.error is not None
        )

    @property
    def low(self) -> float:
        """Least bits of its passes."""
        return self.view.min_bits


Given = tuple[Member, StepOutput | None]


class BatchEngine:
    """Runs the passes that a scheduler plans.

    Used by one thread, `prepare` excepted.

    Args:
        engine: a loaded engine over a `.taper` file; its model, tokenizer and limits are used.
        scheduler: decides every pass.
        step_time: of this model on this machine.
        sizes: of batch and cache.
        clock: seconds, monotonic.

    Attributes:
        planner_s, passes_s: seconds that the scheduler and the passes (sampling included) took so far.
        num_passes: passes so far.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        step_time: StepTime,
        sizes: BatchSizes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        sizes = BatchSizes() if sizes is None else sizes
        self.model = cast(Any, engine.model)  # a decoder of planes; `Model` knows neither pools nor batches
        self._limits, self._scheduler, self._clock = engine.limits, scheduler, clock
        self._admission = Admission(engine.model, engine.tokenizer)
        self._sizes, self._step_time = sizes, step_time
        whole = -(-self.model.context_length // BLOCK_TOKENS)
        self.kv_blocks = sizes.max_batch * whole if sizes.kv_blocks is None else sizes.kv_blocks
        self.pool: KvPool | None = None if self.model.kv is None else self.model.new_pool(self.kv_blocks)
        self._prefixes = PrefixCache()
        self._given: list[Given] = []
        self._waiting: dict[int, Member] = {}
        self._running: dict[int, Member] = {}
        self._audits: list[Member] = []
        self._ids = itertools.count()
        self._widths: tuple[float, ...] = ()
        self._reserved = 0
        self.planner_s = self.passes_s = 0.0
        self.num_passes = 0
        self.last_bits: float | None = None

    # -- requests

    def prepare(self, request: Request) -> Sequence:
        """Check a request and encode its prompt; may be called from any thread. Raises what `Engine.stream`
        does."""
        sequence = self._admission.sequence(request)
        needed = self._blocks(len(sequence.prompt_ids) + sequence.max_tokens)
        if needed > self.kv_blocks:
            raise DoesNotFitError(
                f"prompt and answer need {needed} KV blocks of {BLOCK_TOKENS} tokens; there are "
                f"{self.kv_blocks}",
                "ask for fewer tokens, or serve with more memory",
            )
        return sequence

    def submit(self, sequence: Sequence, terms: Terms, arrival_s: float | None = None) -> Member:
        """Queue a prepared request; `refused` of what comes back says why where it is refused at once.

        Args:
            sequence: from `prepare`.
            terms: deadline from the arrival, floor, priority.
            arrival_s: by the engine's clock; now when None.
        """
        now = self._clock()
        arrival = now if arrival_s is None else arrival_s
        view = SequenceView(
            id=next(self._ids),
            arrival_s=arrival,
            deadline_s=arrival + terms.deadline_s,
            priority=terms.priority,
            min_bits=max(terms.min_bits, self.model.min_bits),
            max_bits=min(terms.max_bits, self.model.max_bits),
            on_miss=terms.on_miss,
            prompt_tokens=len(sequence.prompt_ids),
            num_prefilled=0,
            num_generated=0,
            max_tokens=sequence.max_tokens,
            expected_tokens=sequence.max_tokens,
            is_running=False,
        )
        member = Member(sequence, terms, view)
        self._wish(member)
        state = self._state()
        begin = time.perf_counter()
        reason = self._scheduler.admit(now, state, view)
        self.planner_s += time.perf_counter() - begin
        if reason is None:
            self._waiting[view.id] = member
        else:
            self._refuse(member, reason)
        return member

    def cancel(self, member: Member) -> None:
        """End a request now and give its blocks back; nothing for one that has ended."""
        if self._waiting.pop(member.id, None) or self._running.pop(member.id, None):
            member.sequence.finish("abort")
            self._release(member)
        if member in self._audits:
            self._audits.remove(member)

    def now(self) -> float:
        """Seconds, by the engine's clock."""
        return self._clock()

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold KV blocks."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether anything waits, runs or is to be audited."""
        return bool(self._waiting or self._running or self._audits)

    @property
    def free_kv_blocks(self) -> int:
        """Blocks that no running sequence may come to need."""
        return self.kv_blocks - self._reserved

    # -- passes

    def step(self) -> list[Given]:
        """Plan and run one pass.

        Returns:
            (request, token) for every token drawn, and (request, None) for every request that ended without
            one: refused, cut, cancelled, failed, or audited. Empty when nothing could be done.
        """
        self._given = []
        self._drop_cancelled()
        state, now = self._state(), self._clock()
        begin = time.perf_counter()
        plan = self._scheduler.schedule(now, state)
        self.planner_s += time.perf_counter() - begin
        self._settle(plan)
        groups = self._groups(plan)
        begin = time.perf_counter()
        for bits, members in groups.items():
            self._pass(bits, members)
        if groups:
            seconds = time.perf_counter() - begin
            self.passes_s += seconds
            self.num_passes += 1
            begin = time.perf_counter()
            self._scheduler.observe(plan, seconds)
            self.planner_s += time.perf_counter() - begin
        if self._audits and not any(member.terms.deadline_s < inf for member in self._running.values()):
            self._audit(self._audits.pop(0))
        return self._given

    def _state(self) -> EngineState:
        most = min(self.model.max_bits, self._limits.bits())
        if not self._widths or self._widths[-1] != most:
            self._widths = tuple(range(self.model.min_bits, max(most, self.model.min_bits) + 1))
        return EngineState(
            waiting=tuple([member.view for member in self._waiting.values()]),
            running=tuple([member.view for member in self._running.values()]),
            widths=self._widths,
            kv_blocks=self.kv_blocks,
            free_kv_blocks=self.free_kv_blocks,
            block_tokens=BLOCK_TOKENS,
            max_batch=self._sizes.max_batch,
            max_step_tokens=self._sizes.max_step_tokens,
            step_time=self._step_time,
        )

    def _drop_cancelled(self) -> None:
        for group in (self._waiting, self._running):
            for member in [one for one in group.values() if one.sequence.request.is_cancelled]:
                self.cancel(member)
                self._given.append((member, None))

    def _settle(self, plan: StepPlan) -> None:
        """Refuse, cut and preempt as the plan says."""
        for number, reason in plan.refuse:
            member = self._waiting.pop(number)
            self._refuse(member, reason)
            self._given.append((member, None))
        for number in plan.finish:
            member = self._running.pop(number)
            member.sequence.finish("length")
            self._end(member)
            self._given.append((member, None))
        for number in plan.preempt:
            member = self._running.pop(number)
            self._release(member)
            member.view.num_prefilled, member.view.is_running = 0, False
            self._waiting[number] = member

    def _groups(self, plan: StepPlan) -> dict[Bits, list[tuple[Member, list[int]]]]:
        """Members and their tokens by the bits of their pass: those of the plan within each one's bounds."""
        groups: dict[Bits, list[tuple[Member, list[int]]]] = {}
        for number, count in plan.prefill:
            member = self._running.get(number) or self._start(number, plan.bits)
            if member is not None:
                done = member.view.num_prefilled
                tokens = self._tokens(member, done, done + count)
                groups.setdefault(self._bits(member, plan.bits), []).append((member, tokens))
        for number in plan.decode:
            member = self._running[number]
            token = member.sequence.tokens[-1].token_id
            groups.setdefault(self._bits(member, plan.bits), []).append((member, [token]))
        return groups

    def _bits(self, member: Member, planned: float) -> Bits:
        """Of a member's next pass: no more than its policy wants and its client allows, no less than its
        floor."""
        wish = self._wish(member)
        bits = min(max(planned, member.low), member.view.max_bits)
        return wish if isinstance(wish, LayerBits) and member.low <= _peak(wish) <= bits else bits

    def _wish(self, member: Member) -> Bits:
        """What the policy wants; keeps the member's `max_bits` at it, within the client's bounds."""
        sequence, view, model = member.sequence, member.view, self.model
        policy = sequence.request.policy
        if isinstance(policy, Fixed) and view.num_prefilled:
            return policy.width
        count = len(sequence.tokens)
        features = kv = None
        if count and member.last_logits is not None:
            features = partial(logit_features, member.last_logits)
            kv = partial(member.cache.entries, -1) if member.cache is not None else None
        context = StepContext(
            "decode" if count else "prefill",
            view.num_prefilled,
            count,
            sequence.max_tokens,
            model.min_bits,
            model.max_bits,
            features,
            model.has_sensitivity,
            kv,
        )
        wish = policy.bits(context)
        wanted = self._admission.readable(policy, _peak(wish))
        view.max_bits = max(view.min_bits, min(wanted, member.terms.max_bits))
        return wish

    def _tokens(self, member: Member, begin: int, end: int) -> list[int]:
        """Of the prompt, and after a preemption of the answer so far."""
        sequence = member.sequence
        prompt = sequence.prompt_ids
        if end <= len(prompt):
            return prompt[begin:end]
        return [*prompt, *(token.token_id for token in sequence.tokens)][begin:end]

    def _start(self, number: int, planned: float) -> Member | None:
        """Give a waiting request its cache; None where the memory has no room for it now."""
        member = self._waiting[number]
        sequence, length = member.sequence, len(member.sequence.prompt_ids) + member.sequence.max_tokens
        try:
            self._new_cache(member, length, planned)
            self._limits.admit(sequence, member.cache.bytes_at(length))
            self._limits.clamp(sequence, "prefill", member.low)
        except DoesNotFitError as error:
            member.cache = None
            self._limits.leave(sequence)
            if not self._running:  # it would never fit
                del self._waiting[number]
                self._given.append(self._fail(member, error))
            return None
        del self._waiting[number]
        member.view.is_running = True
        self._reserved += self._blocks(length)
        self._running[number] = member
        sequence.state = "running"
        if member.started_s is None:
            member.started_s = self._clock()
        return member

    def _new_cache(self, member: Member, length: int, planned: float) -> None:
        """An empty cache, or one that begins with the entries of another sequence.

        Those must have been written at no fewer bits than a pass of now would take, and within the client's
        bounds: nobody is worse off for what others asked before.
        """
        reading = member.sequence.request.kv
        if self.pool is None:
            member.cache = self.model.new_cache(length, reading)
            return
        self._make_room(self._blocks(length))
        least = max(member.low, min(planned, member.view.max_bits))
        tokens = self._tokens(member, 0, length)
        found = self._prefixes.find(tokens, least, member.terms.max_bits) if reading is None else None
        if found is None:
            member.cache = self.model.new_cache(length, reading, self.pool)
            return
        member.cache = found.cache.fork(found.num_tokens, length)
        member.entry_bits = list(found.bits)
        member.view.num_prefilled = found.num_tokens
        member.num_cached = min(found.num_tokens, len(member.sequence.prompt_ids))

    def _make_room(self, num_blocks: int) -> None:
        """Free blocks, at the cost of kept prefixes."""
        assert self.pool is not None
        while self.pool.num_free < num_blocks and self._prefixes.drop_oldest():
            pass

    def _pass(self, bits: Bits, members: list[tuple[Member, list[int]]]) -> None:
        """Run one pass and draw the tokens that come out of it."""
        ids = np.array([token for _, tokens in members for token in tokens], np.int32)
        if self.pool is not None:
            self._make_room(2 * len(members) + len(ids) // BLOCK_TOKENS)
        try:
            logits = self.model.forward_batch(
                ids, [(len(tokens), one.cache) for one, tokens in members], bits
            )
        except TaperError as error:
            LOG.exception("a pass of %d sequences failed", len(members))
            self._given += [self._fail(member, error) for member, _ in members]
            return
        recorded = self.model.bits_per_weight(bits) if isinstance(bits, LayerBits) else float(bits)
        recorded = int(recorded) if recorded.is_integer() else recorded
        self.last_bits = recorded
        for row, (member, tokens) in zip(logits, members, strict=True):
            member.cache.release_old()
            member.view.num_prefilled += len(tokens)
            member.entry_bits += [recorded] * len(tokens)
            if member.view.num_prefilled == member.view.prompt_tokens + member.view.num_generated:
                self._draw(member, row, recorded)

    def _draw(self, member: Member, logits: NDArray[np.float32], bits: float) -> None:
        """The next token of a member, and the end of its answer."""
        sequence, view = member.sequence, member.view
        if sequence.audit_log is not None:
            sequence.audit_log.keep(logits)
        member.last_logits = logits
        try:
            token = sequence.sampler.sample(logits)
        except TaperError as error:
            self._given.append(self._fail(member, error))
            return
        text = sequence.append(token, bits)
        view.num_generated += 1
        if member.first_token_s is None:
            member.first_token_s = self._clock()
        if sequence.state == "finished":
            del self._running[member.id]
            self._end(member)
        output = StepOutput(
            text, token.token_id, bits, token.logprob, token.top_logprobs, sequence.finish_reason
        )
        self._given.append((member, output))

    # -- ends

    def _end(self, member: Member) -> None:
        """A whole answer: its entries may serve as a prefix, and an audit may be due."""
        member.finished_s = self._clock()
        if self.pool is not None and member.sequence.request.kv is None:
            tokens = self._tokens(member, 0, member.cache.num_tokens)
            self._prefixes.keep(tokens, member.entry_bits, member.cache)
        self._release(member)
        if member.sequence.audit_log is not None:
            self._audits.append(member)

    def _audit(self, member: Member) -> None:
        """Read an answer once more at the audit's width. Nobody else gets a token meanwhile."""
        sequence, log = member.sequence, member.sequence.audit_log
        assert log is not None
        most = min(self.model.max_bits, self._limits.bits())
        try:
            runner = ModelRunner(self.model, len(sequence.prompt_ids) + len(sequence.tokens))
            sequence.audit = run_audit(
                log.logits,
                min(most, most if log.bits is None else log.bits),
                runner,
                sequence.prompt_ids,
                [token.token_id for token in sequence.tokens],
                reuse_prompt=False,
                chunk_tokens=PREFILL_CHUNK_TOKENS,
                is_cancelled=lambda: sequence.request.is_cancelled,
            )
        except TaperError as error:
            member.error = error
        sequence.audit_log = None
        self._given.append((member, None))

    def _refuse(self, member: Member, reason: str) -> None:
        member.refused = reason
        member.sequence.finish("abort")

    def _fail(self, member: Member, error: TaperError) -> Given:
        member.error = error
        self._running.pop(member.id, None)
        member.sequence.finish("abort")
        self._release(member)
        return (member, None)

    def _release(self, member: Member) -> None:
        if member.cache is not None:
            self._reserved -= self._blocks(len(member.sequence.prompt_ids) + member.sequence.max_tokens)
        member.cache, member.last_logits = None, None
        member.entry_bits = []
        self._limits.leave(member.sequence)

    @staticmethod
    def _blocks(tokens: int) -> int:
        return -(-tokens // BLOCK_TOKENS)


def _peak(bits: Bits) -> float:
    """The most bits that a layer gets."""
    return max(*bits.layers, bits.head) if isinstance(bits, LayerBits) else bits
