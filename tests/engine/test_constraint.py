"""Constraints hold the sampler and leave what it reports alone."""

from __future__ import annotations

import math

import pytest

from taper import load
from taper.engine.constraint import GivenTokens
from taper.testing.tiny import tiny_taper


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return load(tiny_taper(tmp_path_factory.mktemp("tiny") / "tiny.taper"))


def given(ids):
    return lambda: GivenTokens(tuple(ids), 300)


@pytest.mark.parametrize("policy", ["fixed:4", "exact:8/3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_given_tokens_come_and_then_any(llm, policy, temperature):
    ids = [7, 290, 7, 20]
    options = {"policy": policy, "max_tokens": 9, "temperature": temperature, "seed": 3, "ignore_eos": True}
    done = llm.generate([5, 6], constraint=given(ids), **options)
    assert list(done.token_ids[:4]) == ids
    # What follows is what follows such a prompt: the constraint is over.
    if temperature == 0:
        rest = llm.generate([5, 6, *ids], **{**options, "max_tokens": 5})
        assert done.token_ids[4:] == rest.token_ids


def test_log_probabilities_are_those_of_the_model(llm):
    """Under the mask the token would have probability 1."""
    done = llm.generate(
        [5, 6], policy="fixed:4", constraint=given([7]), max_tokens=1, logprobs=True, top_logprobs=20
    )
    assert done.logprobs[0] < math.log(0.5)
    free = llm.generate([5, 6], policy="fixed:4", max_tokens=1, logprobs=True, top_logprobs=20)
    assert done.top_logprobs == free.top_logprobs


def test_each_run_of_a_request_has_a_constraint_of_its_own(llm):
    request = llm.request([5], policy="fixed:4", constraint=given([7, 8]), max_tokens=2)
    assert llm.engine.generate(request).token_ids == llm.engine.generate(request).token_ids == (7, 8)
