"""Exact mode gives what the high width alone gives, whatever is drafted, and counts what it read."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import numpy as np
import pytest

import taper
from taper.engine import Engine, Request, SamplingParams
from taper.engine.drafting import NO_DRAFT, Draft, Source
from taper.errors import TaperError, UsageError
from taper.precision import Exact, Fixed

VOCAB, CONTEXT = 40, 64
WEIGHT_BYTES, KV_BYTES = 1000, 10
HIGH = 6


@dataclass
class RecordingCache:
    """Every entry is its token and the bits that it was written at."""

    capacity: int
    entries: list[tuple[int, float]] = field(default_factory=list)

    @property
    def num_tokens(self):
        return len(self.entries)

    def bytes_read(self, num_tokens):
        return KV_BYTES * num_tokens

    def bytes_at(self, num_tokens):
        return KV_BYTES * num_tokens

    def release_old(self):
        pass

    def keeps(self, num_tokens):
        return num_tokens

    def truncate(self, num_tokens):
        assert num_tokens <= len(self.entries)
        del self.entries[num_tokens:]


class HistoryDecoder:
    """Logits depend on every entry, its bits included, and most on the last token, so that texts repeat
    themselves; few bits add noise. An entry that a draft left in the cache, or a token out of place, changes
    everything after it.
    """

    def __init__(self, eos=(), noise=0.6, vocab_size=VOCAB, min_bits=2, max_bits=8):
        base = taper.load().config
        self.config = type(base)(
            **{
                name: getattr(base, name)
                for name in base.__dataclass_fields__
                if name not in ("vocab_size", "eos_token_ids", "bos_token_id")
            },
            vocab_size=vocab_size,
            bos_token_id=None,
            eos_token_ids=eos,
        )
        self.min_bits, self.max_bits, self.context_length = min_bits, max_bits, CONTEXT
        self.has_sensitivity = False
        self.noise = noise
        self.passes = []
        self.on_pass = lambda model: None
        self.is_finite = lambda tokens, bits: True

    def new_cache(self, max_tokens):
        return RecordingCache(max_tokens)

    def forward(self, tokens, cache, bits, logits):
        start = cache.num_tokens
        assert start + len(tokens) <= cache.capacity
        self.passes.append((tuple(tokens.tolist()), bits, start))
        self.on_pass(self)
        if not self.is_finite(tuple(tokens.tolist()), bits):
            raise TaperError("not finite")
        cache.entries += [(token, bits) for token in tokens.tolist()]
        if logits == "none":
            return None
        first = start if logits == "all" else cache.num_tokens - 1
        return np.stack([self._row(cache.entries[: end + 1], bits) for end in range(first, cache.num_tokens)])

    def _row(self, entries, bits):
        row = np.random.default_rng(entries[-1][0]).normal(0, 3, self.config.vocab_size)
        generator = np.random.default_rng(hash((*entries[:-1], entries[-1][0])) % 2**32)
        row += generator.normal(0, 0.5, len(row))
        return (row + generator.normal(0, self.noise * abs(HIGH - bits) / HIGH, len(row))).astype(np.float32)

    def bytes_per_pass(self, bits):
        return int(bits * WEIGHT_BYTES)


class Scripted:
    """A planner that cycles through counts and sources, whatever happens, and writes down what it hears."""

    def __init__(self, counts=(3, 0, 1, 8, 2), kinds=("planes",), seed=0):
        self.counts, self.kinds = itertools.cycle(counts), itertools.cycle(kinds)
        self.random = random.Random(seed)
        self.drafts, self.judgements, self.passes = [], [], []

    def choose(self, sources, most):
        count, kind = next(self.counts), next(self.kinds)
        of_kind = [source for source in sources if source.kind == kind]
        if not count or not of_kind:
            return NO_DRAFT
        self.drafts.append(Draft(self.random.choice(of_kind), min(count, most)))
        return self.drafts[-1]

    def drafted(self, source, num_tokens, ns):
        assert ns >= 0

    def verified(self, num_tokens, ns):
        self.passes.append(num_tokens)

    def judged(self, source, is_accepted):
        self.judgements.append((source, is_accepted))


def run(model, policy, planner=None, prompt=(1, 2, 3), tokenizer=None, **options):
    sampling = SamplingParams(**{k: options.pop(k) for k in [*options] if k in SamplingParams.__slots__})
    engine = Engine(model, tokenizer, planner_of=lambda policy: planner or Scripted())
    return engine.generate(Request(list(prompt), policy, sampling=sampling, **options))


def output(completion):
    """All that exact mode must have in common with the high width alone."""
    return (
        completion.token_ids,
        completion.text,
        completion.bits,
        completion.logprobs,
        completion.top_logprobs,
        completion.finish_reason,
        completion.stop_reason,
        completion.usage.average_bits,
    )


SAMPLINGS = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "seed": 5},
    "penalised": {
        "temperature": 0.7,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.7,
        "logit_bias": {4: 1.0},
        "seed": 8,
    },
    "greedy, penalised": {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    "reported": {"temperature": 1.0, "seed": 1, "logprobs": True, "top_logprobs": 3},
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("kinds", [("planes",), ("lookup",), ("planes", "lookup", "planes")], ids="-".join)
def test_output_is_that_of_the_high_width(sampling, kinds):
    """Over prompts that repeat themselves, so that lookups find something."""
    for seed in range(4):
        prompt = random.Random(seed).choices(range(VOCAB), k=4) * 3
        expected = run(HistoryDecoder(), Fixed(HIGH), prompt=prompt, max_tokens=40, **sampling)
        found = run(
            HistoryDecoder(), Exact(HIGH), Scripted(kinds=kinds, seed=seed), prompt, max_tokens=40, **sampling
        )
        assert output(found) == output(expected)
        assert found.usage.num_drafted_tokens > 0 or kinds == ("lookup",)  # there may be nothing to look up


def test_a_draft_is_right_exactly_when_it_is_drawn():
    """Without noise every width draws the same, drawn or greedy: with the same numbers, then."""
    sampling = {"temperature": 1.0, "seed": 2, "repetition_penalty": 1.3}
    planner = Scripted(counts=(3,))
    found = run(SameAtAllBits(), Exact(HIGH), planner, max_tokens=41, **sampling)
    assert {is_accepted for _, is_accepted in planner.judgements} == {True}
    assert planner.passes == [4] * 10
    usage = found.usage
    assert (usage.num_drafted_tokens, usage.num_accepted_tokens, usage.num_decode_passes) == (30, 30, 10)


class SameAtAllBits(HistoryDecoder):
    """Few bits change nothing."""

    def _row(self, entries, bits):
        return super()._row([(token, HIGH) for token, _ in entries], HIGH)


def test_cache_holds_entries_of_the_high_width_only():
    model, caches = HistoryDecoder(), []
    model.new_cache = lambda n: caches.append(RecordingCache(n)) or caches[0]
    completion = run(model, Exact(HIGH), max_tokens=30)
    kept = caches[0].entries[: 3 + 29]
    assert kept == [(token, HIGH) for token in (1, 2, 3, *completion.token_ids[:-1])]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 7, CONTEXT - 3])
def test_length_and_context_end_where_they_should(max_tokens):
    """The cache of prompt and answer refuses one entry more; no draft looks beyond the last token."""
    expected = run(HistoryDecoder(), Fixed(HIGH), max_tokens=max_tokens)
    found = run(HistoryDecoder(), Exact(HIGH), Scripted(counts=(8, 8, 3)), max_tokens=max_tokens)
    assert output(found) == output(expected)
    assert found.finish_reason == "length"
    assert len(found.token_ids) == max_tokens


def test_stop_token_inside_a_round_ends_there():
    for seed in range(20):
        sampling = {"temperature": 1.0, "seed": seed, "max_tokens": 50}
        expected = run(HistoryDecoder(eos=(7, 8)), Fixed(HIGH), **sampling)
        found = run(HistoryDecoder(eos=(7, 8)), Exact(HIGH), Scripted(counts=(5,)), **sampling)
        assert output(found) == output(expected)


def test_stop_strings_and_text_are_those_of_the_high_width(tokenizer):
    model = {"vocab_size": 258}
    for seed in range(20):
        asked = {"temperature": 1.0, "seed": seed, "max_tokens": 50, "stop": ("a", "\x01", "€")}
        expected = run(HistoryDecoder(**model), Fixed(HIGH), tokenizer=tokenizer, **asked)
        found = run(HistoryDecoder(**model), Exact(HIGH), Scripted((5,)), tokenizer=tokenizer, **asked)
        assert output(found) == output(expected)


def test_stream_gives_one_step_a_token_with_the_bits_of_its_logits():
    engine = Engine(HistoryDecoder(), None, planner_of=lambda policy: Scripted())
    stream = engine.stream(Request([1, 2, 3], Exact(HIGH), max_tokens=20))
    steps = list(stream)
    assert [step.token_id for step in steps] == list(stream.completion().token_ids)
    assert [step.bits for step in steps] == [HIGH] * 20
    assert [step.finish_reason for step in steps] == [None] * 19 + ["length"]


@pytest.mark.parametrize("taken", [1, 2, 3, 4, 5])
def test_cancel_between_the_tokens_of_a_round(taken):
    model = HistoryDecoder(noise=0)
    engine = Engine(model, None, planner_of=lambda policy: Scripted(counts=(3,)))
    with engine.stream(Request([1, 2, 3], Exact(HIGH), max_tokens=20)) as stream:
        for _ in range(taken):
            next(stream)
        stream.cancel()
        num_passes = len(model.passes)
        assert list(stream) == []
    assert len(model.passes) == num_passes
    completion = stream.completion()
    assert (completion.finish_reason, len(completion.token_ids)) == ("abort", taken)
    assert completion.token_ids == run(HistoryDecoder(), Fixed(HIGH), max_tokens=20).token_ids[:taken]


def test_cancel_in_the_middle_of_a_draft_takes_no_further_pass():
    model = HistoryDecoder()
    stream = Engine(model, None, planner_of=lambda policy: Scripted(counts=(5,))).stream(
        Request([1, 2, 3], Exact(HIGH, 3), max_tokens=20)
    )
    next(stream)
    model.on_pass = lambda model: model.passes[-1][1] == 3 and stream.cancel()
    assert list(stream) == []
    assert [bits for _, bits, _ in model.passes] == [HIGH, 3]
    assert stream.completion().finish_reason == "abort"


def test_closing_in_a_round_frees_the_cache():
    stream = Engine(HistoryDecoder(), None, planner_of=lambda policy: Scripted((3,))).stream(
        Request([1, 2, 3], Exact(HIGH), max_tokens=20)
    )
    for _ in range(3):
        next(stream)
    stream.close()
    assert stream.completion().finish_reason == "abort"


def test_passes_and_bytes_of_drafts_and_verifications_are_counted():
    model, planner = HistoryDecoder(), Scripted(counts=(2, 0, 3))
    usage = run(model, Exact(HIGH, 3), planner, max_tokens=16).usage
    decode = model.passes[1:]
    assert usage.num_draft_passes == sum(bits == 3 for _, bits, _ in decode) > 0
    assert usage.num_decode_passes == sum(bits == HIGH for _, bits, _ in decode) == len(planner.passes)
    assert usage.num_drafted_tokens == usage.num_draft_passes
    assert usage.num_accepted_tokens == sum(
        ok for source, ok in planner.judgements if source.kind == "planes"
    )
    read = [bits * WEIGHT_BYTES + KV_BYTES * (start + len(tokens)) for tokens, bits, start in decode]
    assert usage.decode_bytes == sum(read)
    assert usage.bytes_per_token == sum(read) / 15
    # Every verification gives one token that was not drafted.
    assert usage.num_accepted_tokens + usage.num_decode_passes == 15


def test_lookups_draft_without_passes():
    model = SameAtAllBits()
    usage = run(model, Exact(HIGH), Scripted((3,), ("lookup",)), max_tokens=60).usage
    assert usage.num_draft_passes == 0 < usage.num_drafted_tokens
    assert {bits for _, bits, _ in model.passes} == {HIGH}


def test_lookups_are_judged_where_planes_drafted():
    planner = Scripted((3,))
    run(HistoryDecoder(), Exact(HIGH), planner, max_tokens=60)
    assert {draft.source.kind for draft in planner.drafts} == {"planes"}
    assert {source.kind for source, _ in planner.judgements} == {"planes", "lookup"}


def test_after_a_rejected_draft_nothing_is_judged():
    """What follows a wrong draft says nothing about the source."""
    planner = Scripted((8,))
    run(HistoryDecoder(noise=3), Exact(HIGH, 2), planner, max_tokens=40)
    of_planes = [accepted for source, accepted in planner.judgements if source == Source("planes", 2)]
    assert of_planes.count(False) <= len(planner.drafts)
    assert False in of_planes


def test_draft_that_is_not_finite_is_left_out():
    model = HistoryDecoder()
    model.is_finite = lambda tokens, bits: bits == HIGH
    found = run(model, Exact(HIGH), max_tokens=20)
    assert output(found) == output(run(HistoryDecoder(), Fixed(HIGH), max_tokens=20))
    assert found.usage.num_drafted_tokens == 0


def test_verification_that_is_not_finite_counts_without_drafts_only():
    model = HistoryDecoder()
    model.is_finite = lambda tokens, bits: bits < HIGH or len(tokens) in (1, 3)
    found = run(model, Exact(HIGH), max_tokens=20)
    assert output(found) == output(run(HistoryDecoder(), Fixed(HIGH), max_tokens=20))
    model.is_finite = lambda tokens, bits: len(tokens) == 3
    with pytest.raises(TaperError, match="not finite"):
        run(model, Exact(HIGH), max_tokens=20)


@pytest.mark.parametrize(
    ("high", "draft", "widths"), [(6, None, {2, 3, 4, 5}), (6, 3, {3}), (2, None, set())]
)
def test_drafts_use_the_widths_below(high, draft, widths):
    model = HistoryDecoder()
    run(model, Exact(high, draft), Scripted((1,)), max_tokens=40)
    assert {bits for _, bits, _ in model.passes} == widths | {high}


def test_one_width_is_decoded_plainly():
    """A float model's passes depend on how they are cut."""
    model = HistoryDecoder(min_bits=32, max_bits=32)
    run(model, Exact(32), Scripted((3,), ("lookup",)), [1, 2, 3, 4] * 3, max_tokens=20)
    assert all(len(tokens) == 1 for tokens, _, _ in model.passes[1:])


