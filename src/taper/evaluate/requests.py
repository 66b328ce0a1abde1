"""lm-eval-harness's generation options in the engine's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taper.errors import UsageError

# The harness's own default (HFLM, max_gen_toks).
GENERATION_TOKENS = 256
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def generation_options(given: Mapping[str, Any], max_new_tokens: int, context_tokens: int) -> dict[str, Any]:
    """Options for `LLM.generate` from the `gen_kwargs` of a task.

    Args:
        given: until (text or texts), max_gen_toks (or max_new_tokens, max_tokens), do_sample, and sampling
            parameters.
        max_new_tokens: where the task gives no limit.
        context_tokens: of the model; at least one token of it stays for the prompt.

    Raises:
        UsageError: an option that this engine does not know; it would change the figures if it were dropped.
    """
    rest = dict(given)
    until = rest.pop("until", ()) or ()
    limits = [rest.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    limit = next((int(value) for value in limits if value is not None), max_new_tokens)
    is_sampled = rest.pop("do_sample", float(rest.get("temperature") or 0.0) > 0.0)
    sampling = {name: rest.pop(name) for name in _SAMPLING if rest.get(name) is not None}
    unknown = [name for name, value in rest.items() if value is not None]
    if unknown:
        raise UsageError(f"the generation option {unknown[0]!r} is not known", hint="leave it out")
    if not is_sampled:
        sampling = {"temperature": 0.0}
    elif "temperature" not in sampling:
        sampling["temperature"] = 1.0
    return {
        "stop": (until,) if isinstance(until, str) else tuple(until),
        "max_tokens": min(limit, context_tokens - 1),
        **sampling,
    }
