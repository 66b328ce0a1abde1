"""The policies that are compared: Taper's own by their text, and the controls that Taper itself refuses.

In a text `{top}` is the model's largest width, and `{1/3}` the switch after that share of the token limit L:
PMPD's s = floor(L / 3) decode passes come before it, so it is token s + 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from common import BenchmarkError

from taper.engine import LLM
from taper.precision import (
    Fixed,
    PhaseAware,
    PrecisionPolicy,
    Progressive,
    ProgressiveThirds,
    StepContext,
    whole_bits,
)

FULL = "fixed:{top}"
# Prompt at all planes, then the widths of three thirds of the answer, falling and rising.
FALLING = {
    "3, 2, 2": "progressive:{top}/3@0,2@{1/3}",
    "3, 3, 2": "progressive:{top}/3@0,2@{2/3}",
    "4, 3, 3": "progressive:{top}/4@0,3@{1/3}",
    "4, 3, 2": "progressive:{top}/4@0,3@{1/3},2@{2/3}",
    "5, 4, 3": "progressive:{top}/5@0,4@{1/3},3@{2/3}",
}
REVERSE = {
    "3, 2, 2": "schedule:{top}/2@0,3@{2/3}",
    "3, 3, 2": "schedule:{top}/2@0,3@{1/3}",
    "4, 3, 3": "schedule:{top}/3@0,4@{2/3}",
    "4, 3, 2": "schedule:{top}/2@0,3@{1/3},4@{2/3}",
    "5, 4, 3": "schedule:{top}/3@0,4@{1/3},5@{2/3}",
}
MIXED = {widths: f"cycle:{{top}}/{widths.replace(' ', '')}" for widths in FALLING}
BY_LAYER = {"3, 2, 2": "phase:{top}/2.33", "3, 3, 2": "phase:{top}/2.67", "4, 3, 3": "phase:{top}/3.33"}
# Both at once: budgets by layer that fall, and rise; 3 as a fraction, so that it is spent by layer, too.
FALLING_BY_LAYER = "progressive:{top}/3.01@0,2.67@{1/3},2.33@{2/3}"
REVERSE_BY_LAYER = "schedule:{top}/2.33@0,2.67@{1/3},3.01@{2/3}"
EVEN = {"4, 3, 2": "phase:{top}/3", "5, 4, 3": "phase:{top}/4"}
# Family to its policies at several budgets. The pairs are the paper's, 3/2 and 4/3.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "full": (FULL,),
    "uniform": ("fixed:2", "fixed:3", "fixed:4", "fixed:5"),
    "uniform, by layer": ("fixed:2.33", "fixed:2.67", "fixed:3.33", "fixed:3.67"),
    "phase": ("phase:3/2", "phase:4/3", "phase:{top}/2", "phase:{top}/3", "phase:{top}/4"),
    "phase, by layer": tuple(BY_LAYER.values()),
    "falling, by layer": (FALLING_BY_LAYER,),
    "reverse, by layer": (REVERSE_BY_LAYER,),
    "static": (
        "progressive:3@0,2@{1/3}",
        "progressive:3@0,2@{2/3}",
        "progressive:4@0,3@{1/3}",
        "progressive:4@0,3@{2/3}",
    ),
    "falling": tuple(FALLING.values()),
    "mixed": tuple(MIXED.values()),
    "reverse": tuple(REVERSE.values()),
    "opposite": ("phase:2/3", "phase:2/4", "phase:3/4", "phase:2/{top}"),
}
# What is compared, first with second. All but those that say so read as many bits in their decode passes.
COMPARISONS: tuple[tuple[str, str, str], ...] = (
    ("prompt at 3, not 2; decode at 2", "phase:3/2", "fixed:2"),
    ("prompt at all, not 2; decode at 2", "phase:{top}/2", "fixed:2"),
    ("prompt at 4, not 3; decode at 3", "phase:4/3", "fixed:3"),
    ("prompt at all, not 3; decode at 3", "phase:{top}/3", "fixed:3"),
    *((f"falling {widths}, not rising", FALLING[widths], REVERSE[widths]) for widths in FALLING),
    *((f"falling {widths}, not mixed", FALLING[widths], MIXED[widths]) for widths in FALLING),
    *((f"falling {widths}, not even", FALLING[widths], EVEN[widths]) for widths in EVEN),
    *((f"falling {widths}, not by layer", FALLING[widths], BY_LAYER[widths]) for widths in BY_LAYER),
    ("by layer, falling 3.01, 2.67, 2.33, not even", FALLING_BY_LAYER, BY_LAYER["3, 3, 2"]),
    ("by layer, falling 3.01, 2.67, 2.33, not rising", FALLING_BY_LAYER, REVERSE_BY_LAYER),
    ("opposite 2/3, not 3/3 (prompt cheaper)", "phase:2/3", "fixed:3"),
    ("opposite 2/3, not all/2 (decode dearer)", "phase:2/3", "phase:{top}/2"),
    ("opposite 2/4, not all/3 (decode dearer)", "phase:2/4", "phase:{top}/3"),
)


@dataclass(frozen=True)
class Schedule:
    """Switch points in any order of widths, and a width for the prompt: the reverse of `Progressive`, too.

    `points` are (bits, start); the token with index start and those after it are drawn at these bits.
    """

    name: str
    prefill_bits: float
    points: tuple[tuple[float, int], ...]

    def bits(self, step: StepContext) -> float:
        """Bits of the last switch point that the sequence has reached."""
        if step.phase == "prefill":
            return self.prefill_bits
        return next(bits for bits, start in reversed(self.points) if start <= step.num_generated)


@dataclass(frozen=True)
class Cycle:
    """Widths that take turns from one decode pass to the next: a flat mix of some average bits."""

    name: str
    prefill_bits: float
    widths: tuple[float, ...]

    def bits(self, step: StepContext) -> float:
        """The next width in turn."""
        if step.phase == "prefill":
            return self.prefill_bits
        return self.widths[(step.num_generated - 1) % len(self.widths)]


# Policies that only count: the bits of every pass are known before the first.
COUNTING = (Fixed, PhaseAware, Progressive, ProgressiveThirds, Schedule, Cycle)


def resolve(text: str, top: int, limit: int) -> str:
    """A policy's text with the model's largest width and the task's switch points filled in."""

    def switch(found: re.Match[str]) -> str:
        share = Fraction(int(found[1]), int(found[2]))
        return str(floor(share * limit) + 1)

    return re.sub(r"\{(\d+)/([1-9]\d*)\}", switch, text.replace("{top}", str(top)))


