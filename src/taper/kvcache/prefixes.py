"""Entries of ended sequences, kept for those that begin with the same tokens."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from taper.kvcache.planes import BLOCK_ENTRIES, PlanesCache

MAX_KEPT = 256  # sequences; their blocks go back to the pool earlier, when it runs short


@dataclass(frozen=True, slots=True)
class Found:
    """A prefix.

    Attributes:
        cache: to fork.
        num_tokens: that it shares, whole blocks.
        bits: that each of these entries was written at.
    """

    cache: PlanesCache
    num_tokens: int
    bits: list[float]


@dataclass(frozen=True, slots=True)
class _Kept:
    cache: PlanesCache
    keys: tuple[bytes, ...]
    bits: list[float]


class PrefixCache:
    """Caches of planes by the tokens that they hold, in whole blocks; the least recently used go first.

    Entries depend on the bits that they were written at, so a prefix says which these are.

    Args:
        max_kept: sequences at most.
    """

    def __init__(self, max_kept: int = MAX_KEPT) -> None:
        self._max_kept = max_kept
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._by_key: dict[bytes, list[int]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, tokens: Sequence[int], bits: Sequence[float], cache: PlanesCache) -> None:
        """Hold the whole blocks of a sequence, shared with its cache; nothing for less than a block, or what
        is there already.

        Args:
            tokens: ids of the cache's entries.
            bits: that each entry was written at.
            cache: of the sequence.
        """
        whole = len(tokens) // BLOCK_ENTRIES * BLOCK_ENTRIES
        if not whole or cache.keeps(whole) != whole:
            return
        keys, written = tuple(_keys(tokens[:whole])), list(bits[:whole])
        for number in self._by_key.get(keys[-1], ()):
            if self._kept[number].bits[:whole] == written:
                self._kept.move_to_end(number)
                return
        number = next(self._numbers)
        self._kept[number] = _Kept(cache.fork(whole, whole), keys, written)
        for key in keys:
            self._by_key.setdefault(key, []).append(number)
        if len(self._kept) > self._max_kept:
            self.drop_oldest()

    def find(self, tokens: Sequence[int], low: float, high: float) -> Found | None:
        """The longest prefix of which every entry was written at `low` to `high` bits; never all the tokens,
        for the last one's pass gives the first logits."""
        keys = _keys(tokens[: (len(tokens) - 1) // BLOCK_ENTRIES * BLOCK_ENTRIES])
        for depth in range(len(keys), 0, -1):
            num_tokens = depth * BLOCK_ENTRIES
            for number in self._by_key.get(keys[depth - 1], ()):
                kept = self._kept[number]
                bits = kept.bits[:num_tokens]
                if low <= min(bits) and max(bits) <= high and kept.cache.keeps(num_tokens) == num_tokens:
                    self._kept.move_to_end(number)
                    return Found(kept.cache, num_tokens, bits)
        return None

    def drop_oldest(self) -> bool:
        """Give the blocks of the least recently used back. Returns False when nothing is kept."""
        if not self._kept:
            return False
        number, kept = self._kept.popitem(last=False)
        for key in kept.keys:
            numbers = self._by_key[key]
            numbers.remove(number)
            if not numbers:
                del self._by_key[key]
        return True


def _keys(tokens: Sequence[int]) -> list[bytes]:
    """One digest for each whole block and all before it; of a kind that a hostile client cannot collide."""
    ids = np.asarray(tokens, "<i4")
    keys, before = [], b""
    for start in range(0, len(ids), BLOCK_ENTRIES):
        before = hashlib.blake2b(
            before + ids[start : start + BLOCK_ENTRIES].tobytes(), digest_size=16
        ).digest()
        keys.append(before)
    return keys
