"""The policies that need nothing but counting: fixed, exact, phase-aware, static progressive."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from taper.errors import UsageError
from taper.precision.policy import StepContext

# Decode widths of the default schedule, one for each third of the token limit. Their mean is 4 bits, the
# bytes of fixed:4, with the bits moved to where an error costs most: every later token reads what the early
# tokens wrote (PMPD, arXiv 2410.13461, section 3: quality with p_h in the first part of decoding only is
# about that of p_h throughout). 3 is the floor: PMPD's pairs for models below 7 B are 4/3, and long runs at 2
# bits fall into repetition (AnyBCQ's rerun of PMPD).
DEFAULT_DECODE_BITS = (5, 4, 3)


@dataclass(frozen=True)
class Fixed:
    """The same bits for every pass."""

    width: float

    @property
    def name(self) -> str:
        """`fixed:B`."""
        return f"fixed:{self.width:.9g}"

    def bits(self, step: StepContext) -> float:
        """The one width."""
        return self.width


@dataclass(frozen=True)
class Exact:
    """Every token from logits at `width`, in less time: the first planes draft, `width` bits verify.

    For whoever only asks for bits it is `Fixed`; the engine drafts (`taper.engine.speculation`). The output
    is that of `Fixed` with the same width and seed, token for token. `draft_width` None leaves the bits of
    the drafts to what the engine measures.

    Raises:
        UsageError: drafts at as many bits as the verification, or more.
    """

    width: float
    draft_width: float | None = None

    def __post_init__(self) -> None:
        if self.draft_width is not None and self.draft_width >= self.width:
            raise UsageError(
                f"policy {self.name!r} drafts at {self.draft_width:g} bits; it must be below {self.width:g}",
                "give the larger width first, as in exact:8/4",
            )

    @property
    def name(self) -> str:
        """`exact:H` or `exact:H/D`."""
        return f"exact:{self.width:.9g}" + ("" if self.draft_width is None else f"/{self.draft_width:.9g}")

    def bits(self, step: StepContext) -> float:
        """The width that tokens are drawn at."""
        return self.width


@dataclass(frozen=True)
class PhaseAware:
    """One width for the prompt and one for every decode pass."""

    prefill_bits: float
    decode_bits: float

    @property
    def name(self) -> str:
        """`phase:P/D`."""
        return f"phase:{self.prefill_bits:.9g}/{self.decode_bits:.9g}"

    def bits(self, step: StepContext) -> float:
        """The width of the step's phase."""
        return self.prefill_bits if step.phase == "prefill" else self.decode_bits


@dataclass(frozen=True)
class Progressive:
    """Bits that only fall as the answer grows, at given switch points (PMPD, section 3).

    `points` are (bits, start): the token with index `start` (from 0) and those after it are drawn from passes
    at `bits`. The first start is 0 and covers the prompt, because the prompt's last pass draws token 0; the
    prompt's bits may be more, `prefill_bits`. PMPD counts decode passes instead: its s passes at p_h are a
    switch at start = s + 1 here, and its rule that the first decode pass always runs at p_h is a first switch
    at 2 or later.
    """

    points: tuple[tuple[float, int], ...]
    prefill_bits: float | None = None

    @cached_property
    def name(self) -> str:
        """`progressive:B@START,...`, or `progressive:P/B@START,...` with bits of the prompt's own."""
        prefill = "" if self.prefill_bits is None else f"{self.prefill_bits:.9g}/"
        return f"progressive:{prefill}" + ",".join(f"{bits:.9g}@{start}" for bits, start in self.points)

    def bits(self, step: StepContext) -> float:
        """The prompt's bits, or those of the last switch point that the sequence has reached."""
        if step.phase == "prefill" and self.prefill_bits is not None:
            return self.prefill_bits
        return next(bits for bits, start in reversed(self.points) if start <= step.num_generated)


@dataclass(frozen=True)
class ProgressiveThirds:
    """The default schedule: the prompt at `prefill_bits`, then one decode width for each third of the token
    limit.

    Prefill reads the weights once for many tokens, so more bits cost little there and give a better KV cache.
    PMPD's released code switches at thirds of the token limit, too.
    """

    prefill_bits: int
    decode_bits: tuple[int, int, int]

    @property
    def name(self) -> str:
        """`progressive`."""
        return "progressive"

    def bits(self, step: StepContext) -> float:
        """Width of the third that the next token falls in."""
        if step.phase == "prefill":
            return self.prefill_bits
        return self.decode_bits[min(2, 3 * step.num_generated // step.max_tokens)]

    @classmethod
    def for_widths(cls, min_bits: int, max_bits: int) -> ProgressiveThirds:
        """For a model with these widths: the prompt at all bits, decode at the widths nearest to 5, 4, 3."""
        first, second, third = (max(min_bits, min(max_bits, bits)) for bits in DEFAULT_DECODE_BITS)
        return cls(max_bits, (first, second, third))
