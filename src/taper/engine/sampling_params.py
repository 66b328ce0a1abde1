"""What a caller may ask of the sampler, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from taper.errors import UsageError

MAX_TOP_LOGPROBS = 20  # OpenAI's limit
MAX_LOGIT_BIAS = 100.0  # OpenAI's range
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is drawn from the model's distribution; the default is greedy.

    The order is fixed: repetition penalty, presence and frequency penalty, logit bias, temperature, top-k,
    top-p, min-p, draw. The last four are those of Hugging Face's warpers in their order; the bias comes after
    the penalties so that it shifts a token by exactly its value.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token (ties: the lowest id), and top_k, top_p,
            min_p then change nothing.
        top_k: keep the k likeliest tokens (ties: lower ids first); 0 keeps all.
        top_p: of those, keep the likeliest tokens until their share reaches p; 1 keeps all.
        min_p: of those, keep tokens at least min_p times as likely as the likeliest; 0 keeps all.
        repetition_penalty: a logit of a token of the prompt or the output is divided by it when positive,
            multiplied when negative (Hugging Face; CTRL, arXiv 1909.05858, section 4.1); 1 changes nothing.
        presence_penalty: subtracted from the logit of every token of the output (OpenAI).
        frequency_penalty: subtracted once for every time the token occurs in the output (OpenAI).
        logit_bias: token id to a number added to its logit.
        logprobs: report the drawn token's log-probability under the model's raw distribution, before anything
            above.
        top_logprobs: report that many of the likeliest tokens of the raw distribution, too; needs `logprobs`.
        seed: of the draws; None takes a fresh one, which the completion names.

    Raises:
        UsageError: a value outside its range; the message names the field, the value and the rule.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: bool = False
    top_logprobs: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (kind, accepts, rule) in RULES.items():
            _check(name, getattr(self, name), kind, accepts, rule)
        if self.seed is not None:
            _check(
                "seed", self.seed, Integral, lambda v: 0 <= v <= MAX_SEED, "a whole number from 0 to 2^64 - 1"
            )
        if not isinstance(self.logprobs, bool):
            raise UsageError(f"logprobs is {self.logprobs!r}; it must be True or False")
        if self.top_logprobs and not self.logprobs:
            raise UsageError(
                f"top_logprobs is {self.top_logprobs} but logprobs is False", "set logprobs=True"
            )
        self._check_logit_bias()

    def _check_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise UsageError(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers")
        for token_id, bias in self.logit_bias.items():
            _check("logit_bias token id", token_id, Integral, lambda v: v >= 0, "a whole number, at least 0")
            _check(
                f"logit_bias of token {token_id}",
                bias,
                Real,
                lambda v: abs(v) <= MAX_LOGIT_BIAS,
                "from -100 to 100",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken without a draw."""
        return self.temperature == 0


Rule = tuple[type, Callable[[Any], bool], str]

RULES: dict[str, Rule] = {
    "temperature": (Real, lambda v: v >= 0, "a number, at least 0"),
    "top_k": (Integral, lambda v: v >= 0, "a whole number, at least 0 (0 keeps all tokens)"),
    "top_p": (Real, lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "min_p": (Real, lambda v: 0 <= v <= 1, "from 0 to 1"),
    "repetition_penalty": (Real, lambda v: v > 0, "above 0 (1 changes nothing)"),
    "presence_penalty": (Real, lambda v: -2 <= v <= 2, "from -2 to 2"),
    "frequency_penalty": (Real, lambda v: -2 <= v <= 2, "from -2 to 2"),
    "top_logprobs": (
        Integral,
        lambda v: 0 <= v <= MAX_TOP_LOGPROBS,
        f"a whole number from 0 to {MAX_TOP_LOGPROBS}",
    ),
}


def _check(name: str, value: Any, kind: type, accepts: Callable[[Any], bool], rule: str) -> None:
    """Refuse a value of another type, a value that is not finite, and one that the rule does not accept."""
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and accepts(value)):
        raise UsageError(f"{name} is {value!r}; it must be {rule}")