def policy_of(llm: LLM, text: str, limit: int) -> PrecisionPolicy:
    """A fresh policy for one request.

    `schedule:P/B@0,B@N,...` is progressive without the rule that bits fall, `cycle:P/B,B,...` takes turns;
    the rest is Taper's, names in the file included.

    Raises:
        BenchmarkError: text that is neither.
        UsageError: text that Taper refuses.
    """
    resolved = resolve(text, llm.max_bits, limit)
    kind, _, argument = resolved.partition(":")
    if kind not in ("schedule", "cycle"):
        return llm.policy(resolved)
    prefill, _, decode = argument.partition("/")
    words = [word.partition("@") for word in decode.split(",")]
    try:
        widths = [whole_bits(float(bits)) for bits, _, _ in words]
        first = whole_bits(float(prefill))
        starts = [int(start) for _, _, start in words] if kind == "schedule" else []
    except ValueError:
        raise BenchmarkError(
            f"policy {text!r} is not understood; write schedule:6/2@0,3@{{1/3}} or cycle:6/3,2,2"
        ) from None
    if starts and starts != sorted({0, *starts}):
        raise BenchmarkError(f"policy {text!r} has switch points {starts}; they must rise from 0")
    if kind == "cycle":
        return Cycle(resolved, first, tuple(widths))
    return Schedule(resolved, first, tuple(zip(widths, starts, strict=True)))


def chosen_policies(llm: LLM, given: Sequence[str], only_given: bool) -> dict[str, str]:
    """Policy text to its family: all planes first, then the defaults and the file's own, then what is given.

    Given are TEXT or FAMILY=TEXT. Of texts that mean the same for this model the first counts; defaults by
    layer need a file with sensitivity.

    Raises:
        BenchmarkError, UsageError: a text that is no policy of this model.
    """
    wanted = [("full", FULL)]
    if not only_given:
        fractions = llm.engine.model.has_sensitivity
        families = [family for family in DEFAULTS if fractions or not family.endswith("by layer")]
        wanted += [(family, text) for family in families for text in DEFAULTS[family]]
        wanted += [("file", name) for name in llm.policies]
    for word in given:
        family, equals, text = word.partition("=")
        wanted.append((family, text) if equals else ("given", word))
    seen: dict[str, str] = {}
    found: dict[str, str] = {}
    for family, text in wanted:
        policy_of(llm, text, 64)
        if seen.setdefault(resolve(text, llm.max_bits, 64), text) == text:
            found.setdefault(text, family)
    return found


def plan(policy: PrecisionPolicy, llm: LLM, num_prompt: int, limit: int) -> list[float] | None:
    """Bits of the passes that tokens 0 to limit - 1 come from; None for a policy that does not only count."""
    if not isinstance(policy, COUNTING):
        return None
    fractions = llm.engine.model.has_sensitivity
    steps = (
        StepContext(
            phase="decode" if index else "prefill",
            position=num_prompt + index - 1 if index else 0,
            num_generated=index,
            max_tokens=limit,
            min_bits=llm.min_bits,
            max_bits=llm.max_bits,
            logit_features=None,
            allows_fractions=fractions,
        )
        for index in range(limit)
    )
    return [policy.bits(step) for step in steps]
