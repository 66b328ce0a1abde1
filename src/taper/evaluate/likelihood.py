"""Log-likelihood of token sequences at one width: what multiple choice and lm-eval-harness ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.evaluate.divergence import log_likelihoods, log_normalisers
from taper.evaluate.sequences import common_prefix
from taper.kvcache import AnyCache
from taper.models import Decoder
from taper.models.decoder import Logits
from taper.tokenizer import Tokenizer

Int32 = NDArray[np.int32]

# Logits held at a time, in elements: 16 MiB of float32.
_MAX_LOGITS = 1 << 22


@dataclass(frozen=True, slots=True)
class Score:
    """Of one continuation.

    Attributes:
        log_likelihood: natural logarithm of the continuation's probability after its context.
        is_greedy: whether greedy decoding would give exactly the continuation.
        num_tokens: of the continuation.
        num_dropped: tokens of the context's beginning that were left out because the model's context is full.
    """

    log_likelihood: float
    is_greedy: bool
    num_tokens: int
    num_dropped: int


@dataclass(slots=True)
class Scorer:
    """A model at one width that scores continuations; what two calls have in common is read once.

    Attributes:
        decoder: over planes or float32.
        tokenizer: of the model.
        bits: the width to read.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    bits: float
    _cache: AnyCache = field(init=False)
    _read: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._cache = self.decoder.new_cache(self.decoder.context_length)

    def score(self, context: str, continuation: str) -> Score:
        """Score a continuation of a text; `encode_pair` says how both are cut into tokens.

        Raises:
            UsageError: an empty continuation, an empty context for a model without a token to begin with, or
                a continuation longer than the model's context.
        """
        return self.score_tokens(*encode_pair(self.tokenizer, context, continuation, self.first_token))

    def score_tokens(self, context: Sequence[int], continuation: Sequence[int]) -> Score:
        """Score token ids; a context that does not fit loses its beginning, and the score says how much.

        Raises:
            UsageError: either is empty, or the continuation alone is too long.
        """
        if not context or not continuation:
            raise UsageError(
                f"{len(context)} context and {len(continuation)} continuation tokens; each needs at least one"
            )
        limit = self._cache.capacity
        if len(continuation) > limit:
            raise UsageError(
                f"the continuation has {len(continuation)} tokens, the model's context {limit}",
                hint="shorten the text",
            )
        # The last token of the continuation is only predicted, so one more than the context fits.
        dropped = max(0, len(context) + len(continuation) - 1 - limit)
        tokens = [*context[dropped:], *continuation]
        begin = len(context) - dropped
        likelihood, is_greedy = self._score(tokens, begin)
        return Score(likelihood, is_greedy, len(continuation), dropped)

    def rolling(self, text: str) -> float:
        """Log-likelihood of a whole text: windows of the model's context, each token scored once.

        The windows are those of lm-eval-harness (`get_rolling_token_windows` with a context of one token):
        the first begins with the first token, the last one is filled with what precedes it.

        Raises:
            UsageError: a model without a token to begin with.
        """
        tokens = self.tokenizer.encode(text, special_tokens=False)
        if not tokens:
            return 0.0
        first = self.first_token
        if first is None:
            raise UsageError("the model has no token to begin a text with", hint="score with a context")
        limit = self._cache.capacity
        sequence = [first, *tokens]
        total = 0.0
        for begin in range(0, len(tokens), limit):
            end = min(begin + limit, len(tokens))
            at = max(0, end - limit)
            total += self._score(sequence[at : end + 1], begin + 1 - at)[0]
        return total

    @property
    def first_token(self) -> int | None:
        """What a text begins with: the tokenizer's choice, else the model's begin- or end-of-text."""
        begin = self.tokenizer.encode("")
        config = self.decoder.config
        ends = config.eos_token_ids[:1]
        known = [*begin[:1], *([] if config.bos_token_id is None else [config.bos_token_id]), *ends]
        return known[0] if known else None

    def _score(self, tokens: list[int], begin: int) -> tuple[float, bool]:
        """Log-likelihood of tokens[begin:], and whether each is the likeliest."""
        shared = common_prefix(self._read, tokens[: begin - 1])
        self._cache.truncate(shared)
        self._read = tokens[:shared]
        if shared < begin - 1:
            self._forward(tokens[shared : begin - 1], "none")
        total, is_greedy = 0.0, True
        piece = max(1, _MAX_LOGITS // self.decoder.config.vocab_size)
        for start in range(begin - 1, len(tokens) - 1, piece):
            end = min(start + piece, len(tokens) - 1)
            logits = self._forward(tokens[start:end], "all")
            assert logits is not None
            targets = np.array(tokens[start + 1 : end + 1], dtype=np.int32)
            total += float(log_likelihoods(logits, log_normalisers(logits), targets).sum())
            is_greedy = is_greedy and bool((logits.argmax(axis=1) == targets).all())
        return total, is_greedy

    def _forward(self, tokens: list[int], logits: Logits) -> NDArray[np.float32] | None:
        result = self.decoder.forward(tokens, self._cache, self.bits, logits=logits)
        self._read += tokens
        return result


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, first_token: int | None
) -> tuple[list[int], list[int]]:
    """Tokens of a context and of its continuation, as lm-eval-harness cuts them.

    Spaces at the context's end go over to the continuation, where most tokenizers want them; both are then
    encoded as one text and cut where the context's own tokens end. An empty context is `first_token`.

    Args:
        tokenizer: of the model.
        context, continuation: text; only the context may be empty.
        first_token: of `Scorer`; stands before a context where the tokenizer would put it.

    Raises:
        UsageError: an empty continuation, or an empty context without a first token.
    """
    if not continuation:
        raise UsageError("an empty continuation has no likelihood", hint="give every choice some text")
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    begin = tokenizer.encode("")[:1]
    if not context and not begin:
        if first_token is None:
            raise UsageError(
                "an empty context needs a token to begin with; the model has none", hint="give a context"
            )
        begin = [first_token]
    before = tokenizer.encode(context, special_tokens=False)
    whole = tokenizer.encode(context + continuation, special_tokens=False)
    # Where the two texts' border melts into one token, that token is the continuation.
    cut = min(len(before), len(whole) - 1)
    return [*begin, *whole[:cut]], whole[cut:]
