"""A budget for weights and KV caches: what one takes the other gives, plane by plane."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from taper.engine.sequence import Sequence
from taper.errors import DoesNotFitError

# Linux: share of the last 10 s in which some task waited for memory, in percent (/proc/pressure/memory,
# "some avg10"). At 10 % every tenth step of a decoder waits for its weights to come back from the disk.
_HIGH_PRESSURE = 10.0
# Below this the planes may come back, one a step, and after a pause that is longer than the average's window,
# so that the same planes are not dropped and read in turns.
_LOW_PRESSURE = 1.0
_LOWER_EVERY_S = 2.0
_RAISE_EVERY_S = 15.0


class Planes(Protocol):
    """A file's planes in memory (`TaperFile`, `ArrivingDecoder`)."""

    def release_planes(self, above_bits: int) -> None:
        """Give the memory of the planes above a width back."""
        ...

    def restore_planes(self, bits: int) -> None:
        """Read the planes up to a width ahead of their use."""
        ...


class PressureGauge:
    """A ceiling that falls by one bit at a time while the system is short of memory, and rises again after.

    Args:
        min_bits, max_bits: of the model.
        pressure: percent of the time that some task waits for memory.
        clock: seconds.
    """

    def __init__(
        self,
        min_bits: int,
        max_bits: int,
        pressure: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._min_bits = min_bits
        self._max_bits = max_bits
        self._pressure = memory_pressure if pressure is None else pressure
        self._clock = clock
        self._bits = max_bits
        self._changed_s = self._looked_s = clock() - _LOWER_EVERY_S

    def bits(self) -> int:
        """The ceiling now; looks at the pressure every two seconds at most."""
        now_s = self._clock()
        if now_s - self._looked_s < _LOWER_EVERY_S:
            return self._bits
        self._looked_s = now_s
        pressure = self._pressure()
        if pressure >= _HIGH_PRESSURE and self._bits > self._min_bits:
            self._bits, self._changed_s = self._bits - 1, now_s
        elif (
            pressure < _LOW_PRESSURE
            and self._bits < self._max_bits
            and now_s - self._changed_s >= _RAISE_EVERY_S
        ):
            self._bits, self._changed_s = self._bits + 1, now_s
        return self._bits


class MemoryBudget:
    """Lets a model's planes and the KV caches of its requests share a number of bytes.

    The widest reading that fits beside the admitted caches is the ceiling. When it falls the planes above it
    are released, when it rises they are read ahead again. Beside the budget the process needs what it needs
    in any case: the interpreter, the tokenizer, activations.

    Args:
        weight_bytes: width to the bytes of the model at it.
        planes: of the same model.
        total_bytes: for weights and KV caches; None for a ceiling by pressure alone.
        gauge: of the system's memory; None looks at none.

    Raises:
        DoesNotFitError: not even the least width fits.
    """

    def __init__(
        self,
        weight_bytes: dict[int, int],
        planes: Planes,
        total_bytes: int | None,
        gauge: PressureGauge | None = None,
    ) -> None:
        self._weight_bytes = dict(sorted(weight_bytes.items()))
        self._planes = planes
        self._total_bytes = total_bytes
        self._gauge = gauge
        self._lock = threading.Lock()
        self._kv_bytes: dict[Sequence, int] = {}
        # Most bits that each running request without `allow_lower_bits` has asked for.
        self._kept_bits: dict[Sequence, float] = {}
        self._ceiling = max(weight_bytes)
        least = min(weight_bytes)
        if not self._fits(least, 0):
            raise DoesNotFitError(
                f"the weights at {least} bits take {_mb(weight_bytes[least])}; the memory budget is "
                f"{_mb(total_bytes or 0)}",
                hint="give a larger budget, or a file with fewer or smaller planes",
            )

    def bits(self) -> int:
        """The ceiling now; planes are released or read ahead where it has moved."""
        with self._lock:
            ceiling = self._widest(self._num_kv_bytes())
            if self._gauge is not None:
                ceiling = min(ceiling, self._gauge.bits())
            if ceiling < self._ceiling:
                self._planes.release_planes(ceiling)
            elif ceiling > self._ceiling:
                self._planes.restore_planes(ceiling)
            self._ceiling = ceiling
            return ceiling

    def admit(self, sequence: Sequence, kv_bytes: int) -> None:
        """Reserve the room of a full KV cache.

        Raises:
            DoesNotFitError: there is none beside the least width and the widths that running requests keep.
        """
        with self._lock:
            kept = max([min(self._weight_bytes), *self._kept_bits.values()])
            needed = self._num_kv_bytes() + kv_bytes
            if not self._fits(kept, needed):
                raise self._refusal(kept, needed, self._room(kept, kv_bytes))
            self._kv_bytes[sequence] = kv_bytes

    def bits_for(self, sequence: Sequence, wanted: float) -> int:
        """The ceiling for a request's next pass, for which it wants `wanted` bits.

        Raises:
            DoesNotFitError: it wants more than fits and does not allow less.
        """
        ceiling = self.bits()
        if sequence.request.allow_lower_bits:
            return ceiling
        with self._lock:
            kv_bytes = self._num_kv_bytes()
            if not self._fits(wanted, kv_bytes):
                widest = self._widest(kv_bytes)
                raise self._refusal(wanted, kv_bytes, f"{widest} bits fit: ask for them, or allow lower bits")
            self._kept_bits[sequence] = max(wanted, self._kept_bits.get(sequence, 0))
        return max(self._weight_bytes)

    def leave(self, sequence: Sequence) -> None:
        """Take the room of a sequence back."""
        with self._lock:
            self._kv_bytes.pop(sequence, None)
            self._kept_bits.pop(sequence, None)

    def _room(self, kept: float, kv_bytes: int) -> str:
        """How much smaller a refused request must be."""
        left = (self._total_bytes or 0) - self._weights_at(kept) - self._num_kv_bytes()
        share = max(0, left) / kv_bytes
        return f"there is room for {share:.0%} of its tokens: ask for fewer, or give a larger budget"

    def _num_kv_bytes(self) -> int:
        return sum(self._kv_bytes.values())

    def _widest(self, kv_bytes: int) -> int:
        fitting = [bits for bits in self._weight_bytes if self._fits(bits, kv_bytes)]
        return max(fitting, default=min(self._weight_bytes))

    def _fits(self, bits: float, kv_bytes: int) -> bool:
        return self._total_bytes is None or self._weights_at(bits) + kv_bytes <= self._total_bytes

    def _weights_at(self, bits: float) -> int:
        """A fraction reads no more than the next whole width."""
        return next(num_bytes for width, num_bytes in self._weight_bytes.items() if width >= bits)

    def _refusal(self, bits: float, kv_bytes: int, hint: str) -> DoesNotFitError:
        return DoesNotFitError(
            f"weights at {bits:g} bits take {_mb(self._weights_at(bits))} and KV caches {_mb(kv_bytes)}; "
            f"the memory budget is {_mb(self._total_bytes or 0)}",
            hint=hint,
        )


def memory_pressure(path: Path = Path("/proc/pressure/memory")) -> float:
    """Percent of the last 10 s in which some task waited for memory; 0 where the system does not say."""
    try:
        text = path.read_text(encoding="ascii")
        return float(text.split("avg10=")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return 0.0


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
