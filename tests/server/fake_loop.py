"""The loop of one request at a time with a record of what it was asked, and faults on demand."""

from __future__ import annotations

import time

from taper.engine import Engine
from taper.server.errors import ApiError
from taper.server.one_loop import OneLoop
from taper.server.serving import Refused


class FakeLoop(OneLoop):
    """Keeps requests and terms; can refuse late, refuse at once, and be slow."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.engine = engine
        self.step_s = 0.0
        self.refuse_late: ApiError | None = None
        self.terms = []
        self.requests = []
        self.cancelled: list[int] = []

    @property
    def max_waiting(self) -> int:
        return self._max_waiting

    @max_waiting.setter
    def max_waiting(self, number: int) -> None:
        self._max_waiting = number

    def submit(self, request, terms, on_event):
        def slow(event):
            time.sleep(self.step_s)
            on_event(event)

        sequence_id = super().submit(request, terms, slow)
        self.terms.append(terms)
        self.requests.append(request)
        return sequence_id

    def cancel(self, sequence_id):
        self.cancelled.append(sequence_id)
        super().cancel(sequence_id)

    def _end_of(self, job):
        return super()._end_of(job) if self.refuse_late is None else Refused(self.refuse_late)
