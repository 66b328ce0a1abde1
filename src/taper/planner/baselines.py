"""Policies to measure the planner against: greedy ones by order, width and admission test; SlackFit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf

from taper.engine.schedule import EngineState, Scheduler, SequenceView, StepPlan


def _alone_s(state: EngineState, view: SequenceView, bits: float, rows: int) -> float:
    """Seconds that a request takes beside `rows` - 1 others."""
    prompt, times = view.prompt_tokens, state.step_time
    return times.seconds(bits, 0, prompt, prompt * prompt // 2) + view.max_tokens * times.seconds(
        bits, rows, 0, rows * (prompt + view.max_tokens // 2)
    )


@dataclass(slots=True)
class Greedy:
    """Fills the batch in an order.

    Attributes:
        order: smaller first.
        bits: of every pass, requests with a higher floor are refused; 0: the least that the members need.
        has_admission: refuses what would be late beside those that run now.
        is_static: starts a batch only when the last one is through.
        chunk_tokens: prompt rows of a pass at most.
    """

    order: Callable[[float, EngineState, SequenceView], float]
    bits: float = 0
    has_admission: bool = False
    is_static: bool = False
    chunk_tokens: int = 1 << 30
    _known: dict[int, float] = field(default_factory=dict)

    def admit(self, now_s: float, state: EngineState, new: SequenceView) -> str | None:
        """Refuses floors above the width, and what is late already."""
        if new.min_bits > (self.bits or state.widths[-1]):
            return "floor"
        return "late" if self._is_late(now_s, state, new) else None

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Learns nothing."""

    def schedule(self, now_s: float, state: EngineState) -> StepPlan:
        """Everybody decodes; prompts fill the rows that are left."""
        decoding = [view for view in state.running if view.num_generated]
        rows = min(state.max_step_tokens - len(decoding), self.chunk_tokens)
        todo = [view for view in state.running if not view.num_generated]
        refuse, prefill, members, count = [], [], list(decoding), len(state.running)
        if not (self.is_static and state.running):
            todo += sorted(state.waiting, key=lambda view: self.order(now_s, state, view))
        for view in todo:
            if not view.is_running and self._is_late(now_s, state, view):
                refuse.append((view.id, "late"))
            elif rows > 0 and (view.is_running or count < state.max_batch):
                chunk = min(rows, view.prompt_tokens - view.num_prefilled)
                prefill.append((view.id, chunk))
                members.append(view)
                rows -= chunk
                count += not view.is_running
        floor = self.bits or max((view.min_bits for view in members), default=0)
        bits = next(width for width in state.widths if width >= floor)
        if not members:
            return StepPlan(refuse=tuple(refuse))
        return StepPlan(bits, tuple(prefill), tuple(view.id for view in decoding), refuse=tuple(refuse))

    def _is_late(self, now_s: float, state: EngineState, view: SequenceView) -> bool:
        if not self.has_admission:
            return False
        bits = self.bits or max([state.widths[0], view.min_bits, *(one.min_bits for one in state.running)])
        return now_s + _alone_s(state, view, bits, len(state.running) + 1) > view.deadline_s


def _laxity(now_s: float, state: EngineState, view: SequenceView) -> float:
    return view.deadline_s - now_s - _alone_s(state, view, state.widths[0], 1)


def _work(now_s: float, state: EngineState, view: SequenceView) -> float:
    return _alone_s(state, view, state.widths[0], 1)


def _arrival(now_s: float, state: EngineState, view: SequenceView) -> float:
    return view.arrival_s


def _deadline(now_s: float, state: EngineState, view: SequenceView) -> float:
    return view.deadline_s if view.deadline_s < inf else 1e18 + view.arrival_s


@dataclass(slots=True)
class SlackFit:
    """SuperServe's policy (Khare et al., NSDI 2025, section 4.2) with widths in the place of sub-networks.

    The most urgent request's slack chooses: of the batches in the order of deadlines, the largest, at the
    largest width whose pass is within the slack's share of one token; the least width where none is. What is
    late already is turned away.
    """

    def admit(self, now_s: float, state: EngineState, new: SequenceView) -> str | None:
        """Refuses floors that no width keeps."""
        return "floor" if new.min_bits > state.widths[-1] else None

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Learns nothing."""

    def schedule(self, now_s: float, state: EngineState) -> StepPlan:
        """Everybody decodes, prompts fill the rows that are left; then the width."""
        refuse = tuple((view.id, "late") for view in state.waiting if now_s >= view.deadline_s)
        late = {number for number, _ in refuse}
        waiting = sorted(
            (view for view in state.waiting if view.id not in late), key=lambda view: view.deadline_s
        )
        decoding = [view for view in state.running if view.num_generated]
        todo = [view for view in state.running if not view.num_generated]
        todo += waiting[: state.max_batch - len(state.running)]
        rows, prefill, members = state.max_step_tokens - len(decoding), [], list(decoding)
        for view in todo:
            if rows > 0:
                count = min(rows, view.prompt_tokens - view.num_prefilled)
                prefill.append((view.id, count))
                members.append(view)
                rows -= count
        if not members:
            return StepPlan(refuse=refuse)
        pace = min((view.deadline_s - now_s) / (view.max_tokens - view.num_generated + 1) for view in members)
        floor = max(view.min_bits for view in members)
        wide = [bits for bits in state.widths if bits >= floor]
        entries = sum(view.num_prefilled + 1 for view in decoding)
        unread = sum(count for _, count in prefill)
        fitting = [
            bits for bits in wide if state.step_time.seconds(bits, len(decoding), unread, entries) <= pace
        ]
        return StepPlan(
            max(fitting, default=wide[0]),
            tuple(prefill),
            tuple(view.id for view in decoding),
            refuse=refuse,
        )


def baselines(widths: tuple[float, ...]) -> dict[str, Callable[[], Scheduler]]:
    """By name; each makes a fresh one.

    Args:
        widths: of the model, rising; FCFS comes once at each.
    """
    fixed: dict[str, Callable[[], Scheduler]] = {
        f"fcfs:{bits:g}": partial(Greedy, _arrival, bits=bits) for bits in widths
    }
    return fixed | {
        "edf": lambda: Greedy(_deadline, has_admission=True),
        "least-laxity": lambda: Greedy(_laxity, has_admission=True),
        "shortest-first": lambda: Greedy(_work),
        "shortest-first-admission": lambda: Greedy(_work, has_admission=True),
        "static": lambda: Greedy(_arrival, is_static=True),
        "token-budget": lambda: Greedy(_arrival, chunk_tokens=32),
        "slackfit": SlackFit,
    }
