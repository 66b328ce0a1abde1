"""How many planes a pass may read: those that have arrived, and those that the memory has room for."""

from __future__ import annotations

from collections.abc import Callable

from taper.engine.memory_budget import MemoryBudget
from taper.engine.sequence import Sequence
from taper.precision import Phase

NO_LIMIT = 1 << 16


class Limits:
    """The ceiling over every policy of an engine. Without arguments there is none.

    Args:
        available_bits: planes that have arrived; every request gets by with them.
        budget: of memory; only requests that allow it get fewer bits than they want.
    """

    def __init__(
        self, available_bits: Callable[[], int] | None = None, budget: MemoryBudget | None = None
    ) -> None:
        self._available_bits = available_bits
        self._budget = budget

    def bits(self) -> int:
        """The most that a pass can have now."""
        arrived = self._arrived()
        return arrived if self._budget is None else min(arrived, self._budget.bits())

    def admit(self, sequence: Sequence, kv_bytes: int) -> None:
        """Make room for a sequence's KV cache. Raises DoesNotFitError where there is none at any bits."""
        if self._budget is not None:
            self._budget.admit(sequence, kv_bytes)

    def leave(self, sequence: Sequence) -> None:
        """Take its room back; a sequence that was never admitted has none."""
        if self._budget is not None:
            self._budget.leave(sequence)

    def clamp(self, sequence: Sequence, phase: Phase, wanted: float) -> float:
        """The bits of the next pass, for which the policy wants `wanted`.

        Raises:
            DoesNotFitError: the budget has no room for them, and the request does not allow fewer.
        """
        if self._budget is None and self._available_bits is None:
            return wanted
        ceiling = self._arrived()
        if self._budget is not None:
            ceiling = min(ceiling, self._budget.bits_for(sequence, min(wanted, ceiling)))
        if not sequence.ceilings or sequence.ceilings[-1][1] != ceiling:
            sequence.ceilings.append((len(sequence.tokens), ceiling))
        if phase == "prefill" and wanted > ceiling:
            sequence.missed_bits = max(sequence.missed_bits, wanted)
        return min(wanted, ceiling)

    def _arrived(self) -> int:
        return NO_LIMIT if self._available_bits is None else self._available_bits()
