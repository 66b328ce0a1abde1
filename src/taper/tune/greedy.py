"""Greedy decoding that can go back: schedules that begin alike share the passes of their beginning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from taper.engine.engine import PREFILL_CHUNK_TOKENS
from taper.errors import DoesNotFitError, UsageError
from taper.kvcache import AnyCache
from taper.models import Decoder

F32 = NDArray[np.float32]


def run_prompt(decoder: Decoder, cache: AnyCache, prompt_ids: Sequence[int], bits: float) -> F32:
    """Run a prompt into an emptied cache, in the engine's chunks; logits (vocab,) of its last token."""
    cache.truncate(0)
    last = (len(prompt_ids) - 1) // PREFILL_CHUNK_TOKENS * PREFILL_CHUNK_TOKENS
    for start in range(0, last, PREFILL_CHUNK_TOKENS):
        decoder.forward(prompt_ids[start : start + PREFILL_CHUNK_TOKENS], cache, bits, logits="none")
    logits = decoder.forward(prompt_ids[last:], cache, bits)
    assert logits is not None
    row: F32 = logits[0]
    return row


def new_cache(decoder: Decoder, prompt_ids: Sequence[int], max_tokens: int) -> AnyCache:
    """A cache for a prompt and its answer.

    Raises:
        UsageError: an empty prompt, or `max_tokens` below 1.
        DoesNotFitError: they are longer than the model's context.
    """
    if not len(prompt_ids) or max_tokens < 1:
        raise UsageError(f"{len(prompt_ids)} prompt tokens and {max_tokens} new ones; each needs at least 1")
    size = len(prompt_ids) + max_tokens
    if size > decoder.context_length:
        raise DoesNotFitError(
            f"{len(prompt_ids)} prompt and {max_tokens} new tokens exceed the context of "
            f"{decoder.context_length}",
            hint="shorten the prompts or the answers",
        )
    return decoder.new_cache(size)


class GreedyWalk:
    """One prompt's greedy answer, token by token at any bits, with a way back to any earlier point.

    The tokens are those that the engine draws under the same bits: token 0 comes from the prompt's last pass,
    token n from the pass that reads token n - 1 (docs/policies.md). A stop token of the model is the last of
    an answer.

    Args:
        decoder: the model.
        prompt_ids: at least one token.
        max_tokens: longest answer.
        ignore_eos: let the model's stop tokens pass.
        keep_logits: keep the distributions that the tokens were drawn from.

    Attributes:
        tokens: drawn so far.
        bits: of the pass that each of them was drawn from.
        logits: with `keep_logits`, float32 (vocab,) of each of them.
        cache: keys and values of the prompt and of all tokens but the last.

    Raises:
        UsageError, DoesNotFitError: as `new_cache`.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt_ids: Sequence[int],
        max_tokens: int,
        *,
        ignore_eos: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self.tokens: list[int] = []
        self.bits: list[float] = []
        self.logits: list[F32] = []
        self._decoder = decoder
        self._prompt_ids = prompt_ids
        self._max_tokens = max_tokens
        self._stop_ids = frozenset(() if ignore_eos else decoder.config.eos_token_ids)
        self._keep_logits = keep_logits
        self.cache = new_cache(decoder, prompt_ids, max_tokens)
        self._first: tuple[F32, float] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens)

    @property
    def is_finished(self) -> bool:
        """Whether the answer has ended."""
        return len(self.tokens) == self._max_tokens or bool(self.tokens and self.tokens[-1] in self._stop_ids)

    def prefill(self, bits: float) -> None:
        """Run the prompt at these bits and begin a new answer."""
        self._cut(0)
        self._first = run_prompt(self._decoder, self.cache, self._prompt_ids, bits), bits

    def extend(self, bits: float, num_tokens: int) -> None:
        """Draw up to `num_tokens` more tokens at these bits; fewer where the answer ends.

        Token 0 is drawn from the prompt's logits, whatever `bits` says.

        Raises:
            UsageError: before `prefill`.
        """
        if self._first is None:
            raise UsageError("an answer needs its prompt first", hint="call prefill")
        for _ in range(num_tokens):
            if self.is_finished:
                return
            if not self.tokens:
                self._draw(*self._first)
                continue
            logits = self._decoder.forward(self.tokens[-1:], self.cache, bits)
            assert logits is not None
            self._draw(logits[0], bits)

    def back_to(self, num_tokens: int) -> None:
        """Forget all tokens but the first `num_tokens`; 0 goes back to the end of the prompt.

        Raises:
            UsageError: more tokens than there are.
        """
        if not 0 <= num_tokens <= len(self.tokens):
            raise UsageError(f"cannot go back to {num_tokens} tokens: the answer has {len(self.tokens)}")
        self._cut(num_tokens)
        # The last token of an answer has not been read yet.
        self.cache.truncate(len(self._prompt_ids) + max(0, num_tokens - 1))

    def _cut(self, num_tokens: int) -> None:
        for kept in (self.tokens, self.bits, self.logits):
            del kept[num_tokens:]

    def _draw(self, logits: F32, bits: float) -> None:
        self.tokens.append(int(logits.argmax()))
        self.bits.append(bits)
        if self._keep_logits:
            self.logits.append(logits)
