"""From a policy's text to the policy."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

from taper.errors import UsageError
from taper.formats.learned import LearnedScheduler
from taper.precision.kinds import Exact, Fixed, PhaseAware, Progressive, ProgressiveThirds
from taper.precision.learned import Learned
from taper.precision.policy import PrecisionPolicy, whole_bits

EXAMPLES = "write fixed:4, exact, exact:8/4, phase:6/3, learned, progressive or progressive:6@0,4@16,3@64"


@dataclass(frozen=True, slots=True)
class _Source:
    """A policy's text and the widths it may use."""

    text: str
    min_bits: int
    max_bits: int
    allows_fractions: bool
    learned: LearnedScheduler | None

    @property
    def widths(self) -> str:
        """The model's widths in words."""
        return describe_widths(self.min_bits, self.max_bits)

    def bits(self, word: str) -> float:
        """One width, checked against the model's: an int where it is a whole number."""
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", word, re.ASCII):
            raise self.refuse(f"{word!r} is not a number of bits")
        bits = whole_bits(float(word))
        if not self.min_bits <= bits <= self.max_bits:
            raise UsageError(
                f"policy {self.text!r} asks for {bits:g} bits; this model holds {self.widths}",
                f"choose a width from {self.min_bits} to {self.max_bits}",
            )
        if not (self.allows_fractions or isinstance(bits, int)):
            raise UsageError(
                f"policy {self.text!r} asks for {bits:g} bits; a fraction needs a file with sensitivity",
                "choose a whole number, or measure it: taper allocate FILE --text TEXT",
            )
        return bits

    def integer(self, word: str) -> int:
        """A count in plain decimal digits."""
        if not (word.isascii() and word.isdigit() and len(word) <= 9):
            raise self.refuse(f"{word!r} is not a count")
        return int(word)

    def refuse(self, reason: str) -> UsageError:
        """The error for text that is no policy."""
        return UsageError(f"policy {self.text!r}: {reason}", EXAMPLES)


def describe_widths(min_bits: int, max_bits: int) -> str:
    """`2 to 8 bits`, or `32 bits` where there is one width."""
    return f"{max_bits} bits" if min_bits == max_bits else f"{min_bits} to {max_bits} bits"


def parse_policy(
    text: str,
    min_bits: int,
    max_bits: int,
    allows_fractions: bool = False,
    learned: LearnedScheduler | None = None,
) -> PrecisionPolicy:
    """Read a policy's text for a model of the given widths.

    `fixed:B`; `exact[:H[/D]]` (the output of fixed:H, drafted at D bits; without them H is the largest width
    and the engine chooses D); `phase:P/D` (prompt at P bits, decode at D); `progressive:B@0,B@N,...` (prompt
    and first tokens at the first width, from the token with index N on at the next; bits never rise);
    `progressive:P/B@0,B@N,...` (the prompt at P bits of its own); `progressive` (a default for the model's
    widths, `ProgressiveThirds`). Bits may be a fraction, as in fixed:3.3, where `allows_fractions` says that
    the model holds the sensitivity to spend it by. `learned` (decided once the prompt is read, by the
    scheduler of the model's file, given as `learned`) makes a new policy each time.

    Raises:
        UsageError: not a policy, bits that the model does not hold, bits that rise.
    """
    source = _Source(text, min_bits, max_bits, allows_fractions, learned)
    kind, _, argument = text.strip().partition(":")
    if kind not in KINDS:
        raise source.refuse(f"no policy is called {kind!r}; there are {', '.join(KINDS)}")
    return KINDS[kind](source, argument)


def _fixed(source: _Source, argument: str) -> PrecisionPolicy:
    return Fixed(source.bits(argument))


def _exact(source: _Source, argument: str) -> PrecisionPolicy:
    if source.text.strip() == "exact":
        return Exact(source.max_bits)
    verify, slash, draft = argument.partition("/")
    return Exact(source.bits(verify), source.bits(draft) if slash else None)


def _phase(source: _Source, argument: str) -> PrecisionPolicy:
    prefill, slash, decode = argument.partition("/")
    if not slash:
        raise source.refuse("phase takes two widths with a slash between them")
    return PhaseAware(source.bits(prefill), source.bits(decode))


def _progressive(source: _Source, argument: str) -> PrecisionPolicy:
    if source.text.strip() == "progressive":
        return ProgressiveThirds.for_widths(source.min_bits, source.max_bits)
    before, slash, switches = argument.rpartition("/")
    points = tuple(_switch_point(source, word) for word in switches.split(","))
    if points[0][1] != 0:
        raise source.refuse(f"the first switch point is at token {points[0][1]}; it must be at 0")
    for (bits, start), (next_bits, next_start) in itertools.pairwise(points):
        if next_start <= start:
            raise source.refuse(f"switch point {next_start} does not come after {start}")
        if next_bits > bits:
            raise source.refuse(
                f"bits rise from {bits:g} to {next_bits:g} at token {next_start}; they may only fall"
            )
    prefill_bits = source.bits(before) if slash else None
    if prefill_bits is not None and prefill_bits < points[0][0]:
        raise source.refuse(
            f"bits rise from {prefill_bits:g} in the prompt to {points[0][0]:g}; they may only fall"
        )
    # One text for one policy: a prompt at the first width needs no bits of its own.
    return Progressive(points, None if prefill_bits == points[0][0] else prefill_bits)


def _learned(source: _Source, argument: str) -> PrecisionPolicy:
    if source.text.strip() != "learned":
        raise source.refuse("learned takes nothing more")
    if source.learned is None:
        raise UsageError(
            f"policy {source.text!r}: this model's file has no learned scheduler",
            "train one: taper tune FILE --learned --text TEXT",
        )
    for bits in (*source.learned.widths, source.learned.prefill_bits):
        source.bits(f"{bits:.9g}")
    return Learned(source.learned)


def _switch_point(source: _Source, word: str) -> tuple[float, int]:
    bits, at, start = word.partition("@")
    if not at:
        raise source.refuse(f"{word!r} is no switch point; it needs bits@token")
    return source.bits(bits), source.integer(start)


KINDS: dict[str, Callable[[_Source, str], PrecisionPolicy]] = {
    "fixed": _fixed,
    "exact": _exact,
    "phase": _phase,
    "progressive": _progressive,
    "learned": _learned,
}
