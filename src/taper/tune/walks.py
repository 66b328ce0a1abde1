"""How well a schedule does on one prompt: walks that can go back, and the losses that they measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.evaluate.divergence import kl_divergences, log_likelihoods, log_normalisers
from taper.evaluate.sequences import rouge_l
from taper.models import Decoder
from taper.tokenizer import Tokenizer
from taper.tune.greedy import GreedyWalk, new_cache, run_prompt
from taper.tune.prompts import PromptSet

F32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


class ScoredWalk(Protocol):
    """One prompt under one schedule after the other."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far."""
        ...

    def prefill(self, bits: float) -> None:
        """Run the prompt and begin a new answer."""
        ...

    def extend(self, bits: float, num_tokens: int) -> None:
        """Go on at these bits."""
        ...

    def back_to(self, num_tokens: int) -> None:
        """Forget all tokens but the first `num_tokens`."""
        ...

    def value(self) -> float:
        """Of the answer so far: one figure, which `Loss` compares."""
        ...


@dataclass(frozen=True, slots=True)
class Reference:
    """What schedules are held against: the float model, or the file at all its planes."""

    decoder: Decoder
    bits: float


class ForcedReader:
    """The distributions along given tokens after a prompt; it can go back.

    Args:
        decoder: the model.
        prompt: token ids.
        max_tokens: that may follow.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int], max_tokens: int) -> None:
        self._decoder = decoder
        self._prompt = prompt
        self._cache = new_cache(decoder, prompt, max_tokens)
        self._first: F32 | None = None

    def prefill(self, bits: float) -> None:
        """Run the prompt."""
        self._first = run_prompt(self._decoder, self._cache, self._prompt, bits)

    def read(self, tokens: Sequence[int], start: int, bits: float) -> F32:
        """Distributions that tokens[start:] are drawn from, float32 (tokens - start, vocab).

        The pass at `bits` reads the token before each of them; token 0 has the prompt's distribution. All of
        tokens[:start] were read before.
        """
        assert self._first is not None
        self._cache.truncate(len(self._prompt) + max(0, start - 1))
        rows = [] if start else [self._first[None]]
        fed = tokens[max(0, start - 1) : len(tokens) - 1]
        if len(fed):
            found = self._decoder.forward(fed, self._cache, bits, logits="all")
            assert found is not None
            rows.append(found)
        return np.concatenate(rows)


class ForcedWalk:
    """A true answer read at a schedule's bits.

    Args:
        decoder: the model.
        prompt, answer: token ids.
        score: float64 (n,) of distributions (n, vocab), the first of the n tokens' place, and their ids;
            the walk's value is its mean over the answer.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: Sequence[int],
        answer: Sequence[int],
        score: Callable[[F32, int, Sequence[int]], Float64],
    ) -> None:
        self._reader = ForcedReader(decoder, prompt, len(answer))
        self._answer = answer
        self._score = score
        self._scores: list[float] = []

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return len(self._scores)

    def prefill(self, bits: float) -> None:
        """Run the prompt."""
        self._scores.clear()
        self._reader.prefill(bits)

    def extend(self, bits: float, num_tokens: int) -> None:
        """Read the next tokens of the answer, as far as there are some."""
        start = len(self._scores)
        end = min(start + num_tokens, len(self._answer))
        if start < end:
            logits = self._reader.read(self._answer[:end], start, bits)
            self._scores += self._score(logits, start, self._answer[start:end]).tolist()

    def back_to(self, num_tokens: int) -> None:
        """Keep the first scores; the reader goes back when it reads on."""
        del self._scores[num_tokens:]

    def value(self) -> float:
        """Mean score of a token."""
        return float(np.mean(self._scores))


