"""A model that is served: its loop, and what the routes ask of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from taper.engine import LLM, Audit, Request, StepOutput
from taper.engine.schedule import Terms
from taper.errors import TaperError
from taper.server.errors import ApiError, from_taper, invalid
from taper.server.grammar import Grammars
from taper.server.token_text import TokenText


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a sequence.

    Attributes:
        finish_reason: stop or length.
        bits: of each token.
        seed: of the draws.
        num_prompt_tokens, num_cached_tokens: of the prompt, and of those the ones found in the prefix cache.
        deadline_met: None without a deadline.
        queue_s, first_token_s: from submission to the first pass and to the first token.
        audit: where one was asked for.
    """

    finish_reason: str
    bits: tuple[float, ...]
    seed: int
    num_prompt_tokens: int
    num_cached_tokens: int
    deadline_met: bool | None
    queue_s: float
    first_token_s: float | None
    audit: Audit | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A sequence that will not end: refused after it waited, or failed."""

    error: ApiError


Event = StepOutput | Ended | Refused


class Loop(Protocol):
    """What the server needs of the engine's loop; safe to call from any thread."""

    def submit(self, request: Request, terms: Terms, on_event: Callable[[Event], None]) -> int:
        """Queue a request and return its id. Events come in another thread. Raises ApiError where refused."""
        ...

    def cancel(self, sequence_id: int) -> None:
        """End a sequence; nothing for one that has ended."""
        ...

    def snapshot(self) -> Mapping[str, Any]:
        """The state now, in numbers and lists for JSON."""
        ...

    def close(self) -> None:
        """End the loop's thread."""
        ...


@dataclass(slots=True)
class Served:
    """One model.

    Attributes:
        name: as requests say it.
        llm: the model.
        loop: runs its requests.
        created: seconds since 1970.
    """

    name: str
    llm: LLM
    loop: Loop
    created: int = field(default_factory=lambda: int(time.time()))
    grammars: Grammars = field(init=False)
    token_text: TokenText = field(init=False)

    def __post_init__(self) -> None:
        llm = self.llm
        self.grammars = Grammars(llm.tokenizer_json, llm.config.vocab_size, llm.config.eos_token_ids)
        self.token_text = TokenText(llm.tokenizer, llm.tokenizer_json)

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt; none for empty text. Raises ApiError 400."""
        if self.llm.tokenizer is None:
            raise invalid("prompt", "this model has no tokenizer; give token ids")
        try:
            return self.llm.tokenizer.encode(text, special_tokens=special_tokens) if text else []
        except TaperError as error:
            raise from_taper(error) from error

    def decode(self, ids: list[int]) -> str:
        """Text of a prompt's ids; empty without a tokenizer."""
        size = self.llm.config.vocab_size
        outside = [token_id for token_id in ids if not 0 <= token_id < size]
        if outside:
            raise invalid("prompt", f"token id {outside[0]}; the vocabulary is 0 to {size - 1}")
        return self.llm.tokenizer.decode(ids) if self.llm.tokenizer else ""

    def description(self) -> dict[str, Any]:
        """The entry in /v1/models."""
        llm = self.llm
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "taper",
            "taper": {
                "min_bits": llm.min_bits,
                "max_bits": llm.max_bits,
                "context_length": llm.engine.model.context_length,
                "has_chat_template": llm.has_chat_template,
                "has_quality_card": bool(llm.card.get("widths")),
            },
        }
