"""The loop of the batch engine: a thread that runs its passes, and what the server asks of it."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from taper.engine import Request
from taper.engine.batch import BatchEngine, Member
from taper.engine.schedule import Terms
from taper.engine.sequence import Sequence
from taper.errors import TaperError
from taper.server.errors import ApiError, from_taper
from taper.server.serving import Ended, Event, Refused

LOG = logging.getLogger("taper.server")
MAX_WAITING = 256
_DUE_KEPT = 256  # deadlines of the page's chart
_NEWEST = 0.1  # weight of the last pass in the running mean of its time
_RETRY_S = 0.005  # before looking again at requests that had no room


@dataclass(slots=True, eq=False)
class _Job:
    request: Request
    sequence: Sequence
    terms: Terms
    on_event: Callable[[Event], None]
    submitted_s: float
    member: Member | None = None


class BatchLoop:
    """See the module; a `Loop`.

    Args:
        batch: used by this loop alone, with the clock of `time.monotonic`.
        max_waiting: bound of the queue.
    """

    def __init__(self, batch: BatchEngine, max_waiting: int = MAX_WAITING) -> None:
        self._batch, self._max_waiting = batch, max_waiting
        self._changed = threading.Condition()
        self._inbox: deque[int] = deque()
        self._jobs: dict[int, _Job] = {}
        self._members: dict[Member, int] = {}
        self._ids = itertools.count()
        self._closed = False
        self._step_s = 0.0
        self._due: deque[bool] = deque(maxlen=_DUE_KEPT)
        self._num_running = 0
        self._thread = threading.Thread(target=self._run, name="taper-batch", daemon=True)
        self._thread.start()

    def submit(self, request: Request, terms: Terms, on_event: Callable[[Event], None]) -> int:
        """See `Loop`. Raises ApiError 400 for a request that can never run, 429 for a full queue."""
        with self._changed:
            self._check_room()  # first: under overload a refusal must cost little
        try:
            sequence = self._batch.prepare(request)
        except TaperError as error:
            raise from_taper(error) from error
        with self._changed:
            self._check_room()
            number = next(self._ids)
            self._jobs[number] = _Job(request, sequence, terms, on_event, self._batch.now())
            self._inbox.append(number)
            self._changed.notify()
            return number

    def _check_room(self) -> None:
        if self._closed:
            raise _stopping()
        if len(self._jobs) - self._num_running >= self._max_waiting:
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
            job = self._jobs.get(sequence_id)
            if job is not None:
                job.request.cancel()
                self._changed.notify()

    def snapshot(self) -> Mapping[str, Any]:
        """See `Loop`."""
        batch = self._batch
        with self._changed:
            free = batch.free_kv_blocks
            due = list(self._due)
            return {
                "num_running": self._num_running,
                "num_waiting": len(self._jobs) - self._num_running,
                "kv_blocks": batch.kv_blocks,
                "free_kv_blocks": free,
                "kv_share": 1 - free / batch.kv_blocks,
                "bits": batch.last_bits,
                "step_ms": 1e3 * self._step_s,
                "deadlines_met": sum(due),
                "deadlines_due": len(due),
            }

    def close(self) -> None:
        """See `Loop`; what waits or runs is refused with 503."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._inbox or self._batch.has_work or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
                new = [*self._inbox]
                self._inbox.clear()
            try:
                self._take_in(new)
                self._step()
            except Exception:
                LOG.exception("the batch engine failed")
                self._refuse_all(
                    ApiError(500, "the engine failed; the server's log says why", kind="server_error")
                )
        self._refuse_all(_stopping())

    def _take_in(self, numbers: list[int]) -> None:
        for number in numbers:
            job = self._jobs[number]
            if job.request.is_cancelled:
                self._forget(number)
                continue
            member = job.member = self._batch.submit(job.sequence, job.terms, job.submitted_s)
            self._members[member] = number
            if member.has_ended:
                self._deliver(member)

    def _step(self) -> None:
        before = self._batch.num_passes, self._batch.passes_s
        given = self._batch.step()
        passes = self._batch.num_passes - before[0]
        if passes:
            newest = self._batch.passes_s - before[1]
            self._step_s += (newest - self._step_s) * (_NEWEST if self._step_s else 1)
        with self._changed:
            self._num_running = self._batch.num_running
            if not (passes or given or self._inbox):
                self._changed.wait(_RETRY_S)
        for member, output in given:
            number = self._members.get(member)
            if number is None:
                continue
            if output is not None:
                self._jobs[number].on_event(output)
            if member.has_ended:
                self._deliver(member)

    def _deliver(self, member: Member) -> None:
        """The last event of a request."""
        number = self._members.pop(member)
        job = self._jobs[number]
        self._forget(number)
        job.on_event(self._end_of(job, member))

    def _forget(self, number: int) -> None:
        with self._changed:
            self._jobs.pop(number, None)

    def _end_of(self, job: _Job, member: Member) -> Event:
        if member.refused is not None:
            return Refused(_refusal(member.refused))
        if member.error is not None:
            return Refused(from_taper(member.error))
        sequence, finished_s = member.sequence, member.finished_s
        met = None
        if job.terms.deadline_s < inf and finished_s is not None:
            met = finished_s <= member.view.deadline_s
            self._due.append(met)
        return Ended(
            finish_reason="stop" if sequence.finish_reason == "stop" else "length",
            bits=tuple(sequence.bits),
            seed=sequence.seed,
            num_prompt_tokens=len(sequence.prompt_ids),
            num_cached_tokens=member.num_cached,
            deadline_met=met,
            queue_s=(member.started_s or job.submitted_s) - job.submitted_s,
            first_token_s=None if member.first_token_s is None else member.first_token_s - job.submitted_s,
            audit=sequence.audit,
        )

    def _refuse_all(self, error: ApiError) -> None:
        with self._changed:
            jobs = [*self._jobs.values()]
            self._jobs.clear()
            self._inbox.clear()
        self._members.clear()
        for job in jobs:
            if job.member is not None:
                self._batch.cancel(job.member)
            job.on_event(Refused(error))


def _refusal(reason: str) -> ApiError:
    is_late = "deadline" in reason
    return ApiError(
        429,
        f"deadline_ms: {reason}" if is_late else reason,
        param="deadline_ms" if is_late else None,
        kind="deadline_error" if is_late else "overloaded_error",
        code="deadline_infeasible" if is_late else "overloaded",
        retry_after_s=1,
    )


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", kind="server_error", code="not_ready", retry_after_s=5)
