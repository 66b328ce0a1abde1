"""The batch engine: answers do not depend on company, bounds are kept, blocks come back."""

from __future__ import annotations

import math

import pytest

from taper import load
from taper.engine.batch import BatchEngine, BatchSizes
from taper.engine.schedule import StepPlan, Terms
from taper.errors import DoesNotFitError
from taper.precision import LayerBits
from taper.testing.tiny import tiny_taper


class Linear:
    """Step times of a machine that does not exist."""

    def seconds(self, bits, decode_tokens, prefill_tokens, context_tokens):
        return 1e-6 * bits * (1 + decode_tokens + prefill_tokens)


class Everybody:
    """Everyone at once, at a width; prompts in chunks; what is in `preempt` gives way once."""

    def __init__(self, bits=4, chunk=7, preempt=()):
        self.bits, self.chunk, self.preempt = bits, chunk, set(preempt)
        self.refusals = {}

    def admit(self, now_s, state, new):
        return self.refusals.get(new.id)

    def schedule(self, now_s, state):
        away = [view.id for view in state.running if view.id in self.preempt and view.num_generated == 3]
        self.preempt -= set(away)
        stay = [view for view in state.running if view.id not in away]
        unread = [
            v for v in stay if v.num_prefilled < v.prompt_tokens + v.num_generated - bool(v.num_generated)
        ]
        decode = tuple(view.id for view in stay if view not in unread)
        fresh = state.waiting[: state.max_batch - len(state.running)]
        prefill = tuple(
            (v.id, min(self.chunk, v.prompt_tokens + v.num_generated - v.num_prefilled))
            for v in (*unread, *fresh)
        )
        return StepPlan(self.bits, prefill, decode, preempt=tuple(away))

    def observe(self, plan, seconds):
        pass


PROMPTS = [list(range(3, 3 + length)) for length in (1, 5, 12, 30, 70, 140)]


@pytest.fixture(scope="module", params=["7", "float16", "7,4@64"])
def llm(request, tmp_path_factory):
    path = tiny_taper(tmp_path_factory.mktemp("tiny") / "tiny.taper", max_position_embeddings=512)
    return load(path, kv=request.param)


@pytest.fixture(scope="module")
def planes(tmp_path_factory):
    path = tiny_taper(tmp_path_factory.mktemp("tiny") / "tiny.taper", max_position_embeddings=512)
    return load(path, kv="7")


def request_of(llm, prompt, seed=0, **options):
    given = {"policy": "fixed:4", "max_tokens": 9, "ignore_eos": True, "temperature": 0.9, "seed": seed}
    return llm.request(prompt, **{**given, **options})


def run(batch, requests, terms=None):
    members = [batch.submit(batch.prepare(request), terms or Terms()) for request in requests]
    for _ in range(2000):
        if not batch.has_work:
            return members
        batch.step()
    raise AssertionError("it does not end")


def tokens(member):
    return [token.token_id for token in member.sequence.tokens]


def no_block_is_lost(batch):
    while batch._prefixes.drop_oldest():
        pass
    if batch.pool is not None:
        batch.pool.check_integrity()
        assert batch.pool.num_free == batch.kv_blocks
    assert batch.free_kv_blocks == batch.kv_blocks


def alone(llm, request):
    return list(llm.engine.generate(request).token_ids)


