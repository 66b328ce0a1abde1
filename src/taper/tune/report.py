"""What a tuning found, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One schedule on the held-out prompts.

    Attributes:
        role: candidate, winner, or the control's name.
        bits: the schedule, prompt/width@token.
        policy: its text, or None where bits rise within the answer.
        average_bits: mean over the decode passes of an answer of full length.
        cost: mean cost of a token, by the objective's table.
        saved_frac: of uniform high's cost.
        loss: estimate.
        standard_error: what one standard error of the mean over documents adds to the loss.
        upper: 95 % upper confidence bound of the loss.
        search_loss: by which the search ranked it; None for what it did not rank.
        beyond_winner, beyond_winner_error: loss minus the winner's and its paired standard error.
        token_ms: time of a token, prompt and decode, measured with the engine; None where not measured.
    """

    role: str
    bits: str
    policy: str | None
    average_bits: float
    cost: float
    saved_frac: float
    loss: float
    standard_error: float
    upper: float
    search_loss: float | None = None
    beyond_winner: float | None = None
    beyond_winner_error: float | None = None
    token_ms: float | None = None


@dataclass(frozen=True, slots=True)
class TuneReport:
    """The result of `tune`.

    Attributes:
        task: its name.
        objective, unit: what was minimised, and its unit.
        loss, loss_summary, max_loss: what was limited.
        confidence: of the upper bounds.
        high_bits: the uniform width to compare with.
        reference: what the loss compares with.
        widths, num_segments, max_tokens, prompt_tokens: of the schedules and prompts (the median prompt).
        num_schedules: possible ones.
        search_prompts, held_out_prompts, held_out_documents: counts.
        prefill_costs, decode_costs: cost of the prompt and of a decode pass by width.
        candidates: the ladder as far as it was tested, in order; all but the last have passed, and the last
            has where none is left.
        winner: the cheapest candidate that passed; None where none did.
        shown: what the controls are of: the winner, or the safest candidate where none passed.
        controls: beside it, on the same prompts.
    """

    task: str
    objective: str
    unit: str
    loss: str
    loss_summary: str
    max_loss: float
    confidence: float
    high_bits: float
    reference: str
    widths: tuple[float, ...]
    num_segments: int
    max_tokens: int
    prompt_tokens: int
    num_schedules: int
    search_prompts: int
    held_out_prompts: int
    held_out_documents: int
    prefill_costs: dict[float, float]
    decode_costs: dict[float, float]
    candidates: tuple[Row, ...]
    winner: Row | None
    shown: Row | None
    controls: tuple[Row, ...]

    @property
    def engine_saved_frac(self) -> float | None:
        """What the shown schedule saves of uniform high's measured time; None without a schedule."""
        high = next((row for row in self.controls if row.policy == f"fixed:{self.high_bits:.9g}"), None)
        if self.shown is None or not self.shown.token_ms or high is None or not high.token_ms:
            return None
        return 1.0 - self.shown.token_ms / high.token_ms

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def evidence(self) -> dict[str, Any]:
        """What is kept in the file beside the winner's policy."""
        assert self.winner is not None
        row = self.winner
        return {
            "policy": row.policy,
            "high_bits": self.high_bits,
            "objective": self.objective,
            "saved_frac": row.saved_frac,
            "average_bits": row.average_bits,
            "loss": self.loss,
            "loss_frac": row.loss,
            "loss_upper": row.upper,
            "max_loss": self.max_loss,
            "confidence": self.confidence,
            "held_out_documents": self.held_out_documents,
            "max_tokens": self.max_tokens,
        }
