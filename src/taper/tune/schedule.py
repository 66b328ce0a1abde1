"""Schedules of bits as the search sees them: the prompt's bits, then runs of tokens at one width each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from taper.errors import UsageError

# A schedule of 16 segments is some 600 bytes: 120 MB in all. 7 widths and 16 segments make 100,947.
MAX_SCHEDULES = 200_000


@dataclass(frozen=True)
class Schedule:
    """Bits of the prompt and of every token of an answer.

    Attributes:
        prefill_bits: of the prompt, whose last pass draws token 0.
        runs: (bits, tokens) in the order of the answer. Token 0 counts in the first run, but costs it no
            pass.
    """

    prefill_bits: float
    runs: tuple[tuple[float, int], ...]

    @property
    def max_tokens(self) -> int:
        """Tokens of the whole answer."""
        return sum(count for _, count in self.runs)

    @cached_property
    def decode_bits(self) -> tuple[float, ...]:
        """Bits of each decode pass: of the tokens from 1 on."""
        bits = [bits for bits, count in self.runs for _ in range(count)]
        return tuple(bits[1:])

    @property
    def average_bits(self) -> float:
        """Mean over the decode passes; the prompt's where there is none."""
        return math.fsum(self.decode_bits) / len(self.decode_bits) if self.decode_bits else self.prefill_bits

    @property
    def is_monotone(self) -> bool:
        """Whether bits never rise, from the prompt on."""
        widths = [self.prefill_bits, *(bits for bits, _ in self.runs)]
        return all(later <= bits for bits, later in itertools.pairwise(widths))

    @cached_property
    def key(self) -> str:
        """One text for schedules of the same bits, as in 8/4@0,3@64."""
        points: list[tuple[float, int]] = []
        start = 0
        for bits, count in self.runs:
            if not points or points[-1][0] != bits:
                points.append((bits, start))
            start += count
        return f"{self.prefill_bits:.9g}/" + ",".join(f"{bits:.9g}@{start}" for bits, start in points)

    @property
    def policy(self) -> str | None:
        """The policy's text (docs/policies.md), or None where bits rise within the answer."""
        prefill, _, points = self.key.partition("/")
        if "," not in points:
            decode = points.removesuffix("@0")
            return f"fixed:{decode}" if decode == prefill else f"phase:{prefill}/{decode}"
        if not self.is_monotone:
            return None
        first = points.partition("@")[0]
        return f"progressive:{points}" if first == prefill else f"progressive:{prefill}/{points}"


def uniform(bits: float, max_tokens: int, prefill_bits: float | None = None) -> Schedule:
    """One width for every decode pass, and for the prompt too unless it has bits of its own."""
    return Schedule(bits if prefill_bits is None else prefill_bits, ((bits, max_tokens),))


def segment_lengths(max_tokens: int, num_segments: int) -> list[int]:
    """An answer's tokens cut into segments that differ by one token at most.

    Raises:
        UsageError: no segment, or more segments than tokens.
    """
    if not 1 <= num_segments <= max_tokens:
        raise UsageError(
            f"{num_segments} segments of {max_tokens} tokens; a segment needs at least one token",
            hint=f"choose 1 to {max_tokens} segments",
        )
    edges = [segment * max_tokens // num_segments for segment in range(num_segments + 1)]
    return [end - begin for begin, end in itertools.pairwise(edges)]


def monotone_schedules(widths: Sequence[float], max_tokens: int, num_segments: int) -> list[Schedule]:
    """Every schedule whose bits never rise from the prompt through the segments.

    There are C(G + W, W - 1) of them for G segments and W widths, since the prompt counts as one segment
    more.

    Raises:
        UsageError: no width, too many schedules, or as `segment_lengths`.
    """
    falling = sorted(set(widths), reverse=True)
    lengths = segment_lengths(max_tokens, num_segments)
    if not falling:
        raise UsageError("no widths to choose from")
    count = math.comb(num_segments + len(falling), len(falling) - 1)
    if count > MAX_SCHEDULES:
        raise UsageError(
            f"{len(falling)} widths and {num_segments} segments make {count:,} schedules; "
            f"the search takes {MAX_SCHEDULES:,}",
            hint="choose fewer widths or segments",
        )
    return [
        Schedule(prefill, tuple(zip(decode, lengths, strict=True)))
        for prefill, *decode in itertools.combinations_with_replacement(falling, num_segments + 1)
    ]
