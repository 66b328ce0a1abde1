"""Requests over a KV cache of planes: what is read, prepared prompts, drafts, memory."""

from __future__ import annotations

import dataclasses

import pytest

import taper
from taper.engine import Engine, Request
from taper.errors import UsageError
from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.precision import Exact, Fixed
from taper.testing.tiny import tiny_taper

PROMPT = tuple(range(10, 110))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_taper(tmp_path_factory.mktemp("kv") / "tiny.taper", max_position_embeddings=512)


def request(prompt=PROMPT, policy=Fixed(4), **options):  # noqa: B008
    sampling = taper.SamplingParams(temperature=1.0, seed=7, logprobs=True)
    return Request(prompt, policy, sampling, max_tokens=40, ignore_eos=True, **options)


def engine(path, kv):
    return Engine(Decoder.from_taper(TaperFile.open(path), kv=kv), None)


def test_a_request_reads_fewer_bits_than_are_stored(path):
    stored = engine(path, "7")
    whole, less = stored.generate(request()), stored.generate(request(kv="3"))
    assert whole.logprobs != less.logprobs
    assert whole.usage.bytes_per_token > less.usage.bytes_per_token
    assert stored.generate(request(kv="7")).logprobs == whole.logprobs
    with pytest.raises(UsageError, match="KV cache 5 cannot be read at 7"):
        engine(path, "5").generate(request(kv="7"))
    with pytest.raises(UsageError, match="no planes to read"):
        engine(path, "float16").generate(request(kv="7"))
    with pytest.raises(UsageError, match="a request reads magnitude bits"):
        request(kv="float16")


@pytest.mark.parametrize("kv", ["7", "7,4@64"])
def test_a_prepared_prompt_changes_no_byte(path, kv):
    plain = engine(path, kv).generate(request())
    prepared = engine(path, kv)
    assert prepared.prepare(request(PROMPT[:90]))
    assert prepared.generate(request()).logprobs == plain.logprobs
    # Back beyond what a window has given up: it is read again.
    assert prepared.prepare(request((*PROMPT, *PROMPT, *PROMPT)))
    assert prepared.generate(request()).logprobs == plain.logprobs
    assert prepared.prepare(request(PROMPT[:90]))
    other = engine(path, kv).generate(request(kv="3"))
    assert prepared.generate(request(kv="3")).logprobs == other.logprobs


@pytest.mark.parametrize("kv", ["7", "6,3@64"])
def test_exact_mode_gives_the_tokens_of_its_width(path, kv):
    model = engine(path, kv)
    plain = model.generate(request(policy=Fixed(8)))
    exact = model.generate(request(policy=Exact(8)))
    assert exact.token_ids == plain.token_ids
    assert exact.logprobs == plain.logprobs


def test_an_audit_reads_again_what_a_window_has_given_up(path):
    """The answer is longer than the window, so the cache does not reach back to the prompt's end."""
    long = request(policy=Fixed(8), audit=True)
    long = dataclasses.replace(long, max_tokens=300)
    done = engine(path, "7,4@64").generate(long)
    assert done.audit.kl == (0.0,) * 300
    assert engine(path, "7,7@64").generate(long).audit.kl == (0.0,) * 300


def test_a_loaded_model_takes_the_format(path):
    llm = taper.load(path, kv="7")
    assert str(llm.engine.model.kv) == "7"
    assert llm.generate(list(PROMPT), policy="fixed:4", max_tokens=3, seed=1).token_ids
    with pytest.raises(UsageError, match="KV format 'x' is not understood"):
        taper.load(path, kv="x")
