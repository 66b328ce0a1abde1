"""How exact mode chooses its drafts: which source, how many tokens, from what it has measured so far."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Literal, NamedTuple, Protocol

from taper.precision import Exact

# Where a pass is bound by memory a token more in it is nearly free, and at 95 % acceptance 7 drafts are best
# for 8 bits drafted at 3; where it is bound by arithmetic, 2 to 4 are.
MAX_DRAFT_TOKENS = 8

# A choice is kept for so many rounds: to make one takes 0.04 ms, an eighth of a step of the smallest model.
ROUNDS_OF_A_CHOICE = 8

# Of the time, what may go to trying something else than the best.
EXPLORED_FRAC = 0.015

# A time is the lower quartile of the last 16: some rounds are held up by other work, and widths may differ
# by a few percent only.
KEPT_TIMES = 16

# Passes of one token before the first draft: all guesses are parts of their time, and the first one is cold.
FIRST_PASSES = 3

# Acceptance is a mean that forgets: after 256 judged drafts one counts 1/e of a new one. It starts as if so
# many drafts had been judged.
FORGET = 1 - 1 / 256
PRIOR_DRAFTS = 4.0

# What a token more adds to a pass, as a part of a pass of one, until passes of two lengths were measured.
PRIOR_SLOPE = 0.25


class Source(NamedTuple):
    """Where drafts come from: the first planes (`size` bits), or what followed a match of `size` tokens."""

    kind: Literal["planes", "lookup"]
    size: float


class Draft(NamedTuple):
    """What to draft before the next verification: `num_tokens` from `source`; None for 0 tokens."""

    source: Source | None
    num_tokens: int


NO_DRAFT = Draft(None, 0)


class Planner(Protocol):
    """Chooses drafts and hears what became of them. Nothing it says changes the output, only the time."""

    def choose(self, sources: SequenceOf[Source], most: int) -> Draft:
        """What to draft next: at most `most` tokens, at least 1, from one of the sources, or nothing."""
        ...

    def drafted(self, source: Source, num_tokens: int, ns: int) -> None:
        """So many tokens took so long to draft."""
        ...

    def verified(self, num_tokens: int, ns: int) -> None:
        """A pass over so many tokens at the high width took so long."""
        ...

    def judged(self, source: Source, is_accepted: bool) -> None:
        """A draft, of whose predecessors none was rejected, was accepted or not."""
        ...


class AdaptivePlanner:
    """Takes the draft with the least expected time per token.

    With acceptance a of each draft, g drafts give (1 - a^(g+1)) / (1 - a) tokens (Leviathan, Kalman, Matias,
    arXiv 2211.17192, equation 1) in the time of g draft steps and one pass over g + 1 tokens. All three are
    measured as the engine runs. What was not measured yet is guessed: a step at d of h bits takes d / h of a
    pass, and 1 - 2^-d of its drafts are accepted, close to the top-1 agreement of the models at hand.
    Where nothing pays, it drafts nothing.

    It learns over all requests of one policy; one planner may serve several streams.

    Args:
        policy: its width is that of the verification.
    """

    def __init__(self, policy: Exact) -> None:
        self._width = policy.width
        self._times: dict[Source | int, tuple[int, ...]] = {}
        self._ns_of: dict[Source | int, float] = {}
        self._judged: dict[Source, tuple[float, float]] = {}  # accepted, all
        self._chosen: dict[Source, Draft] = {}  # by what else could draft
        self._num_rounds = 0
        self._credit_ns = 0.0
        self._num_explored = 0

    def choose(self, sources: SequenceOf[Source], most: int) -> Draft:
        """See `Planner`."""
        if len(self._times.get(1, ())) < FIRST_PASSES:
            return NO_DRAFT
        chosen = self._chosen.get(sources[-1])  # the widths are always the same, the lookup changes
        self._num_rounds += 1
        if chosen is None or self._num_rounds % ROUNDS_OF_A_CHOICE == 0:
            chosen = self._choice(sources)
        return Draft(chosen.source, min(chosen.num_tokens, most))

    def drafted(self, source: Source, num_tokens: int, ns: int) -> None:
        """See `Planner`."""
        self._timed(source, ns // num_tokens)

    def verified(self, num_tokens: int, ns: int) -> None:
        """See `Planner`."""
        self._timed(num_tokens, ns)

    def judged(self, source: Source, is_accepted: bool) -> None:
        """See `Planner`."""
        accepted, judged = self._judged.get(source) or self._prior(source)
        self._judged[source] = accepted * FORGET + is_accepted, judged * FORGET + 1

    def acceptance(self, source: Source) -> float:
        """The part of this source's drafts that is accepted, as far as is known."""
        accepted, judged = self._judged.get(source) or self._prior(source)
        return accepted / judged

    def _prior(self, source: Source) -> tuple[float, float]:
        part = 1 - 2.0**-source.size if source.kind == "planes" else 0.5
        return PRIOR_DRAFTS * part, PRIOR_DRAFTS

    def _timed(self, what: Source | int, ns: int) -> None:
        times = (*self._times.get(what, ()), ns)[-KEPT_TIMES:]
        self._times[what] = times
        self._ns_of[what] = sorted(times)[len(times) // 4]

    def _choice(self, sources: SequenceOf[Source]) -> Draft:
        """The best draft, kept for the next rounds, or one beside it, tried once."""
        if self._num_rounds % ROUNDS_OF_A_CHOICE == 0:
            self._chosen.clear()
        passes = [self._pass_ns(count + 1) for count in range(1, MAX_DRAFT_TOKENS + 1)]
        options = [self._best_of(source, passes) for source in sources]
        best_ns, best = min([(self._ns(NO_DRAFT), NO_DRAFT), *options], key=lambda option: option[0])
        self._chosen[sources[-1]] = best
        self._credit_ns += EXPLORED_FRAC * ROUNDS_OF_A_CHOICE * self._ns(best)
        beside = self._beside(best, [draft for _, draft in options])
        draft = beside[self._num_explored % len(beside)]
        cost = self._ns(draft) - self._tokens(draft) * best_ns
        if cost > self._credit_ns:
            return best
        self._credit_ns -= max(0.0, cost)
        self._num_explored += 1
        return draft

    def _best_of(self, source: Source, passes: list[float]) -> tuple[float, Draft]:
        """The best number of drafts from a source and its expected ns per token; `passes` over 2, 3, ..."""
        acceptance, step_ns = self.acceptance(source), self._step_ns(source)
        tokens = still_right = 1.0
        options = []
        for count, pass_ns in enumerate(passes, 1):
            still_right *= acceptance
            tokens += still_right
            options.append(((count * step_ns + pass_ns) / tokens, count))
        ns, count = min(options)
        return ns, Draft(source, count)

    def _beside(self, best: Draft, options: list[Draft]) -> list[Draft]:
        """One draft more or less, one width up or down; all widths where none is best.

        Lookups need no trial: they are judged unasked.
        """
        planes = [draft for draft in options if draft.source is not None and draft.source.kind == "planes"]
        if best.source is None:
            return planes
        counts = (best.num_tokens - 1, best.num_tokens + 1)
        drafts = [Draft(best.source if n else None, n) for n in counts if n <= MAX_DRAFT_TOKENS]
        widths = [draft.source for draft in planes]
        if best.source in widths:
            index = widths.index(best.source)
            near = widths[max(0, index - 1) : index] + widths[index + 1 : index + 2]
            drafts += [Draft(source, best.num_tokens) for source in near]
        return drafts

    def _tokens(self, draft: Draft) -> float:
        """Expected tokens of a round."""
        if draft.source is None:
            return 1.0
        acceptance = min(self.acceptance(draft.source), 0.999)
        return (1 - acceptance ** (draft.num_tokens + 1)) / (1 - acceptance)

    def _ns(self, draft: Draft) -> float:
        """Expected time of a round."""
        step_ns = 0.0 if draft.source is None else self._step_ns(draft.source)
        return draft.num_tokens * step_ns + self._pass_ns(draft.num_tokens + 1)

    def _step_ns(self, source: Source) -> float:
        """Time of drafting one token."""
        if source.kind == "lookup":
            return 0.0
        return self._ns_of.get(source, self._ns_of[1] * source.size / self._width)

    def _pass_ns(self, num_tokens: int) -> float:
        """Time of a pass over so many tokens: measured, or a line through what was measured."""
        if num_tokens in self._ns_of:
            return self._ns_of[num_tokens]
        counts = sorted(count for count in self._ns_of if isinstance(count, int))
        below = max(count for count in counts if count < num_tokens)
        slope = PRIOR_SLOPE * self._ns_of[1]
        if counts[-1] > 1:
            slope = (self._ns_of[counts[-1]] - self._ns_of[1]) / (counts[-1] - 1)
        return self._ns_of[below] + slope * (num_tokens - below)
