"""Exact mode: few planes draft, all of them verify, and every token is the one that they alone would give.

Speculative decoding (Leviathan, Kalman, Matias, arXiv 2211.17192) with one model as its own draft: its first
planes write drafts behind the KV cache, which is then cut back, and one pass at the high width reads all of
them. By docs/numerics.md that pass gives each token the bytes of a pass of its own. Drafts and tokens are
drawn with the same random numbers, so a draft is right exactly when it is the token that the high width
draws, and the output is that of decoding at the high width with the same seed, greedy or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from taper.engine.completion import StepOutput
from taper.engine.drafting import MAX_DRAFT_TOKENS, Planner, Source
from taper.engine.model_runner import ModelRunner
from taper.engine.prompt_lookup import PromptLookup
from taper.engine.sequence import Sequence
from taper.errors import TaperError
from taper.precision import Exact

Logits = NDArray[np.float32]
Proposal = tuple[Source, list[int]]


class Speculator:
    """Decodes one sequence whose first token is drawn.

    Args:
        sequence: its policy is `Exact`.
        runner: its KV cache holds the prompt.
        planner: chooses the drafts.
        bits: asks the policy for the width of the next verification, and checks the answer.
        draw: draws a token from logits, appends it to the sequence, and says what came of it.
    """

    def __init__(
        self,
        sequence: Sequence,
        runner: ModelRunner,
        planner: Planner,
        bits: Callable[[], float],
        draw: Callable[[Logits, float], StepOutput],
    ) -> None:
        policy = sequence.request.policy
        assert isinstance(policy, Exact)
        self._policy = policy
        self._sequence = sequence
        self._runner = runner
        self._planner = planner
        self._bits = bits
        self._draw = draw
        self._lookup = PromptLookup([*sequence.prompt_ids, *(token.token_id for token in sequence.tokens)])
        self._planes = lru_cache(maxsize=1)(self._planes_below)

    def steps(self) -> Generator[StepOutput, None, None]:
        """The tokens after the first, until the sequence ends or the request is cancelled."""
        while self._goes_on():
            yield from self._round()

    def _goes_on(self) -> bool:
        return self._sequence.state != "finished" and not self._sequence.request.is_cancelled

    def _round(self) -> Generator[StepOutput, None, None]:
        """Draft, verify, and hand out the tokens up to the first that was not drafted."""
        sequence, runner = self._sequence, self._runner
        began_ns = time.perf_counter_ns()
        start, bits = runner.position, self._bits()
        drafts, proposals = self._drafts(bits)
        if sequence.request.is_cancelled:
            return
        drawn: list[int] = []
        for logits in self._verified(drafts, bits):
            output = self._draw(logits, bits)
            token, is_drafted = output.token_id, drafts[len(drawn) : len(drawn) + 1] == [output.token_id]
            sequence.num_accepted += is_drafted
            self._judge(proposals, drawn, token)
            drawn.append(token)
            self._lookup.append(token)
            sequence.decode_ns += time.perf_counter_ns() - began_ns
            yield output
            began_ns = time.perf_counter_ns()
            if not self._goes_on():
                return
            if not is_drafted:
                break
        if len(drawn) <= len(drafts):
            runner.truncate(start + len(drawn))

    def _drafts(self, bits: float) -> tuple[list[int], list[Proposal]]:
        """What the planner wants drafted; and that and what the lookup says, to be judged.

        The KV cache is as before.
        """
        # The last token of the answer needs no draft: the pass that could verify it draws it.
        most = min(MAX_DRAFT_TOKENS, self._sequence.max_tokens - len(self._sequence.tokens) - 1)
        length, found = self._lookup.continuation(most)
        sources, proposals = self._planes(bits), []
        # Without fewer bits nothing is looked up either: a float model has one width, and its passes do not
        # give the same bytes however they are cut.
        if not (sources and most):
            return [], []
        if found:
            lookup = Source("lookup", length)
            sources, proposals = (*sources, lookup), [(lookup, found)]
        draft = self._planner.choose(sources, most)
        if draft.source is None:
            return [], proposals
        if draft.source.kind == "lookup":
            drafts = found[: draft.num_tokens]
        else:
            drafts = self._read_planes(draft.source.size, draft.num_tokens)
            proposals.append((draft.source, drafts))
        self._sequence.num_drafted += len(drafts)
        return drafts, proposals

    def _planes_below(self, bits: float) -> tuple[Source, ...]:
        """The widths that may draft for a verification at `bits`."""
        chosen = self._policy.draft_width
        widths = range(self._runner.min_bits, math.ceil(bits)) if chosen is None else (chosen,)
        return tuple(Source("planes", width) for width in widths if width < bits)

    def _read_planes(self, bits: float, num_tokens: int) -> list[int]:
        """Decode drafts at few bits; less than asked for after a cancellation or logits that are not finite.

        The KV entries of these passes are dropped.
        """
        began_ns = time.perf_counter_ns()
        sequence, runner = self._sequence, self._runner
        start, sampler = runner.position, sequence.sampler.fork()
        token = sequence.tokens[-1].token_id
        drafts: list[int] = []
        try:
            while len(drafts) < num_tokens and not sequence.request.is_cancelled:
                logits = runner.decode(token, bits)
                sequence.num_draft_passes += 1
                sequence.decode_bytes += runner.bytes_of_last_pass(bits)
                token = sampler.draw(logits)
                drafts.append(token)
        except TaperError:
            pass  # where few bits overflow, the bits that count need not
        runner.truncate(start)
        if drafts:
            self._planner.drafted(Source("planes", bits), len(drafts), time.perf_counter_ns() - began_ns)
        return drafts

    def _verified(self, drafts: list[int], bits: float) -> Logits:
        """Logits after the last token and after each draft, (1 + drafts, vocab), of one pass."""
        began_ns = time.perf_counter_ns()
        tokens = [self._sequence.tokens[-1].token_id, *drafts]
        try:
            rows = self._runner.verify(tokens, bits)
        except TaperError:
            if not drafts:
                raise
            return self._verified([], bits)  # it may not be finite after a wrong draft only
        self._sequence.num_decode_passes += 1
        self._sequence.decode_bytes += self._runner.bytes_of_last_pass(bits)
        self._planner.verified(len(tokens), time.perf_counter_ns() - began_ns)
        return rows

    def _judge(self, proposals: list[Proposal], drawn: list[int], token: int) -> None:
        """Tell the planner of every proposal that was right so far whether it has this token, too.

        A lookup is judged even where the planes drafted, which costs nothing.
        """
        for source, proposed in proposals:
            if len(proposed) > len(drawn) and proposed[: len(drawn)] == drawn:
                self._planner.judged(source, proposed[len(drawn)] == token)
