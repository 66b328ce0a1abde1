"""The planner: which requests to serve and at which bits, so that every promise made is kept."""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass
from math import inf

from taper.engine.schedule import EngineState, SequenceView, StepPlan
from taper.planner.floor_gate import FloorGate
from taper.planner.forecast import Demand, OperatingPoint, OutputLengths, PassTimes, operating_point
from taper.planner.promises import STEADY_ROWS, Members, Option
from taper.planner.selection import largest_set

# Arrivals that the forecast looks back on, and how often it does.
_WINDOW, _EVERY = 128, 32
# Seconds of thinking that count against the budget: an arrival, a pass, a plan and each member of it, a test
# of a candidate, as measured on Zen 4. Counted, not measured as it runs: plans depend on states and times.
_ARRIVAL_S, _PASS_S, _PLAN_S, _MEMBER_S, _TEST_S = 15e-6, 8e-6, 25e-6, 1.5e-6, 8e-6
# A plan that has begun goes on into the red: with 16 members it costs as much as six tests, which one
# candidate does not repay. And news waits for a few passes at most: with fewer members passes are shorter,
# and so is the budget; on passes of 1 ms it never came back (71 instead of 165 requests/s).
_OVERDRAFT_S, _LEAST_TESTS, _PATIENCE_PASSES = -50e-6, 8, 3
# Credit from which a set larger than the greedy one is searched for, and seconds of one search at most.
_SEARCH_S, _MOST_SEARCH_S = 300e-6, 1e-3
# Entries that a token is taken to see, and sequences that share a pass, in the cost of a request.
_TYPICAL_ENTRIES = 128
# Passes after which the width is looked at again although nobody came or went.
_REVIEW_PASSES = 16


@dataclass(slots=True)
class _Waiting:
    """A waiting request: what its place in the queue depends on.

    Attributes:
        bits: least width that its floor allows.
        cost_s: of the machine.
        latest_s: when it must start to make its deadline alone.
        blocks: of the KV cache that it may need.
        blamed_bits: highest floor among those that it could not join.
    """

    view: SequenceView
    bits: float
    cost_s: float
    latest_s: float
    blocks: int
    blamed_bits: float = 0


