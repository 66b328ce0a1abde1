"""A loop over the one-at-a-time engine: what the server's own tests need of a loop, and faults on demand."""

from __future__ import annotations

import itertools
import queue
import threading
import time

from taper.engine import Engine
from taper.errors import TaperError
from taper.precision import Fixed
from taper.server.errors import ApiError, from_taper
from taper.server.serving import Ended, Refused


class FakeLoop:
    """Runs requests in their order in one thread; `max_waiting` bounds the queue."""

    def __init__(self, engine: Engine, max_waiting: int = 64) -> None:
        self.engine = engine
        self.max_waiting = max_waiting
        self.step_s = 0.0
        self.refuse_late: ApiError | None = None
        self.terms = []
        self.requests = []
        self.running: set[int] = set()
        self.cancelled: list[int] = []
        self._waiting: queue.Queue = queue.Queue()
        self._requests = {}
        self._ids = itertools.count()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request, terms, on_event):
        if self._waiting.qsize() >= self.max_waiting:
            raise ApiError(429, "the queue is full", code="queue_full", kind="overloaded", retry_after_s=2.5)
        try:
            self.engine._admission.sequence(request)
        except TaperError as error:
            raise from_taper(error) from error
        sequence_id = next(self._ids)
        self.terms.append(terms)
        self.requests.append(request)
        self._requests[sequence_id] = request
        self.running.add(sequence_id)
        self._waiting.put((sequence_id, request, terms, on_event, time.monotonic()))
        return sequence_id

    def cancel(self, sequence_id):
        self.cancelled.append(sequence_id)
        if sequence_id in self._requests:
            self._requests[sequence_id].cancel()

    def snapshot(self):
        return {
            "num_running": len(self.running),
            "num_waiting": self._waiting.qsize(),
            "kv_share": 0.25,
            "free_kv_blocks": 3,
            "kv_blocks": 4,
        }

    def close(self):
        self._waiting.put(None)
        self._thread.join()

    def _run(self):
        while (item := self._waiting.get()) is not None:
            sequence_id = item[0]
            try:
                self._one(*item)
            finally:
                del self._requests[sequence_id]
                self.running.discard(sequence_id)

    def _one(self, sequence_id, request, terms, on_event, submitted_s):
        if self.refuse_late is not None:
            on_event(Refused(self.refuse_late))
            return
        began_s = time.monotonic()
        first_s = None
        low, high = self.engine.model.min_bits, self.engine.model.max_bits
        bits = min(max(terms.min_bits, low), high) if terms.min_bits else min(terms.max_bits, high)
        object.__setattr__(request, "policy", Fixed(int(bits)))
        try:
            with self.engine.stream(request) as stream:
                for step in stream:
                    first_s = first_s or time.monotonic() - submitted_s
                    time.sleep(self.step_s)
                    on_event(step)
                done = stream.completion()
        except TaperError as error:
            on_event(Refused(from_taper(error)))
            return
        met = None if terms.deadline_s == float("inf") else time.monotonic() - submitted_s <= terms.deadline_s
        on_event(
            Ended(
                done.finish_reason,
                done.bits,
                done.seed,
                len(done.prompt_ids),
                0,
                met,
                began_s - submitted_s,
                first_s,
                done.audit,
            )
        )
