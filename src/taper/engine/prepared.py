"""The beginning of a prompt, read before its request came."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from taper.engine.model_runner import ModelRunner
from taper.precision import Bits


class PreparedPrompt:
    """A KV cache that is filled in idle time, all at the same bits.

    Args:
        ids: the prompt's tokens.
        bits: of every pass.
        runner: with an empty cache, large enough for any request.
    """

    def __init__(self, ids: SequenceOf[int], bits: Bits, runner: ModelRunner) -> None:
        self.bits = bits
        self._ids = list(ids)
        self._runner = runner

    def matches(self, ids: SequenceOf[int], bits: Bits) -> bool:
        """Whether it is this prompt at these bits, read or on the way."""
        return self._ids == list(ids) and self.bits == bits

    def fill(self, chunk_tokens: int, is_cancelled: Callable[[], bool]) -> bool:
        """Read on in chunks. Returns whether everything is read."""
        for start in range(self._runner.position, len(self._ids), chunk_tokens):
            if is_cancelled():
                return False
            self._runner.prefill(self._ids[start : start + chunk_tokens], self.bits, is_last=False)
        return True

    def take(self, prompt_ids: SequenceOf[int], num_tokens: int) -> ModelRunner:
        """The runner for a request of `num_tokens` in all, with the entries that its prompt shares.

        Its last token is left out: the pass that reads it gives the first logits.
        """
        pairs = zip(self._ids[: self._runner.position], prompt_ids[:-1], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._runner.truncate(self._runner.keeps(shared))
        self._runner.expect(num_tokens)
        return self._runner
