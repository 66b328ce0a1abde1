"""Outputs that keep to a JSON schema: llguidance masks the tokens that would leave it.

Lazily imported with the first schema: llguidance's copy of the vocabulary takes time and memory.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import anyio
import numpy as np
from numpy.typing import NDArray

from taper.engine.constraint import Constraint
from taper.errors import UsageError
from taper.server import limits
from taper.server.body import check_depth
from taper.server.errors import ApiError, invalid

# As json.dumps writes: a model that may put white space anywhere can go on with it for ever.
_WRITING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class _Matcher:
    """A `Constraint` by llguidance."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def mask(self) -> NDArray[np.bool_]:
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(packed, count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token_id: int) -> None:
        # The end-of-text token after the last bracket is taken, too; the sequence is over then.
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)
            self._check()

    def fork(self) -> _Matcher:
        return _Matcher(self._matcher.deep_copy(), self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(
                f"the output's schema became too complex: {_first_line(self._matcher.get_error())}"
            )


class Grammars:
    """Compiles schemas for one model's vocabulary and keeps the last ones.

    Args:
        tokenizer_json: text of tokenizer.json.
        vocab_size: of the logits.
        eos_token_ids: that may end an output.
    """

    def __init__(self, tokenizer_json: str | None, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokenizer: Any = None
        self._compiled: OrderedDict[bytes, _Matcher] = OrderedDict()
        self._lock = threading.Lock()
        self._limiter: anyio.CapacityLimiter | None = None

    async def constraint(self, schema: Mapping[str, Any], param: str) -> Callable[[], Constraint]:
        """What makes a request keep to a schema.

        Args:
            schema: JSON schema.
            param: the field that holds it, for errors.

        Raises:
            ApiError: 400 for a schema that is too large, too deep, too slow, wrong, or not supported.
        """
        text = json.dumps(schema)
        if len(text) > limits.MAX_SCHEMA_BYTES:
            raise invalid(param, f"the schema has {len(text)} bytes; at most {limits.MAX_SCHEMA_BYTES}")
        try:
            check_depth(text.encode(), limits.MAX_SCHEMA_DEPTH)
        except ApiError:
            raise invalid(param, f"the schema nests deeper than {limits.MAX_SCHEMA_DEPTH} levels") from None
        key = hashlib.sha256(text.encode()).digest()
        with self._lock:
            matcher = self._compiled.get(key)
            if matcher is not None:
                self._compiled.move_to_end(key)
        if matcher is None:
            matcher = await self._compile_in_time(text, param)
            with self._lock:
                self._compiled[key] = matcher
                while len(self._compiled) > limits.MAX_CACHED_GRAMMARS:
                    self._compiled.popitem(last=False)
        return matcher.fork

    async def _compile_in_time(self, text: str, param: str) -> _Matcher:
        """In a thread of few: a slow schema must hold up other schemas only, never the event loop."""
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(2)
        try:
            with anyio.fail_after(limits.GRAMMAR_TIMEOUT_S):
                return await anyio.to_thread.run_sync(
                    self._compile, text, param, limiter=self._limiter, abandon_on_cancel=True
                )
        except TimeoutError:
            raise invalid(
                param, f"the schema took longer than {limits.GRAMMAR_TIMEOUT_S:g} s to compile"
            ) from None

    def _compile(self, text: str, param: str) -> _Matcher:
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=_WRITING)
        except ValueError as error:
            raise invalid(param, f"not a JSON schema: {error}") from error
        matcher = LLMatcher(self._vocabulary(param), grammar, log_level=0)
        if matcher.is_error():
            raise invalid(param, f"the schema is refused: {_first_line(matcher.get_error())}")
        matcher.compute_bitmask()  # the first mask is the slow one; what it leaves is copied by forks
        if matcher.is_error():
            raise invalid(param, f"the schema is refused: {_first_line(matcher.get_error())}")
        return _Matcher(matcher, self._vocab_size)

    def _vocabulary(self, param: str) -> Any:
        if self._tokenizer_json is None or not self._eos_token_ids:
            raise invalid(param, "this model has no tokenizer or no end-of-text token to hold to a schema")
        with self._lock:
            if self._tokenizer is None:
                from llguidance import LLTokenizer

                self._tokenizer = LLTokenizer(
                    self._tokenizer_json, n_vocab=self._vocab_size, eos_token=list(self._eos_token_ids)
                )
            return self._tokenizer


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no reason given"