class AuditedWalk(GreedyWalk):
    """A greedy answer, with the KL of the distributions used from the reference's along the same tokens."""

    def __init__(
        self, decoder: Decoder, prompt: Sequence[int], max_tokens: int, reference: Reference
    ) -> None:
        super().__init__(decoder, prompt, max_tokens, keep_logits=True)
        self._bits = reference.bits
        self._auditor = ForcedReader(reference.decoder, prompt, max_tokens)
        self._auditor.prefill(reference.bits)
        self._divergences: list[float] = []

    def extend(self, bits: float, num_tokens: int) -> None:
        """Draw tokens, then audit them."""
        start = len(self.tokens)
        super().extend(bits, num_tokens)
        if start < len(self.tokens):
            wanted = self._auditor.read(self.tokens, start, self._bits)
            used = np.stack(self.logits[start:])
            norms = log_normalisers(wanted), log_normalisers(used)
            self._divergences += kl_divergences(wanted, norms[0], used, norms[1]).tolist()

    def _cut(self, num_tokens: int) -> None:
        super()._cut(num_tokens)
        del self._divergences[num_tokens:]

    def value(self) -> float:
        """Mean KL of a token in nats."""
        return float(np.mean(self._divergences))


class RougeWalk(GreedyWalk):
    """A greedy answer, compared with a text."""

    def __init__(
        self, decoder: Decoder, prompt: Sequence[int], max_tokens: int, text: str, tokenizer: Tokenizer
    ) -> None:
        super().__init__(decoder, prompt, max_tokens)
        self._text = text
        self._tokenizer = tokenizer

    def value(self) -> float:
        """ROUGE-L F1 with the text, 0..1."""
        return rouge_l(self._text, self._tokenizer.decode(self.tokens))


@dataclass(frozen=True, slots=True)
class Task:
    """Everything that a walk over one of the prompts needs.

    Attributes:
        decoder: the file.
        tokenizer: its tokenizer.
        prompts: of the task.
        high_bits: the uniform width that schedules are compared with.
        reference: for losses against a model.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    prompts: PromptSet
    high_bits: float
    reference: Reference

    def likelihood(self, index: int) -> ScoredWalk:
        """Values: mean negative log-likelihood of the true answer, nats a token."""
        prompt, answer = self._with_answer(index)

        def score(logits: F32, start: int, tokens: Sequence[int]) -> Float64:
            return -log_likelihoods(logits, log_normalisers(logits), np.asarray(tokens, np.int32))

        return ForcedWalk(self.decoder, prompt, answer, score)

    def divergence(self, index: int) -> ScoredWalk:
        """Values: mean KL from uniform high along the true answer, nats a token."""
        prompt, answer = self._with_answer(index)
        reader = ForcedReader(self.decoder, prompt, len(answer))
        reader.prefill(self.high_bits)
        high = reader.read(answer, 0, self.high_bits)
        norms = log_normalisers(high)

        def score(logits: F32, start: int, tokens: Sequence[int]) -> Float64:
            rows = slice(start, start + len(tokens))
            return kl_divergences(high[rows], norms[rows], logits, log_normalisers(logits))

        return ForcedWalk(self.decoder, prompt, answer, score)

    def audit(self, index: int) -> ScoredWalk:
        """Values: mean KL from the reference along the schedule's own answer, nats a token."""
        return AuditedWalk(self.decoder, self.prompts.prompts[index], self.prompts.max_tokens, self.reference)

    def rouge(self, index: int) -> ScoredWalk:
        """Values: ROUGE-L of the greedy answer with the true one."""
        prompt, answer = self._with_answer(index)
        text = self.tokenizer.decode(answer)
        return RougeWalk(self.decoder, prompt, self.prompts.max_tokens, text, self.tokenizer)

    def rouge_of_model(self, index: int) -> ScoredWalk:
        """Values: ROUGE-L of the greedy answer with the reference model's greedy answer."""
        prompt, limit = self.prompts.prompts[index], self.prompts.max_tokens
        walk = GreedyWalk(self.reference.decoder, prompt, limit)
        walk.prefill(self.reference.bits)
        walk.extend(self.reference.bits, limit)
        text = self.tokenizer.decode(walk.tokens)
        return RougeWalk(self.decoder, prompt, limit, text, self.tokenizer)

    def _with_answer(self, index: int) -> tuple[Sequence[int], Sequence[int]]:
        answer = self.prompts.references[index]
        if not answer:
            raise UsageError(
                f"task {self.prompts.name!r}: a prompt has no true answer to compare with",
                hint="give references, or choose --loss kl or --loss rouge-model",
            )
        return self.prompts.prompts[index], answer
