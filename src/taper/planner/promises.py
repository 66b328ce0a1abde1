"""Whether a set of sequences can all be served by their deadlines: two sufficient conditions.

Either is enough to admit a request, for a server that follows its plan can keep to it: more requests are
admitted later only under the same test. A member more never makes a test pass that failed.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field, replace
from math import inf
from typing import NamedTuple

from taper.planner.forecast import PassTimes

# Prompt rows beside the decoded ones that steady passes are planned with. 12 served 1 to 3 % more at 1 and 2
# times saturation than 24, and 48 served 5 to 15 % less.
STEADY_ROWS = 12


class Option(NamedTuple):
    """A sequence as the promises see it.

    Attributes:
        tokens: that it decodes yet, at most.
        left_s: seconds to its deadline; inf: none.
        unread: prompt tokens that it has not run.
        bits: the least width that its floor allows.
        blocks: of the KV cache that it may need and does not have yet.
        first_s: seconds in which its prompt has to be run.
    """

    tokens: int
    left_s: float
    unread: int
    bits: float
    blocks: int = 0
    first_s: float = inf


@dataclass(slots=True)
class Members:
    """Sequences that run or shall run.

    Attributes:
        times: of passes.
        bits: width of the passes, at least every floor.
        entries: that a decoded token sees on average.
        count: of sequences.
        unread: prompt tokens still to be run, of all members.
        pace_s: seconds that a steady pass may take, the least over the members.
        bounded: (tokens left, seconds left) of each member, rising.
        first_s: seconds in which all prompts have to be run, for answers that are cut at their deadline.
    """

    times: PassTimes
    bits: float
    entries: int
    count: int = 0
    unread: int = 0
    pace_s: float = inf
    bounded: list[tuple[int, float]] = field(default_factory=list)
    first_s: float = inf

    def copy(self) -> Members:
        """The same members, to be added to by themselves."""
        return replace(self, bounded=self.bounded.copy())

    def add(self, one: Option) -> None:
        """Take a sequence in."""
        self.count += 1
        if one.bits > self.bits:
            self.bits = one.bits
        passes: float = one.tokens
        if one.unread:
            self.unread += one.unread
            passes += self.unread / STEADY_ROWS
        pace = one.left_s / passes
        if pace < self.pace_s:
            self.pace_s = pace
        if one.first_s < self.first_s:
            self.first_s = one.first_s
        insort(self.bounded, (one.tokens, one.left_s))

    def take(self, one: Option) -> bool:
        """Take a sequence in where either condition then holds at the width that all need."""
        before = self.bits, self.unread, self.pace_s, self.first_s
        self.add(one)
        if self.is_steady(self.bits) or self.can_drain(self.bits):
            return True
        self.count -= 1
        self.bounded.remove((one.tokens, one.left_s))
        self.bits, self.unread, self.pace_s, self.first_s = before
        return False

    def is_steady(self, bits: float) -> bool:
        """Whether passes over all members, with a few prompt rows in each, are fast enough for everybody's
        pace even if every sequence that ends is followed by another one."""
        seconds = self.times.decode(bits, self.count, self.entries, STEADY_ROWS)
        return seconds <= self.pace_s and (self.unread / STEADY_ROWS + 1) * seconds <= self.first_s

    def can_drain(self, bits: float) -> bool:
        """Whether all finish in time when prompts are run first and nobody else comes.

        With tokens left r_1 <= ... <= r_n and prompts of D seconds, one pass to carry them included,
        finish_j = D + the sum over k <= j of (r_k - r_(k-1)) T(bits, n - k + 1).
        """
        rows, before = self.count, 0
        seconds = self.times.by_rows(bits, rows, self.entries)
        factor = self.times.residuals.factor(bits)
        finish = 0.0
        if self.unread:
            finish = self.unread * self.times.prompt_token(bits) + seconds[rows] * factor
            if finish > self.first_s:
                return False
        for tokens, left_s in self.bounded:
            if tokens > before:
                finish += (tokens - before) * seconds[rows] * factor
                before = tokens
            if finish > left_s:
                return False
            rows -= 1
        return True

    def prompt_rows(self, most: int, decoding: int) -> int:
        """Rows of prompts for the next pass.

        All that fit where prompts may come first, otherwise as many as the member with the least slack can
        wait for if every later pass is a steady one.
        """
        if self.can_drain(self.bits):
            return most
        steady = self.times.decode(self.bits, self.count, self.entries, STEADY_ROWS)
        slack = min(left_s - (tokens - 1) * steady for tokens, left_s in self.bounded)
        rows = most
        while rows > STEADY_ROWS:
            if self.times.decode(self.bits, decoding, self.entries, rows) <= slack:
                return rows
            rows = rows * 3 // 4
        return min(most, STEADY_ROWS)