@pytest.mark.parametrize(("width", "message"), [(1, "2 to 8 bits"), (2.5, "needs a file with sensitivity")])
def test_draft_width_that_the_model_does_not_hold_is_refused_at_once(width, message):
    with pytest.raises(UsageError, match=message):
        Engine(HistoryDecoder(), None).stream(Request([1], Exact(HIGH, width)))


def test_requests_of_one_policy_share_a_planner():
    made = []
    engine = Engine(HistoryDecoder(), None, planner_of=lambda policy: made.append(policy) or Scripted())
    for policy in (Exact(6), Exact(6), Exact(6, 3), Fixed(6)):
        engine.generate(Request([1, 2], policy, max_tokens=4))
    assert made == [Exact(6), Exact(6, 3)]


# --- a real model ---


@pytest.fixture(scope="module")
def llm():
    return taper.load()


@pytest.mark.parametrize("policy", ["exact", "exact:5", "exact:4/2", "exact:3"])
@pytest.mark.parametrize("name", ["greedy", "filtered", "penalised"])
def test_the_embedded_model_gives_the_tokens_of_the_high_width(llm, policy, name):
    """The default planner, whose choices hang on the clock, and a random one."""
    high = llm.policy(policy).width
    asked = {"prompt": "Once upon a time", "max_tokens": 48, **SAMPLINGS[name]}
    expected = llm.generate(policy=f"fixed:{high}", **asked)
    scripted = Engine(
        llm.engine.model,
        llm.tokenizer,
        planner_of=lambda policy: Scripted((1, 8, 4, 2), ("planes", "planes", "lookup")),
    )
    for engine in (llm.engine, scripted):
        assert output(engine.generate(llm.request(policy=policy, **asked))) == output(expected)