@pytest.mark.parametrize(("max_batch", "chunk"), [(1, 200), (2, 5), (6, 64), (6, 3)])
def test_answers_are_those_of_the_engine_alone(llm, max_batch, chunk):
    batch = BatchEngine(llm.engine, Everybody(chunk=chunk), Linear(), BatchSizes(max_batch, 1000))
    requests = [request_of(llm, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    members = run(batch, requests)
    for member, request in zip(members, requests, strict=True):
        assert tokens(member) == alone(llm, request_of(llm, request.prompt, request.sampling.seed))
        assert member.sequence.finish_reason == "length"
    no_block_is_lost(batch)


def test_a_preempted_one_goes_on_where_it_was(llm):
    batch = BatchEngine(llm.engine, Everybody(preempt=(1, 4)), Linear(), BatchSizes(6, 1000))
    requests = [request_of(llm, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    members = run(batch, requests)
    assert [tokens(member) for member in members] == [
        alone(llm, request_of(llm, request.prompt, request.sampling.seed)) for request in requests
    ]
    no_block_is_lost(batch)


def test_bits_stay_within_each_ones_bounds(planes):
    batch = BatchEngine(planes.engine, Everybody(bits=4), Linear())
    floor = batch.submit(batch.prepare(request_of(planes, PROMPTS[1], policy="fixed:6")), Terms(min_bits=6))
    most = batch.submit(batch.prepare(request_of(planes, PROMPTS[2], policy="fixed:8")), Terms(max_bits=3))
    free = batch.submit(batch.prepare(request_of(planes, PROMPTS[3], policy="fixed:8")), Terms())
    while batch.has_work:
        batch.step()
    assert [set(one.sequence.bits) for one in (floor, most, free)] == [{6}, {3}, {4}]
    assert tokens(most) == alone(planes, request_of(planes, PROMPTS[2], policy="fixed:3"))


def test_a_policy_gets_its_bits_where_the_plan_has_them(planes):
    batch = BatchEngine(planes.engine, Everybody(bits=8), Linear())
    member = run(batch, [request_of(planes, PROMPTS[1], policy="progressive")])[0]
    assert member.sequence.bits == list(
        planes.engine.generate(request_of(planes, PROMPTS[1], policy="progressive")).bits
    )


class ByLayer:
    name = "by layer"

    def bits(self, step):
        return LayerBits((6, 3), 5)


def test_bits_by_layer_are_read_where_plan_and_bounds_have_room(planes):
    batch = BatchEngine(planes.engine, Everybody(bits=8), Linear())
    free, held = (
        batch.submit(batch.prepare(request_of(planes, PROMPTS[1], policy=ByLayer())), terms)
        for terms in (Terms(), Terms(max_bits=4))
    )
    while batch.has_work:
        batch.step()
    assert tokens(free) == alone(planes, request_of(planes, PROMPTS[1], policy=ByLayer()))
    assert set(held.sequence.bits) == {4}


def test_a_prompt_that_was_seen_is_not_read_again(planes):
    batch = BatchEngine(planes.engine, Everybody(chunk=64), Linear())
    first = run(batch, [request_of(planes, PROMPTS[5])])[0]
    again, longer, other = run(
        batch,
        [
            request_of(planes, PROMPTS[5]),
            request_of(planes, [*PROMPTS[5], *tokens(first), 5]),
            request_of(planes, PROMPTS[5], policy="fixed:6"),
        ],
        Terms(),
    )
    assert (first.num_cached, again.num_cached, longer.num_cached) == (0, 128, 128)
    assert tokens(again) == tokens(first)
    assert tokens(longer) == alone(planes, request_of(planes, longer.sequence.prompt_ids))
    assert other.num_cached == 128, "4 bits are planned, as they were"
    batch._scheduler.bits = 6
    assert run(batch, [request_of(planes, PROMPTS[5], policy="fixed:6")])[0].num_cached == 0
    no_block_is_lost(batch)


def test_prefixes_give_way_when_blocks_run_short(planes):
    batch = BatchEngine(planes.engine, Everybody(), Linear(), BatchSizes(2, 1000, kv_blocks=4))
    for start in range(5):
        member = run(batch, [request_of(planes, [start + 3 + i for i in range(140)])])[0]
        assert len(tokens(member)) == 9
    no_block_is_lost(batch)


def test_cancelling_gives_the_blocks_back_and_others_do_not_notice(llm):
    batch = BatchEngine(llm.engine, Everybody(), Linear(), BatchSizes(3, 1000))
    requests = [request_of(llm, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    members = [batch.submit(batch.prepare(request), Terms()) for request in requests]
    for _ in range(4):
        batch.step()
    for gone in (0, 1, 5):
        requests[gone].cancel()
    while batch.has_work:
        batch.step()
    assert members[5].sequence.finish_reason == "abort"
    for left in (2, 3, 4):
        assert tokens(members[left]) == alone(llm, request_of(llm, PROMPTS[left], left))
    no_block_is_lost(batch)


def test_refusals_and_cuts(planes):
    scheduler = Everybody()
    batch = BatchEngine(planes.engine, scheduler, Linear())
    scheduler.refusals[0] = "no"
    refused = batch.submit(batch.prepare(request_of(planes, [3])), Terms())
    assert (refused.refused, refused.has_ended, batch.has_work) == ("no", True, False)
    cut = batch.submit(batch.prepare(request_of(planes, [3])), Terms())
    for _ in range(3):
        batch.step()
    scheduler.schedule = lambda now, state: StepPlan(finish=(cut.id,))
    assert batch.step() == [(cut, None)]
    assert (cut.sequence.finish_reason, len(tokens(cut))) == ("length", 3)
    no_block_is_lost(batch)


def test_what_can_never_fit_is_refused_before_it_waits(planes):
    batch = BatchEngine(planes.engine, Everybody(), Linear(), BatchSizes(kv_blocks=2))
    with pytest.raises(DoesNotFitError, match="need 3 KV blocks"):
        batch.prepare(request_of(planes, PROMPTS[4], max_tokens=100))


def test_an_audit_comes_after_the_answer_and_waits_for_deadlines(planes):
    batch = BatchEngine(planes.engine, Everybody(), Linear())
    request = request_of(planes, PROMPTS[2], audit=True)
    member = batch.submit(batch.prepare(request), Terms())
    urgent = batch.submit(batch.prepare(request_of(planes, PROMPTS[1], max_tokens=20)), Terms(deadline_s=1e6))
    while not urgent.has_ended:
        assert not member.has_ended
        batch.step()
    while batch.has_work:
        batch.step()
    expected = planes.engine.generate(request_of(planes, PROMPTS[2], audit=True)).audit
    assert member.sequence.audit.kl == expected.kl
    assert member.sequence.audit.bits == 8
    assert math.isfinite(sum(member.sequence.audit.kl))


def test_one_failing_sampler_does_not_end_the_others(planes):
    class Broken:
        def sample(self, logits):
            raise DoesNotFitError("broken")

    batch = BatchEngine(planes.engine, Everybody(), Linear())
    bad = batch.submit(batch.prepare(request_of(planes, PROMPTS[1])), Terms())
    bad.sequence.sampler = Broken()
    good = batch.submit(batch.prepare(request_of(planes, PROMPTS[2])), Terms())
    while batch.has_work:
        batch.step()
    assert bad.has_ended
    assert str(bad.error) == "broken"
    assert tokens(good) == alone(planes, request_of(planes, PROMPTS[2]))
    no_block_is_lost(batch)
