"""Prompts under many policies: the logits of a given answer, and the greedy answer.

Policies that only count know their bits beforehand. So the prompt runs once at each width, passes of the same
bits over a given answer run as one, and several prompts decode together: results do not depend on how a
sequence is cut into passes, nor on the batch (docs/numerics.md). Other policies run through the engine, step
by step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from schedules import plan, policy_of

from taper.engine import LLM, Engine, Request
from taper.engine.audit import ForcedTokens
from taper.kvcache import AnyCache
from taper.precision import PrecisionPolicy
from taper.tune.greedy import new_cache, run_prompt

F32 = NDArray[np.float32]
Bits = list[float]


def runs(bits: Iterable[float]) -> list[tuple[float, int]]:
    """Equal neighbours as (bits, count)."""
    return [(width, len(list(group))) for width, group in groupby(bits)]


class OnePrompt:
    """A prompt and its reference answer.

    Args:
        llm: the model.
        prompt_ids, reference_ids: at least one token each.
        limit: the request's token limit, which schedules count in.
    """

    def __init__(self, llm: LLM, prompt_ids: Sequence[int], reference_ids: Sequence[int], limit: int) -> None:
        self._llm, self._model = llm, llm.engine.model
        self.prompt_ids, self.reference_ids, self._limit = prompt_ids, reference_ids, limit
        self._prompts: dict[float, tuple[AnyCache, F32]] = {}

    def forced(self, text: str) -> tuple[F32, Bits]:
        """Logits that each token of the reference has, float32 (tokens, vocab), and the bits of its pass.

        Every KV entry is written by the pass that the policy chose for it.
        """
        policy = policy_of(self._llm, text, self._limit)
        bits = plan(policy, self._llm, len(self.prompt_ids), self._limit)
        if bits is None:
            return self._taught(policy)
        bits = bits[: len(self.reference_ids)]
        cache, first = self.prompt_at(bits[0])
        rows, at = [first[None]], 0
        for width, count in runs(bits[1:]):
            tokens = np.array(self.reference_ids[at : at + count], dtype=np.int32)
            logits = self._model.forward(tokens, cache, width, "all")
            assert logits is not None
            rows.append(logits)
            at += count
        return np.concatenate(rows), bits

    def prompt_at(self, bits: float) -> tuple[AnyCache, F32]:
        """The prompt's cache at these bits, nothing behind it, and the logits of its last token, (vocab,)."""
        if bits not in self._prompts:
            cache = new_cache(self._model, self.prompt_ids, self._limit)
            self._prompts[bits] = cache, run_prompt(self._model, cache, self.prompt_ids, bits)
        cache, logits = self._prompts[bits]
        cache.truncate(len(self.prompt_ids))
        return cache, logits

    def _taught(self, policy: PrecisionPolicy) -> tuple[F32, Bits]:
        """`forced` for a policy that looks at the model's state: it sees what it sees in use."""
        teacher = _Teacher(self.reference_ids)
        request = Request(self.prompt_ids, policy, max_tokens=self._limit, ignore_eos=True)
        bits: Bits = []
        with Engine(self._model, None).stream(request, teacher) as stream:
            for step in stream:
                bits.append(step.bits)
                if len(bits) == len(self.reference_ids):
                    break
        return np.array(teacher.rows), bits


def answers(llm: LLM, prompts: Sequence[OnePrompt], text: str, limit: int) -> list[tuple[list[int], Bits]]:
    """Tokens of the greedy answers to some prompts, and the bits of their passes."""
    policies = [policy_of(llm, text, limit) for _ in prompts]
    bits = plan(policies[0], llm, len(prompts[0].prompt_ids), limit)
    if bits is None:
        requests = [
            Request(one.prompt_ids, policy, max_tokens=limit)
            for one, policy in zip(prompts, policies, strict=True)
        ]
        given = [llm.engine.generate(request) for request in requests]
        return [(list(one.token_ids), list(one.bits)) for one in given]
    model, stop_ids = llm.engine.model, llm.config.eos_token_ids
    states = [one.prompt_at(bits[0]) for one in prompts]
    tokens = [[int(logits.argmax())] for _, logits in states]
    for width in bits[1:]:
        going = [index for index, drawn in enumerate(tokens) if drawn[-1] not in stop_ids]
        if not going:
            break
        last = np.array([tokens[index][-1] for index in going], dtype=np.int32)
        logits = model.decode_batch(last, [states[index][0] for index in going], width)
        for index, token in zip(going, logits.argmax(axis=1), strict=True):
            tokens[index].append(int(token))
    return [(drawn, bits[: len(drawn)]) for drawn in tokens]


class _Teacher(ForcedTokens):
    """The reference's tokens; keeps the logits that it was shown."""

    def __init__(self, reference: Sequence[int]) -> None:
        super().__init__(reference)
        self.rows: list[F32] = []

    def draw(self, logits: F32) -> int:
        """The next token of the reference."""
        self.rows.append(logits.copy())
        return super().draw(logits)
