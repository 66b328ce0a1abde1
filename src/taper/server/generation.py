"""The sequences of one HTTP request: submitted together, read as one stream, cancelled together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar
from weakref import WeakKeyDictionary

from taper.engine import Request, StepOutput
from taper.engine.schedule import Terms
from taper.server.serving import Ended, Event, Loop, Refused


@dataclass(frozen=True, slots=True)
class Choice:
    """What one sequence has given in full."""

    steps: tuple[StepOutput, ...]
    ended: Ended


class Mailbox:
    """Events from an engine's thread to a running asyncio loop; one wake-up for all that has come.

    A wake-up is a system call that gives the interpreter away: with one for each token of a batch of 32 the
    engine waited longer for it than it worked.
    """

    _all: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._items: deque[tuple[asyncio.Queue[tuple[int, Event]], tuple[int, Event]]] = deque()
        self._is_woken = False

    @classmethod
    def here(cls) -> Mailbox:
        """That of the loop that runs this coroutine."""
        return cls._all.setdefault(asyncio.get_running_loop(), cls())

    def put(
        self,
        loop: asyncio.AbstractEventLoop,
        queue: asyncio.Queue[tuple[int, Event]],
        item: tuple[int, Event],
    ) -> None:
        """Send an event to a queue of the loop; from any thread."""
        self._items.append((queue, item))
        if not self._is_woken:
            self._is_woken = True
            try:
                loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the server has stopped; nobody reads
                return

    def _deliver(self) -> None:
        self._is_woken = False  # first: what comes from here on wakes again
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)


class Generation:
    """Runs the requests on a loop.

    Args:
        loop: of the model.
        requests: one a choice, in the order of their indices.
        terms: for each of them.
    """

    def __init__(self, loop: Loop, requests: Sequence[Request], terms: Terms) -> None:
        self._loop = loop
        self._requests = requests
        self._terms = terms
        self._ids: list[int] = []
        self._open = len(requests)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def start(self) -> None:
        """Submit all; where one is refused, none stays. Raises what `Loop.submit` raises."""
        here, mailbox = asyncio.get_running_loop(), Mailbox.here()

        def forward(index: int, event: Event) -> None:
            mailbox.put(here, self._events, (index, event))

        try:
            for index, request in enumerate(self._requests):
                self._ids.append(self._loop.submit(request, self._terms, partial(forward, index)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End what still runs; does nothing after the end."""
        if self._open:
            for sequence_id in self._ids:
                self._loop.cancel(sequence_id)
        self._open = 0

    async def events(self) -> AsyncIterator[tuple[int, StepOutput | Ended]]:
        """(index, event) until every sequence has ended. Raises ApiError where one is refused or fails."""
        while self._open:
            index, event = await self._events.get()
            if isinstance(event, Refused):
                self.cancel()
                raise event.error
            if isinstance(event, Ended):
                self._open -= 1
            yield index, event

    async def choices(self) -> list[Choice]:
        """Wait for all of them."""
        steps: list[list[StepOutput]] = [[] for _ in self._requests]
        ends: dict[int, Ended] = {}
        async for index, event in self.events():
            if isinstance(event, Ended):
                ends[index] = event
            else:
                steps[index].append(event)
        return [Choice(tuple(taken), ends[index]) for index, taken in enumerate(steps)]
