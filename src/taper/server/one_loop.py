"""A loop of one request at a time over the plain engine: the highest priority first, then first come.

Every policy, the audit and exact mode work here; requests wait for each other. Deadlines hold all the same: a
request that cannot make its own is refused when its turn comes, and none starts after it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from taper.engine import Completion, Engine, Request
from taper.engine.schedule import Terms
from taper.errors import TaperError
from taper.precision import Bits, LayerBits, PrecisionPolicy, StepContext
from taper.server.errors import ApiError, from_taper
from taper.server.serving import Ended, Event, Refused

LOG = logging.getLogger("taper.server")
MAX_WAITING = 256
_NEWEST = 0.1  # weight of the last token in the running mean of seconds a token
_DUE_KEPT = 256  # deadlines of the page's chart


@dataclass(frozen=True, slots=True)
class Bounded:
    """Another policy's bits, within bounds that a client has set."""

    inner: PrecisionPolicy
    low: float
    high: float

    @property
    def name(self) -> str:
        """The policy and the bounds."""
        return f"{self.inner.name} within {self.low:g}..{self.high:g}"

    def bits(self, step: StepContext) -> Bits:
        """The policy's bits, moved to the nearest bound."""
        bits = self.inner.bits(step)
        if isinstance(bits, LayerBits):
            return LayerBits(tuple(self._within(layer) for layer in bits.layers), self._within(bits.head))
        return self._within(bits)

    def _within(self, bits: float) -> float:
        return min(max(bits, self.low), self.high)


@dataclass(slots=True)
class _Job:
    id: int
    request: Request
    terms: Terms
    on_event: Callable[[Event], None]
    submitted_s: float

    @property
    def deadline_s(self) -> float:
        return self.submitted_s + self.terms.deadline_s


