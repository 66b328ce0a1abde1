"""Pieces that the replies of several routes share: counts, log-probabilities, the `taper` object."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from taper.engine import StepOutput
from taper.server.generation import Choice
from taper.server.serving import Ended, Served


def new_id(prefix: str) -> str:
    """A name for a reply that nobody can guess."""
    return f"{prefix}-{secrets.token_hex(12)}"


def usage(ends: Sequence[Ended], num_prompts: int = 1) -> dict[str, Any]:
    """Tokens read and written. Choices of one prompt count its tokens once.

    Args:
        ends: of all choices, those of one prompt side by side.
        num_prompts: that they belong to.
    """
    step = max(1, len(ends) // num_prompts)
    prompt = sum(end.num_prompt_tokens for end in ends[::step])
    completion = sum(len(end.bits) for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(end.num_cached_tokens for end in ends[::step])},
    }


def taper_object(ends: Sequence[Ended]) -> dict[str, Any]:
    """What Taper says beside OpenAI's fields: mean bits of all tokens, deadline, times in milliseconds."""
    bits = [bit for end in ends for bit in end.bits]
    met = [end.deadline_met for end in ends if end.deadline_met is not None]
    firsts = [end.first_token_s for end in ends if end.first_token_s is not None]
    return {
        "bits": sum(bits) / len(bits) if bits else None,
        "deadline_met": all(met) if met else None,
        "queue_ms": 1e3 * max((end.queue_s for end in ends), default=0.0),
        "first_token_ms": 1e3 * max(firsts) if firsts else None,
    }


def choice_object(end: Ended) -> dict[str, Any]:
    """Of one choice: bits of each token, the seed of its draws, the audit where one was asked for."""
    audit = {} if end.audit is None else {"audit": end.audit.as_record()}
    return {"token_bits": list(end.bits), "seed": end.seed, **audit}


def chat_logprobs(served: Served, steps: Sequence[StepOutput]) -> dict[str, Any]:
    """Log-probabilities as /v1/chat/completions writes them, a stop token's included."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = served.token_text
        return {
            "token": text.text_of(token_id),
            "logprob": max(logprob, -9999.0),  # JSON has no infinity; OpenAI's own floor
            "bytes": list(text.bytes_of(token_id)),
        }

    content = [
        {
            **entry(step.token_id, step.logprob),
            "top_logprobs": [entry(token_id, logprob) for token_id, logprob in step.top_logprobs],
        }
        for step in steps
        if step.logprob is not None
    ]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """Log-probabilities as /v1/completions writes them: four lists, side by side."""

    def __init__(self, served: Served) -> None:
        self._text = served.token_text
        self._offset = 0
        self.lists: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }

    def append(self, token_id: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> None:
        """Add a token; the first of a prompt has no log-probability."""
        text = self._text.text_of(token_id)
        best: dict[str, float] | None = None
        if logprob is not None:
            best = {}
            # With the token itself, as at OpenAI. Two tokens may spell the same: the likelier is kept.
            for other, value in [*top, (token_id, logprob)]:
                best.setdefault(self._text.text_of(other), max(value, -9999.0))
        self.lists["tokens"].append(text)
        self.lists["token_logprobs"].append(None if logprob is None else max(logprob, -9999.0))
        self.lists["top_logprobs"].append(best)
        self.lists["text_offset"].append(self._offset)
        self._offset += len(text)

    def take(self) -> dict[str, list[Any]]:
        """What was added since the last call, for a stream."""
        taken, self.lists = self.lists, {name: [] for name in self.lists}
        return taken


def text_of(choice: Choice) -> str:
    """All text of a choice."""
    return "".join(step.text for step in choice.steps)
