"""Blocks of a KV cache of planes, handed out to sequences and shared between them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from taper.errors import DoesNotFitError
from taper.kernels import PlanesLayout
from taper.kvcache.memory import anonymous

U8 = npt.NDArray[np.uint8]

# From here on a pool asks for pages of 2 MiB: attention over 8,192 entries in 4 KiB pages took 10 % longer.
_HUGE_PAGES_BYTES = 8 << 20


class Parts:
    """Equal pieces of memory with a count of who holds each.

    Args:
        count: of pieces.
        part_bytes: of each.

    Attributes:
        memory: uint8 (count, part_bytes).
    """

    def __init__(self, count: int, part_bytes: int) -> None:
        self.memory: U8 = anonymous(count * part_bytes, count * part_bytes >= _HUGE_PAGES_BYTES).reshape(
            count, part_bytes
        )
        self._holders = [0] * count
        # Handed out from the low end, so that what is resident stays together.
        self._free = list(range(count - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pieces that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A piece, held once; its bytes are whatever they were. Raises DoesNotFitError when there is none."""
        if not self._free:
            raise DoesNotFitError(
                f"all {len(self._holders)} blocks of the KV cache are in use",
                "let a request finish, or give the pool more blocks",
            )
        index = self._free.pop()
        self._holders[index] = 1
        return index

    def share(self, index: int) -> None:
        """Hold a piece once more."""
        assert self._holders[index] > 0
        self._holders[index] += 1

    def give_back(self, index: int) -> None:
        """Hold a piece once less; free when nobody does."""
        assert self._holders[index] > 0
        self._holders[index] -= 1
        if not self._holders[index]:
            self._free.append(index)

    def is_shared(self, index: int) -> bool:
        """Whether more than one holds it."""
        return self._holders[index] > 1

    def check_integrity(self) -> None:
        """Raises AssertionError unless each piece is either held or free, and free once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert all((index in free) == (count == 0) for index, count in enumerate(self._holders)), (
            "a block is lost"
        )


class KvPool:
    """The blocks that sequences draw from: upper parts, and lower ones where the layout has them.

    Args:
        layout: what a block holds.
        num_blocks: of 64 entries each; address space only, until they are written.
        num_lower: lower parts, where fewer are enough; as many as blocks when None.

    Raises:
        DoesNotFitError: when the system refuses the address space.
    """

    def __init__(self, layout: PlanesLayout, num_blocks: int, num_lower: int | None = None) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.upper = Parts(num_blocks, layout.upper_bytes)
        self.lower = (
            Parts(num_blocks if num_lower is None else num_lower, layout.lower_bytes)
            if layout.lower_bytes
            else None
        )

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self.upper.num_free

    def check_integrity(self) -> None:
        """Raises AssertionError when a block is lost or free twice."""
        self.upper.check_integrity()
        if self.lower is not None:
            self.lower.check_integrity()
