"""POST /v1/completions: a prompt goes on; with echo and log-probabilities, a text is scored."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from taper.engine import Request, StepOutput
from taper.engine.constraint import GivenTokens
from taper.engine.schedule import Terms
from taper.server import limits
from taper.server.asking import check_count, request_of, sampling_of, terms_of
from taper.server.errors import invalid, unsupported
from taper.server.fields import CompletionRequest
from taper.server.generation import Choice, Generation
from taper.server.replies import TextLogprobs, choice_object, new_id, taper_object, text_of, usage
from taper.server.serving import Ended, Served
from taper.server.streaming import DONE, event

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt and what is wanted of it."""

    prompt: str
    prompt_ids: list[int]
    requests: list[Request]  # n of them; none where max_tokens is 0
    score: Request | None  # gives the prompt's own log-probabilities


class CompletionTask:
    """One request, checked and not yet submitted.

    Args:
        served: the model.
        ask: the body.
        arrived_s: on the monotonic clock.

    Raises:
        ApiError: 400, 429.
    """

    def __init__(self, served: Served, ask: CompletionRequest, arrived_s: float) -> None:
        self._served = served
        self._ask = ask
        self._id = new_id("cmpl")
        self._created = int(time.time())
        if ask.max_tokens == 0 and not ask.echo:
            raise invalid("max_tokens", "0 needs echo: true")
        if ask.max_tokens == 0 and ask.stream:
            raise invalid("max_tokens", "0 leaves nothing to stream")
        self._terms: Terms = terms_of(served, ask, arrived_s)
        prompts = _prompts(ask)
        check_count(len(prompts) * (ask.n or 1))
        if ask.echo and ask.logprobs is not None and ask.stream:
            raise unsupported("stream", "echo with logprobs comes whole; leave stream out")
        if ask.stream_options is not None and not ask.stream:
            raise invalid("stream_options", "it needs stream: true")
        self._jobs = [self._job(prompt) for prompt in prompts]

    def _job(self, prompt: str | list[int]) -> Job:
        ask, served = self._ask, self._served
        ids = served.encode(prompt) if isinstance(prompt, str) else prompt
        wanted = DEFAULT_MAX_TOKENS if ask.max_tokens is None else ask.max_tokens
        options: dict[str, Any] = {"max_tokens": wanted, "allow_empty_prompt": True}
        requests = [
            request_of(served, ask, ids, sampling=sampling_of(ask, i, ask.logprobs), **options)
            for i in range((ask.n or 1) if wanted else 0)
        ]
        score = self._score(ids) if ask.echo and ask.logprobs is not None and len(ids) > 1 else None
        text = prompt if isinstance(prompt, str) else served.decode(ids)
        return Job(text, ids, requests, score)

    def _score(self, ids: list[int]) -> Request:
        """A request that says the prompt after its first token, whatever the model would have said.

        One decode pass a token; docs/serving.md has the cost.
        """
        vocab_size = self._served.llm.config.vocab_size
        given = tuple(ids[1:])
        sampling = sampling_of(CompletionRequest(model="", prompt="", temperature=0), 0, self._ask.logprobs)
        plain = CompletionRequest(model="", prompt="", ignore_eos=True)
        return request_of(
            self._served,
            plain,
            ids[:1],
            sampling=sampling,
            max_tokens=len(given),
            constraint=lambda: GivenTokens(given, vocab_size),
        )

    async def reply(self) -> dict[str, Any]:
        """Run all of it. Raises ApiError."""
        generations = [self._started(job.requests) for job in self._jobs]
        try:
            scores = [
                self._started([job.score] if job.score else [], self._score_terms) for job in self._jobs
            ]
            generations += scores
            results = await asyncio.gather(*(generation.choices() for generation in generations))
        finally:
            for generation in generations:
                generation.cancel()
        answers, scored = results[: len(self._jobs)], results[len(self._jobs) :]
        choices: list[dict[str, Any]] = []
        for job, made, score in zip(self._jobs, answers, scored, strict=True):
            found = score[0] if score else None
            of_prompt: list[Choice | None] = [*made] or [None]
            for choice in of_prompt:
                choices.append(self._choice(len(choices), job, choice, found))
        ends = [choice.ended for made in answers for choice in made]
        counted = usage(ends, len(self._jobs)) if ends else self._prompt_usage()
        all_ends = ends or [choice.ended for score in scored for choice in score]
        return {**self._head(), "choices": choices, "usage": counted, "taper": taper_object(all_ends)}

    @property
    def _score_terms(self) -> Terms:
        """One width for the whole text, the largest allowed: a score must not depend on the load."""
        width = min(self._terms.max_bits, self._served.llm.max_bits)
        return replace(self._terms, min_bits=width, max_bits=width)

    def _started(self, requests: list[Request], terms: Terms | None = None) -> Generation:
        generation = Generation(self._served.loop, requests, terms or self._terms)
        generation.start()
        return generation

    def _prompt_usage(self) -> dict[str, Any]:
        count = sum(len(job.prompt_ids) for job in self._jobs)
        return {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}

    def _choice(self, index: int, job: Job, choice: Choice | None, score: Choice | None) -> dict[str, Any]:
        text = (job.prompt if self._ask.echo else "") + (text_of(choice) if choice else "")
        logprobs = None
        if self._ask.logprobs is not None:
            lists = TextLogprobs(self._served)
            if self._ask.echo:
                for token_id in job.prompt_ids[:1]:
                    lists.append(token_id, None, ())
            for step in (*(score.steps if score else ()), *(choice.steps if choice else ())):
                lists.append(step.token_id, step.logprob, step.top_logprobs)
            logprobs = lists.lists
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if choice is None else choice.ended.finish_reason,
            "taper": choice_object(choice.ended) if choice else None,
        }

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._served.name,
        }

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; what is refused at the start raises ApiError at the first step."""
        requests = [request for job in self._jobs for request in job.requests]
        generation = self._started(requests)
        per_prompt = max(1, len(requests) // len(self._jobs))
        lists = [TextLogprobs(self._served) for _ in requests]
        fresh = set(range(len(requests)))
        ends: dict[int, Ended] = {}
        try:
            async for index, item in generation.events():
                echoed = ""
                if self._ask.echo and index in fresh:
                    echoed = self._jobs[index // per_prompt].prompt
                fresh.discard(index)
                if isinstance(item, Ended):
                    ends[index] = item
                    yield event(self._chunk(index, echoed, None, item))
                    continue
                logprobs = self._step_logprobs(lists[index], item)
                yield event(self._chunk(index, echoed + item.text, logprobs, item))
            ordered = [ends[index] for index in sorted(ends)]
            options = self._ask.stream_options
            if options is not None and options.include_usage:
                yield event({**self._head(), "choices": [], "usage": usage(ordered, len(self._jobs))})
            yield DONE
        finally:
            generation.cancel()

    def _step_logprobs(self, lists: TextLogprobs, step: StepOutput) -> dict[str, Any] | None:
        if self._ask.logprobs is None:
            return None
        lists.append(step.token_id, step.logprob, step.top_logprobs)
        return lists.take()

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None, item: StepOutput | Ended
    ) -> dict[str, Any]:
        is_end = isinstance(item, Ended)
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": item.finish_reason if is_end else None,
        }
        own = (
            {**taper_object([item]), **choice_object(item)}
            if isinstance(item, Ended)
            else {"bits": item.bits}
        )
        return {**self._head(), "choices": [choice], "taper": own}


def _prompts(ask: CompletionRequest) -> list[str | list[int]]:
    """The prompts, each text or token ids. Raises ApiError 400 for a list of several kinds."""
    given = ask.prompt
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(item, int) for item in given):
        return [[item for item in given if isinstance(item, int)]]
    prompts = [item for item in given if not isinstance(item, int)]
    if len(prompts) < len(given) or not prompts:
        raise invalid("prompt", "it must be text, token ids, or a list of one of these, not empty")
    if len(prompts) > limits.MAX_PROMPTS:
        raise invalid("prompt", f"{len(prompts)} prompts; at most {limits.MAX_PROMPTS}")
    return prompts
