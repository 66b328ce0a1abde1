"""A policy of your own: more bits where the model is unsure. python examples/own_policy.py [MODEL]."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import taper
from taper.precision import StepContext


@dataclass(frozen=True)
class ByMargin:
    """All bits for the prompt; then `low` where the last token was clear, `high` where it was close."""

    low: int
    high: int
    margin: float

    name = "by-margin"

    def bits(self, step: StepContext) -> int:
        """Look at the last distribution: the lead of the best token over the second."""
        if step.logit_features is None:
            return step.max_bits
        return self.low if step.logit_features().margin > self.margin else self.high


def main() -> None:
    """Compare the policy with its two widths held fixed."""
    llm = taper.load(sys.argv[1] if len(sys.argv) > 1 else None)
    low, high = max(llm.min_bits, min(3, llm.max_bits)), min(6, llm.max_bits)
    for policy in (f"fixed:{low}", ByMargin(low, high, margin=0.3), f"fixed:{high}"):
        answer = llm.generate("The little dog", policy=policy, max_tokens=48)
        print(f"{answer.policy}, {answer.usage.average_bits:.2f} bits:{answer.text}\n")


if __name__ == "__main__":
    main()
