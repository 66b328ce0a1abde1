"""Which bits for this memory, or for this loss: a decision over the card and the footprints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taper.errors import DoesNotFitError, UsageError


@dataclass(frozen=True, slots=True)
class Choice:
    """One reading that could be recommended.

    Attributes:
        bits: of the reading.
        total_bytes: of the file that holds it.
        peak_bytes: memory that it takes.
        card: its entry in the quality card; None where it was not measured.
    """

    bits: float
    total_bytes: int
    peak_bytes: int
    card: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What is asked for; None asks for nothing.

    Attributes:
        memory_bytes: at most so much.
        loss_frac: perplexity at most so much over the float model's.
        kl: mean KL divergence at most so much, in nats.
    """

    memory_bytes: int | None = None
    loss_frac: float | None = None
    kl: float | None = None

    @property
    def is_about_loss(self) -> bool:
        """Whether a card is needed."""
        return self.loss_frac is not None or self.kl is not None

    def accepts_loss(self, choice: Choice) -> bool:
        """Whether the card's figures are within the limits."""
        if not self.is_about_loss:
            return True
        if choice.card is None:
            return False
        loss, kl = choice.card["increase_frac"], choice.card["kl_mean"]
        return (self.loss_frac is None or loss <= self.loss_frac) and (self.kl is None or kl <= self.kl)

    def accepts_memory(self, choice: Choice) -> bool:
        """Whether it fits."""
        return self.memory_bytes is None or choice.peak_bytes <= self.memory_bytes


def recommend(choices: Sequence[Choice], limits: Limits) -> Choice | None:
    """The reading to take: with a limit on loss the smallest one within it, else the largest that fits.

    Returns None where no limit is given.

    Args:
        choices: at least one.
        limits: what is asked for.

    Raises:
        UsageError: a limit on loss for a file without a card.
        DoesNotFitError: nothing is within the limits; the message names the nearest reading.
    """
    ordered = sorted(choices, key=lambda choice: (choice.peak_bytes, choice.bits))
    if limits.is_about_loss and all(choice.card is None for choice in ordered):
        raise UsageError(
            "the file has no quality card, so nobody knows what its widths lose",
            hint="measure it: taper eval FILE --text TEXT --against HF_DIR --write-card",
        )
    if limits == Limits():
        return None
    fitting = [choice for choice in ordered if limits.accepts_memory(choice)]
    good = [choice for choice in ordered if limits.accepts_loss(choice)]
    if not fitting:
        raise DoesNotFitError(
            f"nothing fits {limits.memory_bytes or 0:,} bytes: {ordered[0].bits:g} bits need "
            f"{ordered[0].peak_bytes:,}",
            hint="shorten the context (--context), or quantise a smaller model",
        )
    if not good:
        raise DoesNotFitError(
            f"no width is within the loss asked for: {_loss(_best(ordered))}",
            hint="allow more loss, or quantise to more bits",
        )
    both = [choice for choice in good if limits.accepts_memory(choice)]
    if not both:
        raise DoesNotFitError(
            f"what fits loses too much: {_loss(_best(fitting))}; {good[0].bits:g} bits would do and need "
            f"{good[0].peak_bytes:,} bytes",
            hint="allow more loss or more memory, or shorten the context (--context)",
        )
    return both[0] if limits.is_about_loss else both[-1]


def _best(choices: Sequence[Choice]) -> Choice:
    """The measured one with the least KL; the last where none was measured."""
    measured = [choice for choice in choices if choice.card is not None]
    return (
        min(measured, key=lambda choice: choice.card["kl_mean"] if choice.card else 0.0)
        if measured
        else choices[-1]
    )


def _loss(choice: Choice) -> str:
    if choice.card is None:
        return f"{choice.bits:g} bits were not measured"
    return (
        f"{choice.bits:g} bits lose {choice.card['increase_frac']:+.2%} in perplexity and "
        f"{choice.card['kl_mean']:.5f} nats"
    )
