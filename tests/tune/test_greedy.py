"""A walk draws the engine's tokens under the same bits, and goes back as if nothing had happened."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from taper.engine import Engine, Request, SamplingParams
from taper.errors import DoesNotFitError, UsageError
from taper.precision import parse_policy
from taper.tune.greedy import GreedyWalk

PROMPT = [int(token) for token in np.random.default_rng(0).integers(2, 300, 23)]


def answer(decoder, policy, max_tokens, ignore_eos=True, stop_token_ids=()):
    request = Request(
        PROMPT,
        parse_policy(policy, 2, 8),
        SamplingParams(temperature=0.0),
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=stop_token_ids,
    )
    return Engine(decoder, None).generate(request)


@pytest.mark.parametrize(
    ("policy", "prefill", "runs"),
    [
        ("fixed:3", 3, [(3, 12)]),
        ("phase:8/2", 8, [(2, 12)]),
        ("progressive:8@0,4@1,2@5", 8, [(8, 1), (4, 4), (2, 7)]),
        ("progressive:8/3@0,2@6", 8, [(3, 6), (2, 6)]),
    ],
)
def test_walk_gives_the_engines_tokens(decoder, policy, prefill, runs):
    walk = GreedyWalk(decoder, PROMPT, 12, ignore_eos=True)
    walk.prefill(prefill)
    for bits, count in runs:
        walk.extend(bits, count)
    wanted = answer(decoder, policy, 12)
    assert walk.is_finished
    assert tuple(walk.tokens) == wanted.token_ids
    assert tuple(walk.bits) == wanted.bits


def test_every_schedule_after_a_common_beginning_is_as_if_run_alone(decoder):
    walk = GreedyWalk(decoder, PROMPT, 12, ignore_eos=True, keep_logits=True)
    walk.prefill(8)
    walk.extend(5, 4)
    rows = {}
    for bits in (2, 3, 4):
        walk.extend(bits, 8)
        assert tuple(walk.tokens) == answer(decoder, f"progressive:8/5@0,{bits}@4", 12).token_ids
        rows[bits] = walk.logits[-1]
        walk.back_to(4)
    assert len({row.tobytes() for row in rows.values()}) == 3
    walk.extend(2, 8)
    np.testing.assert_array_equal(walk.logits[-1], rows[2])
    walk.back_to(0)
    walk.extend(2, 12)
    assert tuple(walk.tokens) == answer(decoder, "phase:8/2", 12).token_ids


def test_a_new_prompt_pass_begins_a_new_answer(decoder):
    walk = GreedyWalk(decoder, PROMPT, 6, ignore_eos=True)
    for prefill in (8, 2):
        walk.prefill(prefill)
        walk.extend(2, 6)
        assert tuple(walk.tokens) == answer(decoder, f"phase:{prefill}/2", 6).token_ids


def test_prompt_of_several_chunks_is_one_prompt(decoder):
    prompt = PROMPT * 12  # 276 tokens, a chunk is 256
    walk = GreedyWalk(decoder, prompt, 5, ignore_eos=True)
    walk.prefill(4)
    walk.extend(4, 5)
    request = Request(
        prompt, parse_policy("fixed:4", 2, 8), SamplingParams(temperature=0.0), max_tokens=5, ignore_eos=True
    )
    assert tuple(walk.tokens) == Engine(decoder, None).generate(request).token_ids


def test_stop_token_is_the_last_and_can_be_taken_back(decoder, monkeypatch):
    tokens = answer(decoder, "fixed:8", 8).token_ids
    stop = next(token for n, token in enumerate(tokens) if n >= 2 and token not in tokens[:n])
    monkeypatch.setattr(decoder, "config", dataclasses.replace(decoder.config, eos_token_ids=(stop,)))
    walk = GreedyWalk(decoder, PROMPT, 8)
    walk.prefill(8)
    walk.extend(8, 8)
    assert tuple(walk.tokens) == answer(decoder, "fixed:8", 8, ignore_eos=False).token_ids
    assert walk.is_finished
    assert len(walk.tokens) == tokens.index(stop) + 1 < 8
    walk.extend(8, 1)
    assert len(walk.tokens) == tokens.index(stop) + 1
    walk.back_to(1)
    assert not walk.is_finished


def test_wrong_use_says_what(decoder):
    walk = GreedyWalk(decoder, PROMPT, 4)
    with pytest.raises(UsageError, match="needs its prompt first"):
        walk.extend(4, 1)
    walk.prefill(4)
    with pytest.raises(UsageError, match="cannot go back to 1 tokens: the answer has 0"):
        walk.back_to(1)
    with pytest.raises(UsageError, match="0 prompt tokens"):
        GreedyWalk(decoder, [], 4)
    with pytest.raises(DoesNotFitError, match="exceed the context of"):
        GreedyWalk(decoder, PROMPT, decoder.context_length)
