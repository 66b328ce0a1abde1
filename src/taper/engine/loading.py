"""A model that runs while its file is still being read: wider as more planes arrive."""

from __future__ import annotations

import atexit
import threading
from pathlib import Path
from typing import Any

from taper.errors import TaperError, UsageError
from taper.formats.arrival import POLL_S, Arrival, Progress
from taper.models import Decoder
from taper.precision import Bits, LayerBits

# The longest pause between two looks at a file that has stopped growing.
_MAX_POLL_S = 1.0


class ArrivingDecoder:
    """The decoder of the planes that have arrived; a wider one takes its place as soon as more are whole.

    At k available planes it gives the bytes that a file cut after k planes gives, embedding look-up included.
    Caches stay good: all widths share one KV layout. Everything that is not here is the current decoder's.

    Attributes:
        max_bits: planes of the whole file, for policies; a pass takes `available_bits` at most.
        file: with the planes that the current decoder has.

    Args:
        arrival: at least the least width is available.
        kv: format of the KV cache, as `Decoder.from_taper` takes it.
    """

    def __init__(self, arrival: Arrival, kv: str | None = None) -> None:
        self._arrival = arrival
        self._kv = kv
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._take()
        self.max_bits = self.file.total_bits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    @property
    def available_bits(self) -> int:
        """Largest width that a pass can be run at now."""
        return self._decoder.max_bits

    def bytes_per_pass(self, bits: Bits) -> int:
        """See `Decoder`. Raises UsageError also for planes that have not arrived."""
        if not isinstance(bits, LayerBits) and self.available_bits < bits <= self.max_bits:
            raise UsageError(
                f"{self.available_bits} of {self.max_bits} planes have arrived; {bits:g} are needed",
                "wait until the file is there, or load it without progressive loading",
            )
        return self._decoder.bytes_per_pass(bits)

    @property
    def problem(self) -> str | None:
        """Why no more planes will be used although some are missing; None where nothing is wrong."""
        if self._arrival.damaged is not None:
            return f"the bytes of {self._arrival.damaged} do not match their checksum"
        return self._error

    def advance(self) -> bool:
        """Take in the next chunk of the file. Returns whether there was anything new."""
        moved = self._arrival.advance()
        if self._arrival.available_bits > self._decoder.max_bits:
            self._take()
        return moved

    def follow(self) -> None:
        """Advance in a thread until the file is complete or `close` is called, at the latest at exit."""
        self._thread = threading.Thread(target=self._follow, name="taper-arrival", daemon=True)
        self._thread.start()
        # A thread that the interpreter's end stops in its tracks keeps native objects from being freed.
        atexit.register(self.close)

    def close(self) -> None:
        """Read no more; what has arrived stays."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        atexit.unregister(self.close)

    def release_planes(self, above_bits: int) -> None:
        """See `TaperFile.release_planes`."""
        self.file.release_planes(min(above_bits, self.file.max_bits))

    def restore_planes(self, bits: int) -> None:
        """See `TaperFile.restore_planes`."""
        self.file.restore_planes(min(bits, self.file.max_bits))

    def _follow(self) -> None:
        pause_s = POLL_S
        try:
            while not (self._closed.is_set() or self._arrival.is_complete):
                if self.advance():
                    pause_s = POLL_S
                else:
                    self._closed.wait(pause_s)
                    pause_s = min(2 * pause_s, _MAX_POLL_S)
        except (OSError, TaperError) as error:  # the answer goes on with what is there
            self._error = str(error)
        finally:
            self._arrival.close()
            atexit.unregister(self.close)

    def _take(self) -> None:
        """Built first, then put in place by one assignment: a pass in another thread has either of them."""
        self.file = self._arrival.open()
        self._decoder = Decoder.from_taper(self.file, kv=self._kv)


def begun_arrival(path: Path, verify: bool, waiting: Progress) -> Arrival:
    """Take in what is cached already and then wait until the least width is there.

    Args:
        path, verify: as `Arrival` takes them.
        waiting: called with the bytes that are there and those that the least width needs.

    Raises:
        ModelNotFoundError, CorruptFileError: as `Arrival.advance` and `Arrival.wait`.
    """
    arrival = Arrival(path, verify)
    while arrival.advance(only_cached=True):
        pass
    arrival.wait(waiting)
    return arrival
