"""A thread for what the next matrix need not wait for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """One piece of work at a time beside the main thread.

    What follows the solver (biases, packing, a synced file) takes one core, or none while it waits for the
    disk: at the 1.1 B shape about a second a layer.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last piece, also after an error, and raise its own where there is no other."""
        self._pool.shutdown()
        if kind is None and self._last is not None:
            self._last.result()

    def submit(self, work: Callable[[], None]) -> None:
        """Begin a piece once the one before is done; raises what that raised."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(work)
