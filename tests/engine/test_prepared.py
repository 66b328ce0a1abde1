"""A prompt that is read ahead changes no byte of the answer, only the passes that are left to do."""

from __future__ import annotations

import pytest

import taper
from taper.engine import Engine, Request
from taper.engine.limits import Limits
from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.precision import Fixed, PhaseAware
from taper.testing.tiny import tiny_taper

AHEAD = tuple(range(10, 30))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return Decoder.from_taper(TaperFile.open(tiny_taper(tmp_path_factory.mktemp("prepared") / "tiny.taper")))


class Recording:
    """A decoder that keeps the number of tokens and the bits of every pass."""

    def __init__(self, decoder):
        self._decoder, self.passes = decoder, []

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def forward(self, tokens, cache, bits, logits):
        self.passes.append((len(tokens), bits))
        return self._decoder.forward(tokens, cache, bits, logits)


def request(prompt, policy=PhaseAware(8, 3), **options):  # noqa: B008
    sampling = taper.SamplingParams(temperature=1.0, seed=7, logprobs=True)
    return Request(prompt, policy, sampling, max_tokens=5, ignore_eos=True, **options)


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        ((*AHEAD, 1, 2, 3), 3),  # it goes on
        (AHEAD, 1),  # it ends there: the last token gives the logits
        (AHEAD[:7], 1),  # it ends earlier
        ((*AHEAD[:9], 99, 98), 2),  # it turns off
        ((99, *AHEAD), 21),  # it has nothing in common
    ],
)
def test_the_answer_is_the_same_and_the_rest_is_read(decoder, prompt, left):
    plain = Engine(decoder, None).generate(request(prompt))
    model = Recording(decoder)
    engine = Engine(model, None)
    assert engine.prepare(request(AHEAD))
    model.passes.clear()
    done = engine.generate(request(prompt))
    assert (done.token_ids, done.logprobs, done.bits) == (plain.token_ids, plain.logprobs, plain.bits)
    assert model.passes == [(left, 8), (1, 3), (1, 3), (1, 3), (1, 3)]
    assert done.usage.num_prompt_tokens == len(prompt)


def test_an_audit_reads_a_prepared_prompt_again_where_it_was_read_at_fewer_bits(decoder):
    """The policy reads the prompt's beginning, which is prepared, at 4 bits and its end at 8."""

    class Rising:
        name = "rising"

        def bits(self, step):
            return 4 if step.position < len(AHEAD) else 8

    prompt = (*AHEAD, 1, 2, 3)
    audited = request(prompt, Rising(), audit=True)
    plain = Engine(decoder, None, len(AHEAD)).generate(audited)
    engine = Engine(decoder, None, len(AHEAD))
    engine.prepare(request(AHEAD, Rising()))
    done = engine.generate(audited)
    assert done.token_ids == plain.token_ids
    assert done.audit.kl == plain.audit.kl


def test_other_bits_take_nothing_over(decoder):
    model = Recording(decoder)
    engine = Engine(model, None)
    engine.prepare(request(AHEAD, Fixed(8)))
    model.passes.clear()
    engine.generate(request(AHEAD, Fixed(4)))
    assert model.passes[0] == (20, 4)


def test_a_prepared_prompt_serves_once(decoder):
    model = Recording(decoder)
    engine = Engine(model, None)
    engine.prepare(request(AHEAD))
    engine.generate(request(AHEAD))
    model.passes.clear()
    engine.generate(request(AHEAD))
    assert model.passes[0] == (20, 8)


def test_cancelling_keeps_what_was_read(decoder):
    model = Recording(decoder)
    engine = Engine(model, None, prefill_chunk_tokens=6)
    cancelled = request(AHEAD)
    model.forward = lambda *arguments: (cancelled.cancel(), Recording.forward(model, *arguments))[1]
    assert not engine.prepare(cancelled)
    assert model.passes == [(6, 8)]
    del model.forward
    assert engine.prepare(request(AHEAD))
    assert model.passes == [(6, 8), (6, 8), (6, 8), (2, 8)]


def test_what_was_read_at_fewer_bits_is_read_again_when_they_are_there(decoder):
    model, there = Recording(decoder), [2]
    engine = Engine(model, None, limits=Limits(lambda: there[0]))
    assert not engine.prepare(request(AHEAD))
    assert not engine.prepare(request(AHEAD))
    assert model.passes == [(20, 2)]
    there[0] = 8
    assert engine.prepare(request(AHEAD))
    done = engine.generate(request((*AHEAD, 1)))
    assert model.passes[:3] == [(20, 2), (20, 8), (1, 8)]
    assert done.token_ids == Engine(decoder, None).generate(request((*AHEAD, 1))).token_ids
