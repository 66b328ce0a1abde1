"""From a checked body to what the engine is asked: sampling, bits, deadline."""

from __future__ import annotations

import math
import time
from typing import Any

from taper.engine import Request, SamplingParams
from taper.engine.schedule import Terms
from taper.errors import TaperError, UsageError
from taper.server import limits
from taper.server.errors import ApiError, from_taper, invalid
from taper.server.fields import BitsRange, Common, Sampled
from taper.server.serving import Served


def terms_of(served: Served, ask: Common, arrived_s: float) -> Terms:
    """Deadline, priority and bounds on the bits.

    Args:
        served: the model.
        ask: the body.
        arrived_s: of the request, on the monotonic clock; the deadline counts from there.

    Raises:
        ApiError: 400 for bits that the model does not hold or a loss that no width of its card keeps to; 429
            where the deadline has passed already.
    """
    low, high = _bounds(served, ask)
    deadline_s = math.inf
    if ask.deadline_ms is not None:
        deadline_s = ask.deadline_ms / 1e3 - (time.monotonic() - arrived_s)
        if deadline_s <= 0:
            raise ApiError(
                429,
                "deadline_ms: the deadline passed before the request was read",
                param="deadline_ms",
                code="deadline_infeasible",
                kind="deadline_error",
                retry_after_s=1,
            )
    elif ask.on_miss is not None:
        raise invalid("on_miss", "it says what happens at a deadline; give deadline_ms, too")
    return Terms(
        deadline_s=deadline_s,
        priority=ask.priority or 0,
        min_bits=low,
        max_bits=high,
        on_miss=ask.on_miss or "reject",
    )


def _bounds(served: Served, ask: Common) -> tuple[float, float]:
    """Least and most bits of the answer's passes; 0 and infinity where nothing is asked for."""
    wanted = ask.bits
    if isinstance(wanted, BitsRange):
        low, high = wanted.min or 0.0, wanted.max or math.inf
    elif isinstance(wanted, (int, float)):
        low = high = float(wanted)
    else:
        low, high = 0.0, math.inf
    for bits in {low, high} - {0.0, math.inf}:
        _check_width(served, bits)
    if low > high:
        raise invalid("bits", f"min is {low:g}, above max, {high:g}")
    if ask.max_loss is not None:
        floor = _least_bits(served, ask.max_loss)
        if floor > high:
            raise invalid(
                "max_loss", f"a loss of {ask.max_loss:g} needs {floor:g} bits; bits allows {high:g}"
            )
        low = max(low, floor)
    return low, high


def _check_width(served: Served, bits: float) -> None:
    llm = served.llm
    if not llm.min_bits <= bits <= llm.max_bits:
        raise invalid("bits", f"{bits:g} asked for; the model holds {llm.min_bits} to {llm.max_bits}")
    if bits != int(bits) and not llm.engine.model.has_sensitivity:
        raise invalid("bits", f"{bits:g} asked for; a fraction needs a file with sensitivity")


def _least_bits(served: Served, max_loss: float) -> float:
    """The least width whose measured loss is within the limit."""
    llm = served.llm
    widths = [w for w in llm.card.get("widths", []) if llm.min_bits <= w["bits"] <= llm.max_bits]
    if not widths:
        raise invalid("max_loss", "the model's file has no quality card; measure one with taper eval")
    good = [width["bits"] for width in widths if width["increase_frac"] <= max_loss]
    if not good:
        least = min(width["increase_frac"] for width in widths)
        raise invalid("max_loss", f"{max_loss:g} asked for; the least measured loss is {least:g}")
    return float(min(good))


def sampling_of(ask: Common, index: int, top_logprobs: int | None) -> SamplingParams:
    """How choice `index` is drawn; OpenAI's default temperature is 1.

    Args:
        ask: the body.
        index: of the choice, which moves the seed so that choices differ.
        top_logprobs: how many to report; None reports no log-probabilities.

    Raises:
        ApiError: 400 by the name of the field.
    """
    options: dict[str, Any] = {
        "temperature": 1.0 if ask.temperature is None else ask.temperature,
        "top_p": 1.0 if ask.top_p is None else ask.top_p,
        "logprobs": top_logprobs is not None,
        "top_logprobs": top_logprobs or 0,
    }
    if isinstance(ask, Sampled):
        names = ("presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty")
        options |= {name: getattr(ask, name) for name in names if getattr(ask, name) is not None}
        options["logit_bias"] = {int(name): bias for name, bias in (ask.logit_bias or {}).items()}
        options["seed"] = None if ask.seed is None else ask.seed + index
    try:
        return SamplingParams(**options)
    except UsageError as error:
        raise from_taper(error) from error


def request_of(served: Served, ask: Common, prompt: str | list[int], **options: Any) -> Request:
    """The engine's request; `options` are its other fields. Raises ApiError 400 where it can never run."""
    if isinstance(ask, Sampled):
        stops = [ask.stop] if isinstance(ask.stop, str) else ask.stop or []
        options |= {"stop": tuple(stops), "ignore_eos": bool(ask.ignore_eos)}
    try:
        return served.llm.request(prompt, audit=bool(ask.audit), **options)
    except TaperError as error:
        raise from_taper(error) from error


def check_count(num_sequences: int) -> None:
    """Refuse more sequences than one request may have. Raises ApiError 400."""
    if num_sequences > limits.MAX_SEQUENCES:
        raise invalid("n", f"{num_sequences} answers asked for (prompts x n); at most {limits.MAX_SEQUENCES}")
