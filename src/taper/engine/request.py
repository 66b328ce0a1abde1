"""What a caller asks of the engine."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from numbers import Integral, Real

from taper.engine.constraint import Constraint
from taper.engine.sampling_params import SamplingParams
from taper.errors import UsageError
from taper.kvcache import KvPlanes, parse_kv
from taper.precision import PrecisionPolicy


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete.

    Attributes:
        prompt: text, or token ids that are used as they are.
        policy: chooses the bits of every pass.
        sampling: how tokens are drawn.
        max_tokens: limit on the output; None takes what the prompt leaves of the context.
        stop: strings that end the output and are not part of it.
        stop_token_ids: end the output like the model's own end-of-text tokens.
        ignore_eos: let the model's own end-of-text tokens pass; `stop_token_ids` still end the output.
        special_tokens: encode text with the special tokens that the tokenizer puts around it; a rendered chat
            template already has them.
        allow_empty_prompt: take an empty prompt as the model's beginning-of-text token; without it, or for a
            model without that token, an empty prompt is refused.
        allow_lower_bits: where the memory budget has no room for the policy's bits, take fewer; without it
            the request is refused.
        refresh: where the prompt had to be read with fewer bits than the policy wanted, because the file was
            still arriving, read it and the answer so far again once those bits are there.
        audit: when the answer is complete, read it once more at `audit_bits` and report what the used bits
            have cost (`Completion.audit`).
        audit_bits: what the audit compares with; None takes the largest width that can be read by then.
        kv: what is read of a KV cache of planes, as `parse_kv` reads it, such as 4 where 7 bits are stored;
            None reads all that is stored.
        constraint: makes what holds a sequence to a grammar or a text; None lets every token come.

    Raises:
        UsageError: `max_tokens` below 1, `audit_bits` without `audit`, a `kv` that is no magnitude bits.
    """

    prompt: str | SequenceOf[int]
    policy: PrecisionPolicy
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: SequenceOf[str] = ()
    stop_token_ids: SequenceOf[int] = ()
    ignore_eos: bool = False
    special_tokens: bool = True
    allow_empty_prompt: bool = False
    allow_lower_bits: bool = False
    refresh: bool = False
    audit: bool = False
    audit_bits: float | None = None
    kv: KvPlanes | str | None = None
    constraint: Callable[[], Constraint] | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    def __post_init__(self) -> None:
        limit = self.max_tokens
        if limit is not None and (not isinstance(limit, Integral) or isinstance(limit, bool) or limit < 1):
            raise UsageError(f"max_tokens is {limit!r}; it must be a whole number, at least 1, or None")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check_audit_bits()
        if isinstance(self.kv, str):
            object.__setattr__(self, "kv", _reading(self.kv))

    def _check_audit_bits(self) -> None:
        bits = self.audit_bits
        if bits is None:
            return
        if not isinstance(bits, Real) or isinstance(bits, bool) or not math.isfinite(bits):
            raise UsageError(f"audit_bits is {bits!r}; it must be a width of the model")
        if not self.audit:
            raise UsageError(f"audit_bits is {self.audit_bits!r} but audit is False", "set audit=True")

    def cancel(self) -> None:
        """End the request before its next pass, from any thread; what was generated is kept."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()


def _reading(text: str) -> KvPlanes:
    reading = parse_kv(text)
    if reading is None:
        raise UsageError(f"kv is {text!r}; a request reads magnitude bits", "give bits such as 7 or 7,4@128")
    return reading
