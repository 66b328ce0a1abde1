"""From a request to a sequence: what cannot run is refused before any work is done."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from numbers import Integral, Real

from taper.engine.audit import AuditLog
from taper.engine.model_runner import Model
from taper.engine.request import Request
from taper.engine.sampler import Sampler
from taper.engine.sequence import Sequence
from taper.engine.stop_strings import StopStrings
from taper.errors import DoesNotFitError, UsageError
from taper.precision import Exact, PrecisionPolicy, describe_widths, whole_bits
from taper.tokenizer import IncrementalDetokenizer, Tokenizer


class Admission:
    """Checks requests against a model and makes their sequences.

    Args:
        model: a decoder.
        tokenizer: of the model, or None.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer | None) -> None:
        self._model = model
        self._tokenizer = tokenizer

    def sequence(self, request: Request) -> Sequence:
        """A sequence that waits. Raises what `Engine.stream` says of requests that cannot run."""
        prompt_ids = self._prompt_ids(request)
        if request.stop and self._tokenizer is None:
            raise UsageError("stop strings need a tokenizer; the model has none", "use stop_token_ids")
        config = self._model.config
        stop_ids = frozenset(() if request.ignore_eos else config.eos_token_ids) | {*request.stop_token_ids}
        self._check_vocabulary("stop_token_ids", [*request.stop_token_ids])
        if isinstance(request.policy, Exact) and request.policy.draft_width is not None:
            self.readable(request.policy, request.policy.draft_width)
        given = request.sampling.seed
        seed = secrets.randbits(64) if given is None else int(given)
        max_tokens = self._max_tokens(request, len(prompt_ids))
        return Sequence(
            request=request,
            prompt_ids=prompt_ids,
            max_tokens=max_tokens,
            stop_token_ids=stop_ids,
            seed=seed,
            sampler=Sampler(
                request.sampling,
                config.vocab_size,
                prompt_ids,
                seed,
                None if request.constraint is None else request.constraint(),
            ),
            stop_strings=StopStrings(request.stop),
            detokenizer=IncrementalDetokenizer(self._tokenizer, prompt_ids) if self._tokenizer else None,
            audit_log=self._audit_log(request, max_tokens),
        )

    def _audit_log(self, request: Request, max_tokens: int) -> AuditLog | None:
        if not request.audit:
            return None
        bits = None if request.audit_bits is None else whole_bits(request.audit_bits)
        if bits is not None:
            self._model.bytes_per_pass(bits)  # refuses bits that the model cannot be read at
        return AuditLog.sized(bits, max_tokens, self._model.config.vocab_size)

    def _prompt_ids(self, request: Request) -> list[int]:
        ids = self._encoded(request)
        self._check_vocabulary("the prompt", ids)
        bos = self._model.config.bos_token_id
        if not ids and request.allow_empty_prompt and bos is not None:
            return [bos]
        if not ids:
            raise UsageError(
                "the prompt is empty; it needs at least one token", "write some text to continue"
            )
        return ids

    def _encoded(self, request: Request) -> list[int]:
        """The prompt as token ids; none for empty text, whatever special tokens would go around it."""
        if isinstance(request.prompt, (bytes, bytearray)) or not isinstance(request.prompt, Iterable):
            raise UsageError(f"the prompt is {type(request.prompt).__name__}; it must be text or token ids")
        if not isinstance(request.prompt, str):
            return list(request.prompt)
        if self._tokenizer is None:
            raise UsageError("the prompt is text, but the model has no tokenizer", "give token ids")
        if not request.prompt:
            return []
        return self._tokenizer.encode(request.prompt, special_tokens=request.special_tokens)

    def answer_ids(self, request: Request, answer: str | SequenceOf[int]) -> list[int]:
        """A given answer as token ids, cut as the continuation of the request's prompt.

        Raises:
            UsageError: an empty answer, text without a tokenizer, a token outside the vocabulary.
        """
        if not isinstance(answer, str):
            ids = list(answer)
        elif self._tokenizer is None:
            raise UsageError("the answer is text, but the model has no tokenizer", "give token ids")
        elif isinstance(request.prompt, str):
            # As one text: some tokenizers put a space before a text that stands alone.
            whole = request.prompt + answer
            ids = self._tokenizer.encode(whole, special_tokens=request.special_tokens)
            del ids[: len(self._encoded(request))]
        else:
            ids = self._tokenizer.encode(answer, special_tokens=False)
        self._check_vocabulary("the answer", ids)
        if not ids:
            raise UsageError("the answer is empty; an audit needs at least one token", "give the answer")
        return ids

    def _check_vocabulary(self, name: str, ids: list[int]) -> None:
        size = self._model.config.vocab_size
        for token_id in ids:
            if not isinstance(token_id, Integral) or not 0 <= token_id < size:
                raise UsageError(
                    f"{name} has the token id {token_id!r}; the vocabulary is 0 to {size - 1}",
                    "use the tokenizer that belongs to the model",
                )

    def _max_tokens(self, request: Request, num_prompt: int) -> int:
        """The limit on new tokens, refused where it does not fit: never cut in silence."""
        context = self._model.context_length
        left = context - num_prompt
        if left < 1:
            raise DoesNotFitError(
                f"the prompt has {num_prompt} tokens; the context of {context} leaves no room for an answer",
                f"shorten the prompt to at most {context - 1} tokens",
            )
        if request.max_tokens is None:
            return left
        if request.max_tokens > left:
            raise DoesNotFitError(
                f"{num_prompt} prompt and {request.max_tokens} new tokens exceed the context of {context}",
                f"ask for at most {left} new tokens, or shorten the prompt",
            )
        return request.max_tokens

    def readable(self, policy: PrecisionPolicy, bits: float) -> float:
        """Bits that a policy gave, an int where they are whole.

        Raises:
            UsageError: the model does not hold them.
        """
        low, high, fractions = self._model.min_bits, self._model.max_bits, self._model.has_sensitivity
        if not isinstance(bits, Real) or not low <= bits <= high:
            raise UsageError(
                f"policy {policy.name!r} gave {bits!r} bits; this model holds {describe_widths(low, high)}",
                "parse the policy for this model's widths",
            )
        whole = whole_bits(float(bits))
        if not (fractions or isinstance(whole, int)):
            raise UsageError(
                f"policy {policy.name!r} gave {bits!r} bits; a fraction needs a file with sensitivity",
                "choose whole numbers, or measure it: taper allocate FILE --text TEXT",
            )
        return whole