class OneLoop:
    """See the module; a `Loop`.

    Args:
        engine: used by this loop alone.
        max_waiting: bound of the queue.
    """

    def __init__(self, engine: Engine, max_waiting: int = MAX_WAITING) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: OrderedDict[int, _Job] = OrderedDict()
        self._running: _Job | None = None
        self._ids = itertools.count()
        self._closed = False
        self._token_s = 0.0
        self._last_bits: float | None = None
        self._due: list[bool] = []
        self._thread = threading.Thread(target=self._run, name="taper-loop", daemon=True)
        self._thread.start()

    def submit(self, request: Request, terms: Terms, on_event: Callable[[Event], None]) -> int:
        """See `Loop`. Raises ApiError 400 for a request that can never run, 429 for a full queue."""
        with self._changed:
            self._check_room()  # first: under overload a refusal must cost little
        try:
            self._engine.check(request)
        except TaperError as error:
            raise from_taper(error) from error
        with self._changed:
            self._check_room()
            job = _Job(next(self._ids), request, terms, on_event, time.monotonic())
            self._waiting[job.id] = job
            self._changed.notify()
            return job.id

    def _check_room(self) -> None:
        if self._closed:
            raise _stopping()
        if len(self._waiting) >= self._max_waiting:
            raise ApiError(
                429,
                f"{self._max_waiting} requests are waiting; that is the most",
                kind="overloaded_error",
                code="queue_full",
                retry_after_s=1,
            )

    def cancel(self, sequence_id: int) -> None:
        """See `Loop`."""
        with self._changed:
            self._waiting.pop(sequence_id, None)
            if self._running is not None and self._running.id == sequence_id:
                self._running.request.cancel()

    def snapshot(self) -> Mapping[str, Any]:
        """See `Loop`. One sequence has all the KV memory there is, so the share is 0 or 1."""
        with self._changed:
            is_running = self._running is not None
            return {
                "num_running": int(is_running),
                "num_waiting": len(self._waiting),
                "kv_blocks": 1,
                "free_kv_blocks": int(not is_running),
                "kv_share": float(is_running),
                "bits": self._last_bits,
                "step_ms": 1e3 * self._token_s,
                "deadlines_met": sum(self._due),
                "deadlines_due": len(self._due),
            }

    def close(self) -> None:
        """See `Loop`; what waits or runs is refused with 503."""
        with self._changed:
            self._closed = True
            jobs = [*self._waiting.values()]
            self._waiting.clear()
            if self._running is not None:
                self._running.request.cancel()
            self._changed.notify()
        for job in jobs:
            job.on_event(Refused(_stopping()))
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                first = min(self._waiting.values(), key=lambda job: (-job.terms.priority, job.id))
                self._running = self._waiting.pop(first.id)
            job = self._running
            try:
                job.on_event(self._end_of(job))
            except Exception:
                LOG.exception("request %d failed", job.id)
                error = ApiError(500, "the engine failed; the server's log says why", kind="server_error")
                job.on_event(Refused(error))
            finally:
                with self._changed:
                    self._running = None

    def _end_of(self, job: _Job) -> Event:
        """Run a request; its last event."""
        began_s = time.monotonic()
        needed_s = self._token_s * (job.request.max_tokens or 1)
        is_late = began_s + needed_s > job.deadline_s
        if began_s >= job.deadline_s or (is_late and job.terms.on_miss == "reject"):
            return Refused(_infeasible(needed_s))
        request = replace(job.request, policy=self._policy(job, is_late))
        try:
            first_s, done = self._stream(job, request)
        except TaperError as error:
            return Refused(from_taper(error))
        if self._closed:
            return Refused(_stopping())
        met = None if job.terms.deadline_s == inf else time.monotonic() <= job.deadline_s
        if met is not None:
            self._due = [*self._due, met][-_DUE_KEPT:]
        return Ended(
            # Cut at its deadline (on_miss: truncate), or by a client that no longer reads.
            finish_reason="length" if done.finish_reason in (None, "abort") else done.finish_reason,
            bits=done.bits,
            seed=done.seed,
            num_prompt_tokens=len(done.prompt_ids),
            num_cached_tokens=0,
            deadline_met=met,
            queue_s=began_s - job.submitted_s,
            first_token_s=None if first_s is None else first_s - job.submitted_s,
            audit=done.audit,
        )

    def _stream(self, job: _Job, request: Request) -> tuple[float | None, Completion]:
        """The time of the first token, and the record; events on the way."""
        first_s: float | None = None
        with self._engine.stream(request) as stream:
            last_s = time.monotonic()
            for step in stream:
                now_s = time.monotonic()
                if first_s is None:
                    first_s = now_s
                else:
                    # A prompt's pass would not speak for a token's.
                    newest = now_s - last_s
                    self._token_s += (newest - self._token_s) * (_NEWEST if self._token_s else 1)
                last_s = now_s
                self._last_bits = step.bits
                job.on_event(step)
                if now_s >= job.deadline_s and job.terms.on_miss == "truncate":
                    break
            return first_s, stream.completion()

    def _policy(self, job: _Job, is_late: bool) -> PrecisionPolicy:
        """The request's own policy within its bounds; with on_miss lower_bits and no time, the least bits."""
        terms, model = job.terms, self._engine.model
        low = max(terms.min_bits, model.min_bits)
        high = min(terms.max_bits, model.max_bits)
        if is_late and terms.on_miss == "lower_bits":
            return Bounded(job.request.policy, low, low)
        if (low, high) == (model.min_bits, model.max_bits):
            return job.request.policy
        return Bounded(job.request.policy, low, high)


def _infeasible(needed_s: float) -> ApiError:
    return ApiError(
        429,
        f"deadline_ms: about {1e3 * needed_s:.0f} ms are needed, and fewer are left",
        param="deadline_ms",
        kind="deadline_error",
        code="deadline_infeasible",
        retry_after_s=1,
    )


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", kind="server_error", code="not_ready", retry_after_s=5)
