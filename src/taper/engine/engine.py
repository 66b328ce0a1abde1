"""The engine: requests in, tokens out, each at the bits its policy chose."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import lru_cache, partial
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from taper.engine.admission import Admission
from taper.engine.audit import ForcedTokens, run_audit
from taper.engine.completion import Completion, StepOutput, completion_of
from taper.engine.drafting import AdaptivePlanner, Planner
from taper.engine.limits import Limits
from taper.engine.model_runner import Model, ModelRunner
from taper.engine.prepared import PreparedPrompt
from taper.engine.refresh import is_due, refresh
from taper.engine.request import Request
from taper.engine.sampler import logit_features
from taper.engine.sequence import Sequence
from taper.engine.speculation import Speculator
from taper.errors import DoesNotFitError, UsageError
from taper.precision import (
    Bits,
    Exact,
    KvEntries,
    LayerBits,
    LogitFeatures,
    Phase,
    StepContext,
)
from taper.tokenizer import Tokenizer

Logits = NDArray[np.float32]

# Rows of activations are what prefill adds to memory: 256 rows of the widest, 2 * 5632 floats in a 1.1 B
# model, are 11.5 MB, a tenth of what the engine may use beside weights and KV cache.
PREFILL_CHUNK_TOKENS = 256
# Of a prompt that is read ahead: a user who presses return waits for one pass, 0.2 s of a 1.1 B model.
IDLE_CHUNK_TOKENS = 32

# Widths of exact mode whose measurements are kept from request to request, a few kilobytes each.
_MAX_PLANNERS = 16


class TokenStream(Iterator[StepOutput]):
    """The tokens of one request as they are generated.

    Closing it, or leaving its `with` block, ends the request and frees its KV cache; so does the garbage
    collector.
    """

    def __init__(self, sequence: Sequence, steps: Generator[StepOutput, None, None]) -> None:
        self._sequence = sequence
        self._steps = steps

    def __next__(self) -> StepOutput:
        return next(self._steps)

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cancel(self) -> None:
        """End the request before its next pass; may be called from any thread."""
        self._sequence.request.cancel()

    def close(self) -> None:
        """End the request now; it is aborted unless it had finished."""
        self._steps.close()
        self._sequence.finish("abort")

    def completion(self) -> Completion:
        """The record of what was generated so far, complete once the iterator has ended."""
        return completion_of(self._sequence)


class Engine:
    """Runs requests on a model, one KV cache each.

    Args:
        model: a decoder.
        tokenizer: of the model; without one prompts are token ids and outputs have no text.
        prefill_chunk_tokens: prompt tokens in one pass.
        planner_of: makes what chooses the drafts of an exact policy, once for all its requests.
        limits: planes that a pass may read: those that have arrived and fit a budget; None sets no limit.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS,
        planner_of: Callable[[Exact], Planner] = AdaptivePlanner,
        limits: Limits | None = None,
    ) -> None:
        if prefill_chunk_tokens < 1:
            raise UsageError(f"prefill_chunk_tokens is {prefill_chunk_tokens}; it must be at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self._admission = Admission(model, tokenizer)
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self.planner_of = lru_cache(maxsize=_MAX_PLANNERS)(planner_of)
        self.limits = Limits() if limits is None else limits
        self._prepared: PreparedPrompt | None = None

    def stream(self, request: Request, given: ForcedTokens | None = None) -> TokenStream:
        """Check a request and return its tokens; the work is done as they are taken.

        Args:
            request: the prompt, the policy, and how to draw.
            given: tokens in the place of drawn ones, as many as are taken.

        Raises:
            UsageError: an empty prompt, a token outside the vocabulary, text or stop strings without a
                tokenizer, sampling parameters that do not fit the vocabulary, an audit against a width
                outside the model; while it runs: a policy that gives bits outside the model.
            DoesNotFitError: prompt and output are longer than the context; nothing is ever cut off. An audit
                of more tokens than it can keep the logits of. While it runs: the memory budget has no room
                for it, or for the audit's width.
        """
        sequence = self._admission.sequence(request)
        if given is not None:
            sequence.sampler = given
        return TokenStream(sequence, self._steps(sequence))

    def check(self, request: Request) -> None:
        """Raise what `stream` would raise at once; nothing is run."""
        self._admission.sequence(request)

    def generate(self, request: Request) -> Completion:
        """Run a request to its end. Raises what `stream` raises."""
        with self.stream(request) as stream:
            for _ in stream:
                pass
            return stream.completion()

    def prepare(self, request: Request) -> bool:
        """Read the beginning of a prompt ahead of its request, while there is nothing else to do.

        The next request whose prompt begins like this one, and whose policy reads it at the same bits, takes
        the KV cache over and answers with the same bytes as without. Cancelling `request` ends the work
        before its next pass; what was read is kept. Not to be called while another request runs.

        Returns:
            Whether all of it is there, at the bits that the policy wants; False asks for another call when
            more planes have arrived.

        Raises:
            What `stream` raises.
        """
        sequence = self._admission.sequence(request)
        bits = self._bits(sequence, "prefill", 0, None)
        self.limits.leave(sequence)
        ids = sequence.prompt_ids
        if self._prepared is None or not self._prepared.matches(ids, bits):
            self._prepared = PreparedPrompt(ids, bits, ModelRunner(self.model, self.model.context_length))
        chunk_tokens = min(IDLE_CHUNK_TOKENS, self._prefill_chunk_tokens)
        done = self._prepared.fill(chunk_tokens, lambda: request.is_cancelled)
        return done and not sequence.missed_bits

    def audit(self, request: Request, answer: str | SequenceOf[int]) -> Completion:
        """Audit a given answer: its tokens take the place of drawn ones, each at the bits of the policy.

        Args:
            request: the prompt and the policy; sampling, stops and `max_tokens` do not matter.
            answer: text, cut into tokens as the continuation of the prompt's text, or token ids. A token that
                would have ended the output ends nothing here.

        Raises:
            UsageError, DoesNotFitError: as `stream`; an empty answer.
        """
        ids = self._admission.answer_ids(request, answer)
        whole = replace(request, audit=True, max_tokens=len(ids), stop=(), stop_token_ids=(), ignore_eos=True)
        with self.stream(whole, ForcedTokens(ids)) as stream:
            for _ in stream:
                pass
            return stream.completion()

    def _steps(self, sequence: Sequence) -> Generator[StepOutput, None, None]:
        """Prefill, then one token a turn, until the sequence ends; frees the KV cache whatever happens."""
        runner: ModelRunner | None = None
        sequence.state = "running"
        try:
            runner = self._runner(sequence)
            self.limits.admit(sequence, runner.kv_bytes)
            yield from self._run(sequence, runner)
            self._audit(sequence, runner)
        finally:
            self.limits.leave(sequence)
            sequence.audit_log = None
            if runner is not None:
                runner.release()
            sequence.finish("abort")

    def _runner(self, sequence: Sequence) -> ModelRunner:
        """A new KV cache, or the prepared one where it begins as this prompt does."""
        num_tokens = len(sequence.prompt_ids) + sequence.max_tokens
        prepared, self._prepared = self._prepared, None
        reading = sequence.request.kv
        assert not isinstance(reading, str)
        wanted = reading is None and prepared is not None
        if prepared is not None and wanted and prepared.bits == self._bits(sequence, "prefill", 0, None):
            sequence.prompt_bits.append(prepared.bits)
            return prepared.take(sequence.prompt_ids, num_tokens)
        return ModelRunner(self.model, num_tokens, reading)

    def _run(self, sequence: Sequence, runner: ModelRunner) -> Generator[StepOutput, None, None]:
        for start in range(runner.position, len(sequence.prompt_ids), self._prefill_chunk_tokens):
            if sequence.request.is_cancelled:
                return
            output = self._prefill_chunk(sequence, runner, start)
        while True:
            assert output is not None
            logits, step_output = output
            yield step_output
            if sequence.state == "finished" or sequence.request.is_cancelled:
                return
            if isinstance(sequence.request.policy, Exact):
                yield from self._speculator(sequence, runner, sequence.request.policy).steps()
                return
            if is_due(sequence, self.limits):
                refresh(sequence, runner, self._prefill_chunk_tokens)
            output = self._decode(sequence, runner, logits)

    def _speculator(self, sequence: Sequence, runner: ModelRunner, policy: Exact) -> Speculator:
        """What decodes in exact mode."""
        began_ns = time.perf_counter_ns()
        speculator = Speculator(
            sequence,
            runner,
            self.planner_of(policy),
            lambda: self.limits.clamp(sequence, "decode", self._admission.readable(policy, policy.width)),
            lambda logits, bits: self._draw(sequence, logits, bits),
        )
        sequence.decode_ns += time.perf_counter_ns() - began_ns
        return speculator

    def _audit(self, sequence: Sequence, runner: ModelRunner) -> None:
        """Read a complete answer once more at the audit's width, if one was asked for."""
        log, request = sequence.audit_log, sequence.request
        if log is None or sequence.state != "finished":
            return
        most = min(self.model.max_bits, self.limits.bits())
        bits = most if log.bits is None else log.bits
        if bits > most:
            raise DoesNotFitError(
                f"the audit is against {bits:g} bits; {most} are in memory", "audit against fewer bits"
            )
        sequence.audit = run_audit(
            log.logits,
            bits,
            runner,
            sequence.prompt_ids,
            [token.token_id for token in sequence.tokens],
            reuse_prompt=all(of_prompt == bits for of_prompt in sequence.prompt_bits),
            chunk_tokens=self._prefill_chunk_tokens,
            is_cancelled=lambda: request.is_cancelled,
        )

    def _prefill_chunk(
        self, sequence: Sequence, runner: ModelRunner, start: int
    ) -> tuple[Logits, StepOutput] | None:
        """One chunk of the prompt; the last one draws the first token."""
        began_ns = time.perf_counter_ns()
        chunk = sequence.prompt_ids[start : start + self._prefill_chunk_tokens]
        bits = self._bits(sequence, "prefill", start, None)
        logits = runner.prefill(chunk, bits, is_last=start + len(chunk) == len(sequence.prompt_ids))
        sequence.num_prefilled += len(chunk)
        sequence.prompt_bits.append(bits)
        sequence.prefill_bytes += runner.bytes_of_last_pass(bits)
        output = None if logits is None else (logits, self._draw(sequence, logits, runner.recorded(bits)))
        sequence.prefill_ns += time.perf_counter_ns() - began_ns
        return output

    def _decode(
        self, sequence: Sequence, runner: ModelRunner, last_logits: Logits
    ) -> tuple[Logits, StepOutput]:
        """One decode pass and its token."""
        began_ns = time.perf_counter_ns()
        features = partial(logit_features, last_logits)
        bits = self._bits(sequence, "decode", runner.position, features, runner.last_layer_kv)
        logits = runner.decode(sequence.tokens[-1].token_id, bits)
        sequence.num_decode_passes += 1
        sequence.decode_bytes += runner.bytes_of_last_pass(bits)
        output = self._draw(sequence, logits, runner.recorded(bits))
        sequence.decode_ns += time.perf_counter_ns() - began_ns
        return logits, output

    def _draw(self, sequence: Sequence, logits: Logits, bits: float) -> StepOutput:
        if sequence.audit_log is not None:
            sequence.audit_log.keep(logits)
        token = sequence.sampler.sample(logits)
        text = sequence.append(token, bits)
        return StepOutput(
            text, token.token_id, bits, token.logprob, token.top_logprobs, sequence.finish_reason
        )

    def _bits(
        self,
        sequence: Sequence,
        phase: Phase,
        position: int,
        features: Callable[[], LogitFeatures] | None,
        kv: Callable[[], KvEntries] | None = None,
    ) -> Bits:
        """Ask the policy, refuse an answer that the model does not hold, and keep it within the limits."""
        low, high, fractions = self.model.min_bits, self.model.max_bits, self.model.has_sensitivity
        count, limit = len(sequence.tokens), sequence.max_tokens
        step = StepContext(phase, position, count, limit, low, high, features, fractions, kv)
        policy = sequence.request.policy
        bits = policy.bits(step)
        if not isinstance(bits, LayerBits):
            return self.limits.clamp(sequence, phase, self._admission.readable(policy, bits))
        layers = [self._admission.readable(policy, layer) for layer in bits.layers]
        head = self._admission.readable(policy, bits.head)
        most = self.limits.clamp(sequence, phase, max(*layers, head))
        return LayerBits(tuple(min(layer, most) for layer in layers), min(head, most))