class Planner:
    """Takes every request whose deadline can be promised, in the order of worth, over time, memory and bits.

    - Running sequences are mandatory. A waiting request is taken when a certificate says that it and all of
      them finish in time (`Members`), with step times corrected to the 90th percentile of what was measured.
    - Bits of a pass: the least that the members' floors allow while anything waits; otherwise the largest at
      which the certificate still holds.
    - What is left of the budget under overload goes into a search for a larger set (`largest_set`).
    - Under overload requests are taken in rising order of the machine's seconds that they need, those whose
      floor is above the gate last and only while nothing else runs (`FloorGate`); otherwise by deadline.
    - A request that cannot make it any more is refused at once; so is the end of a long queue.

    Replans when a sequence came or went and every 16 passes; otherwise the last plan is repeated. Tests of
    candidates are counted against `budget_frac` of the passes' time: beyond it, candidates wait for a later
    pass. Deterministic: nothing depends on a clock but what is given.

    Args:
        budget_frac: share of the passes' time for planning.
        max_waiting: requests that wait at most; the least valuable beyond it are refused.
    """

    def __init__(self, budget_frac: float = 0.01, max_waiting: int = 256) -> None:
        self._budget_frac, self._max_waiting = budget_frac, max_waiting
        self._times, self._lengths = PassTimes(), OutputLengths()
        self._queue: dict[int, _Waiting] = {}
        self._ranked: list[tuple[tuple[float, ...], int]] = []
        self._soonest_s = inf
        self._demands: deque[Demand] = deque(maxlen=_WINDOW)
        self._arrivals = 0
        self._point = OperatingPoint()
        self._gate = FloorGate()
        self._credit_s = 1e-3
        self._predicted_s = 0.0
        self._running: dict[int, SequenceView] = {}
        self._expected_count = 0
        self._has_news = True
        self._quiet_passes = 0
        self._raised_bits = self._floor_bits = 0.0
        self._prompt_rows = 0
        self._floors: dict[float, float] = {}
        self._widths: tuple[float, ...] = ()
        self._repeated: StepPlan | None = None  # the last plan, where all that ran in it goes on decoding
        # Candidates that failed a test since a sequence ended: the test can only have become harder.
        self._failed: set[int] = set()

    def admit(self, now_s: float, state: EngineState, new: SequenceView) -> str | None:
        """Why a new request is refused at once; None where it may wait."""
        self._times.use(state.step_time)
        self._credit_s -= _ARRIVAL_S
        if new.min_bits > state.widths[-1]:
            return f"no width of {new.min_bits:g} bits; the largest now is {state.widths[-1]:g}"
        one = self._waiting(state, new)
        if one.blocks > state.kv_blocks:
            return f"needs {one.blocks} KV blocks, there are {state.kv_blocks}"
        self._note_demand(state, one)
        typical = max(1, len(self._running))
        if self._gate.arrived(one.bits, lambda bits: self._times.decode(bits, typical, _TYPICAL_ENTRIES)):
            self._rank_again()
        if now_s > one.latest_s:
            return "the deadline cannot be met, even alone"
        self._enqueue(one)
        self._has_news = True
        return None

    def schedule(self, now_s: float, state: EngineState) -> StepPlan:
        """The next pass."""
        self._quiet_passes += 1
        if self._repeated is not None and not self._is_due() and self._goes_on(now_s, state):
            return self._repeated
        self._times.use(state.step_time)
        if state.widths is not self._widths and state.widths != self._widths:
            self._widths = state.widths
            self._floors.clear()
        self._adopt(state)
        refuse = self._refusals(now_s)
        finish = self._cut(now_s, state)
        running = [v for v in state.running if v.id not in finish] if finish else list(state.running)
        if len(state.running) != self._expected_count or finish:
            self._learn_lengths(state.running)
            self._failed.clear()
            self._has_news = True
        decoding = [v for v in running if v.num_generated and v.num_prefilled >= v.prompt_tokens]
        is_prefilling = len(decoding) < len(running)
        replans = self._is_due() or not running
        taken = self._replan(now_s, state, running, len(decoding)) if replans else []
        prefill = self._prompts(state, running, len(decoding), taken) if taken or is_prefilling else ()
        bits = max(self._raised_bits, self._floor_bits)
        if running and bits < (floor := max([view.min_bits for view in running])):
            bits = _width(state, floor)  # members that no replan has seen, such as those of another scheduler
        return self._plan(state, running, decoding, prefill, bits, refuse, finish)

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Learn from the time that a pass took."""
        self._times.residuals.observe(plan.bits, self._predicted_s, seconds)
        self._credit_s = min(self._credit_s + self._budget_frac * seconds - _PASS_S, 2e-3)

    def _replan(
        self, now_s: float, state: EngineState, running: list[SequenceView], decoding: int
    ) -> list[SequenceView]:
        """Decide who starts, how many rows prompts get and the bits, until there is news."""
        if self._quiet_passes >= _REVIEW_PASSES:
            self._failed.clear()
        self._credit_s -= _PLAN_S + _MEMBER_S * len(running)
        self._quiet_passes = 0
        members = self._members(now_s, state, running)
        taken, members, is_all = self._take(now_s, state, running, members)
        self._floor_bits = members.bits
        is_calm = is_all and not self._point.is_overload and members.count < 0.7 * state.max_batch
        self._raised_bits = self._widest(state, members, running, taken) if is_calm else 0.0
        self._prompt_rows = state.max_step_tokens
        if members.unread:
            self._prompt_rows = members.prompt_rows(state.max_step_tokens - decoding, decoding)
        return taken

    def _prompts(
        self, state: EngineState, running: list[SequenceView], decoding: int, taken: list[SequenceView]
    ) -> tuple[tuple[SequenceView, int], ...]:
        """Rows of prompts: sequences that have begun, then those that start."""
        unread = [
            view for view in running if not view.num_generated or view.num_prefilled < view.prompt_tokens
        ]
        unread.sort(key=lambda view: (-view.priority, view.deadline_s))
        rows = min(self._prompt_rows, state.max_step_tokens - decoding)
        prefill = []
        for view in (*unread, *taken):
            count = min(rows, _unread(view))
            if count <= 0:
                self._has_news = True  # one that was taken waits for rows, and for another test
                break
            prefill.append((view, count))
            rows -= count
            self._queue.pop(view.id, None)
        return tuple(prefill)

    def _plan(
        self,
        state: EngineState,
        running: list[SequenceView],
        decoding: list[SequenceView],
        prefill: tuple[tuple[SequenceView, int], ...],
        bits: float,
        refuse: tuple[tuple[int, str], ...],
        finish: tuple[int, ...],
    ) -> StepPlan:
        """Put the pass together, and note what it should take."""
        context = sum([view.num_prefilled for view in decoding]) + len(decoding)
        unread = 0
        for view, count in prefill:
            unread += count
            context += count * view.num_prefilled + count * (count + 1) // 2
        self._predicted_s = state.step_time.seconds(bits, len(decoding), unread, context)
        self._expected_count = len(running) + sum(not view.is_running for view, _ in prefill)
        plan = StepPlan(
            bits=bits if decoding or prefill else 0,
            prefill=tuple([(view.id, count) for view, count in prefill]),
            decode=tuple([view.id for view in decoding]),
            refuse=refuse,
            finish=finish,
        )
        is_alone = decoding and not (prefill or refuse or finish)
        self._repeated = plan if is_alone and all(v.on_miss != "truncate" for v in decoding) else None
        return plan

    def _is_due(self) -> bool:
        """Whether there is a reason to plan anew, and the budget for it."""
        is_due = self._has_news or self._quiet_passes >= _REVIEW_PASSES
        return is_due and (self._credit_s > 0 or self._quiet_passes >= _PATIENCE_PASSES)

    def _goes_on(self, now_s: float, state: EngineState) -> bool:
        """Whether the last plan can be given again: nobody came, went, or is late.

        Looked at first and by itself: after a pass little of the planner is left in the caches, and every
        function that it enters costs some microseconds. The prediction stays, too: at most 16 entries a row.
        """
        return (
            len(state.running) == self._expected_count
            and len(state.waiting) == len(self._queue)
            and now_s <= self._soonest_s
            and state.widths is self._widths
        )

    def _members(self, now_s: float, state: EngineState, running: list[SequenceView]) -> Members:
        entries = sum([view.num_prefilled for view in running])
        members = Members(self._times, state.widths[0], entries // max(1, len(running)) + 24)
        floors = self._floors
        for view in running:
            prompt = view.prompt_tokens - view.num_prefilled
            bits = floors.get(view.min_bits)
            if bits is None:
                bits = floors[view.min_bits] = _width(state, view.min_bits)
            first_s = view.deadline_s - now_s if prompt > 0 and view.on_miss == "truncate" else inf
            unread = prompt if prompt > 0 else 0
            members.add(Option(self._left(view), _left_s(now_s, view), unread, bits, 0, first_s))
        return members

    def _take(
        self, now_s: float, state: EngineState, running: list[SequenceView], members: Members
    ) -> tuple[list[SequenceView], Members, bool]:
        """Waiting requests to start, the members with them, and whether all that wait were taken."""
        taken: list[int] = []
        offered: list[_Waiting] = []
        places = min(state.max_batch, state.max_step_tokens - 1) - members.count
        free = blocks = state.kv_blocks - sum(_blocks(state, view) for view in running)
        before = members.copy() if self._point.is_overload and self._credit_s > _SEARCH_S else None
        self._has_news = False
        if len(self._ranked) > len(self._queue) + 16:
            self._ranked = [ranked for ranked in self._ranked if ranked[1] in self._queue]
        for _, number in self._ranked:
            if number in self._failed or number not in self._queue:
                continue
            if len(taken) >= places:
                break
            if self._credit_s <= _OVERDRAFT_S and len(offered) >= _LEAST_TESTS and members.count:
                self._has_news = True  # the rest is tested in later passes
                break
            one = self._queue[number]
            if one.bits > self._gate.bits and members.count:
                break
            self._credit_s -= _TEST_S
            option = self._option(now_s, one)
            if option.blocks <= free and members.take(option):
                free -= one.blocks
                taken.append(len(offered))
            else:
                self._failed.add(number)
                one.blamed_bits = max(one.blamed_bits, members.bits)
            offered.append(one)
        if before is not None and len(taken) < min(places, len(offered)):
            members, taken = self._improve(now_s, before, members, offered, taken, blocks, places)
        return [offered[place].view for place in taken], members, len(taken) == len(self._queue)

    def _improve(
        self,
        now_s: float,
        before: Members,
        members: Members,
        offered: list[_Waiting],
        taken: list[int],
        blocks: int,
        places: int,
    ) -> tuple[Members, list[int]]:
        """A larger set than the greedy one (`members`, `taken`), if what is left of the budget finds one."""
        level = offered[0].view.priority  # a set with fewer of a higher priority is not better
        options = [self._option(now_s, one) for one in offered if one.view.priority == level]
        greedy = [place for place in taken if place < len(options)]
        most = int(min(self._credit_s, _MOST_SEARCH_S) / _TEST_S)
        choice = largest_set(before, options, blocks=blocks, places=places, incumbent=greedy, max_tests=most)
        self._credit_s -= choice.tests * _TEST_S
        if len(choice.chosen) <= len(taken):
            return members, taken
        for place in choice.chosen:
            before.add(options[place])
            self._failed.discard(offered[place].view.id)
        return before, list(choice.chosen)

    def _option(self, now_s: float, one: _Waiting) -> Option:
        view = one.view
        first_s = view.deadline_s - now_s if view.on_miss == "truncate" else inf
        return Option(self._left(view), _left_s(now_s, view), _unread(view), one.bits, one.blocks, first_s)

    def _widest(
        self, state: EngineState, members: Members, running: list[SequenceView], taken: list[SequenceView]
    ) -> float:
        """The largest width at which all promises hold and that nobody's `max_bits` excludes."""
        wanted = min((view.max_bits for view in (*running, *taken)), default=inf)
        for bits in reversed(state.widths):
            if bits <= members.bits:
                break
            if bits <= wanted and members.can_drain(bits):
                return bits
        return 0.0

    def _waiting(self, state: EngineState, view: SequenceView) -> _Waiting:
        bits = _width(state, view.min_bits)
        unread, left = _unread(view), self._left(view)
        prompt = unread * self._times.prompt_token(bits)
        alone = prompt + left * self._times.decode(bits, 1, view.prompt_tokens)
        if view.on_miss == "truncate":
            alone = prompt + self._times.decode(bits, 1, view.prompt_tokens)  # one token is an answer
        # A request in a hurry can share its passes with few others, and pays for more of each.
        pace, rows = (view.deadline_s - view.arrival_s) / (left + unread / STEADY_ROWS), state.max_batch
        while rows > 1 and self._times.decode(bits, rows, _TYPICAL_ENTRIES, STEADY_ROWS) > pace:
            rows = rows * 3 // 4
        cost = prompt + left * self._times.decode(bits, rows, _TYPICAL_ENTRIES) / rows
        return _Waiting(view, bits, cost, view.deadline_s - alone, _blocks(state, view))

    def _note_demand(self, state: EngineState, one: _Waiting) -> None:
        self._demands.append(Demand(one.bits, one.view.arrival_s, one.cost_s))
        self._arrivals += 1
        if self._arrivals % _EVERY == 0:
            pass_s = {bits: self._times.decode(bits, 24, _TYPICAL_ENTRIES) for bits in state.widths}
            self._point = operating_point([one for one in self._demands if one.bits in pass_s], pass_s)
            self._rank_again()

    def _rank_again(self) -> None:
        self._ranked = sorted((self._rank(other), number) for number, other in self._queue.items())
        self._failed.clear()

    def _enqueue(self, one: _Waiting) -> None:
        self._queue[one.view.id] = one
        insort(self._ranked, (self._rank(one), one.view.id))
        self._soonest_s = min(self._soonest_s, one.latest_s)

    def _rank(self, one: _Waiting) -> tuple[float, ...]:
        if self._point.is_overload:
            return (-one.view.priority, one.bits > self._gate.bits, one.cost_s)
        return (-one.view.priority, one.bits > self._gate.bits, one.view.deadline_s)

    def _adopt(self, state: EngineState) -> None:
        """Waiting requests that `admit` did not see, such as preempted ones; forget those that left."""
        if len(state.waiting) == len(self._queue):
            return
        there = {view.id for view in state.waiting}
        for number in [number for number in self._queue if number not in there]:
            del self._queue[number]
        unseen = [view for view in state.waiting if view.id not in self._queue]
        self._queue |= {view.id: self._waiting(state, view) for view in unseen}
        if unseen:  # their old places are in the order yet
            self._rank_again()
            self._soonest_s = self._soonest()
        self._has_news = True

    def _refusals(self, now_s: float) -> tuple[tuple[int, str], ...]:
        """Those that cannot make it any more, and the least valuable beyond the queue's length."""
        refused: list[tuple[int, str]] = []
        is_stale = False
        if now_s > self._soonest_s:
            late = [number for number, one in self._queue.items() if now_s > one.latest_s]
            refused = [(number, "the deadline cannot be met any more") for number in late]
            is_stale = True  # also where the soonest one has started meanwhile
        if len(self._queue) - len(refused) > self._max_waiting:
            gone = {number for number, _ in refused}
            kept = [number for _, number in self._ranked if number in self._queue and number not in gone]
            refused += [(number, "overload: the queue is full") for number in kept[self._max_waiting :]]
        for number, _ in refused:
            one = self._queue.pop(number)
            self._gate.lost(one.bits, one.blamed_bits)
        if refused or is_stale:
            self._soonest_s = self._soonest()
        return tuple(refused)

    def _soonest(self) -> float:
        """When the first of those that wait cannot make it any more."""
        return min((one.latest_s for one in self._queue.values()), default=inf)

    def _cut(self, now_s: float, state: EngineState) -> tuple[int, ...]:
        """Answers that end because the next pass may be over only after their deadline."""
        cut = [view for view in state.running if view.on_miss == "truncate" and view.num_generated]
        if not cut:
            return ()
        # Who starts in it is not decided yet, nor its bits: the longest pass that there is.
        rows = len(state.running)
        prompts = max(0, state.max_step_tokens - rows)
        latest = now_s + self._times.decode(state.widths[-1], rows, _TYPICAL_ENTRIES, prompts)
        return tuple(view.id for view in cut if latest > view.deadline_s)

    def _left(self, view: SequenceView) -> int:
        """Tokens that a sequence decodes yet, at most."""
        bound = min(view.expected_tokens, self._lengths.bound(view.num_generated, view.max_tokens))
        return max(1, bound - view.num_generated)

    def _learn_lengths(self, running: tuple[SequenceView, ...]) -> None:
        now = {view.id: view for view in running}
        for number, view in self._running.items():
            if number not in now and view.num_generated:
                self._lengths.observe(min(view.max_tokens, view.num_generated + 1), view.max_tokens)
                self._gate.served(next((w for w in self._widths if w >= view.min_bits), view.min_bits))
        self._running = now


def _width(state: EngineState, floor: float) -> float:
    """The least width that keeps a floor."""
    return next((bits for bits in state.widths if bits >= floor), state.widths[-1])


def _left_s(now_s: float, view: SequenceView) -> float:
    """Seconds to the deadline; a sequence that is cut at its deadline never makes others wait."""
    return inf if view.on_miss == "truncate" else view.deadline_s - now_s


def _unread(view: SequenceView) -> int:
    """Tokens to run before it decodes: the prompt, and after a preemption what it had generated."""
    return view.prompt_tokens + view.num_generated - view.num_prefilled


def _blocks(state: EngineState, view: SequenceView) -> int:
    """KV blocks that a sequence has at its longest."""
    return -(-(view.prompt_tokens + view.max_tokens) // state.block_tokens)
