"""Labels: what switching costs along the reference, and the earliest switch within a tolerance."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from taper.evaluate.divergence import kl_divergences, log_normalisers
from taper.precision.learned import mean_over_heads
from taper.tune.greedy import GreedyWalk
from taper.tune.learned_labels import (
    LabelPlan,
    labels_within,
    measure_prompts,
    random_cuts,
    tolerance_for,
    with_greedy_answers,
)
from taper.tune.prompts import PromptSet

PROMPTS = tuple(
    tuple(int(token) for token in np.random.default_rng(seed).integers(2, 300, 40)) for seed in (0, 1)
)
SET = PromptSet("t", PROMPTS, 12, ((),) * 2, (0, 1))
PLAN = LabelPlan((4, 3, 2), 8, 4, 8)


def one_token_at_a_time(decoder, prompt, bits_of_token, given=()):
    """KL of each token after the first under these bits, by single passes over one answer."""
    walk = GreedyWalk(decoder, prompt, 12)
    walk.prefill(8)
    walk.extend(8, 12)
    tokens = list(given or walk.tokens)
    cache, full = decoder.new_cache(64), decoder.new_cache(64)
    decoder.forward(prompt, cache, 8, "none")
    decoder.forward(prompt, full, 8, "none")
    found = []
    for n in range(1, len(tokens)):
        logits = decoder.forward(tokens[n - 1 : n], cache, bits_of_token(n))
        reference = decoder.forward(tokens[n - 1 : n], full, 8)
        found.append(
            kl_divergences(reference, log_normalisers(reference), logits, log_normalisers(logits))[0]
        )
    return np.array(found)


@pytest.mark.parametrize("given", [(), tuple(range(100, 110))])
def test_damage_is_that_of_the_schedule(decoder, given):
    """Every branch against its own run from the prompt on: nothing of another branch stays in the cache."""
    answered = with_greedy_answers(decoder, SET, 8)
    measured = measure_prompts(
        decoder, dataclasses.replace(SET, references=(given,) * 2) if given else answered, PLAN
    )
    for prompt, found in zip(PROMPTS, measured, strict=True):
        for pair, (high, low) in enumerate(((4, 3), (3, 2))):
            at_high = one_token_at_a_time(decoder, prompt, lambda n, high=high: high, given)
            assert found.damage[pair, 4] == 0
            for segment, start in enumerate((1, 3, 6, 9)):
                switched = one_token_at_a_time(
                    decoder, prompt, lambda n, s=start, h=high, lo=low: lo if n >= s else h, given
                )
                wanted = switched.mean() - at_high.mean()
                assert found.damage[pair, segment] == pytest.approx(wanted, abs=1e-12)
        assert np.ptp(found.damage, axis=1).min() > 1e-3


def test_entries_are_those_of_the_prompt_at_its_own_bits(decoder):
    found = measure_prompts(decoder, with_greedy_answers(decoder, SET, 8), PLAN)[0]
    cache = decoder.new_cache(64)
    decoder.forward(PROMPTS[0], cache, 8, "none")
    keys, values = mean_over_heads(cache.entries(-1))
    np.testing.assert_array_equal(found.keys, keys)
    np.testing.assert_array_equal(found.values, values)


def test_label_is_the_earliest_switch_within_the_tolerance():
    damage = np.array([[0.4, 0.3, 0.1, 0.0], [0.1, 0.05, -0.01, 0.0], [0.9, 0.8, 0.7, 0.0]])
    assert labels_within(damage, 0.3).tolist() == [1, 0, 3]
    assert labels_within(damage, 0.0).tolist() == [3, 2, 3]
    assert labels_within(damage, 1.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_tolerance_spends_the_share_that_is_asked_for(share):
    slopes = np.random.default_rng(0).uniform(0.1, 0.3, 300)
    damage = slopes[:, None] * (1 - np.arange(9) / 8)
    labels = labels_within(damage, tolerance_for(damage, share))
    assert labels.mean() / 8 == pytest.approx(share, abs=0.02)


def test_cuts_are_random_lengths_and_the_same_for_a_seed():
    prompts = PromptSet("t", (PROMPTS[0] * 10,) * 50, 12, ((),) * 50, tuple(range(50)))
    lengths = [len(prompt) for prompt in random_cuts(prompts, 1).prompts]
    assert lengths == [len(prompt) for prompt in random_cuts(prompts, 1).prompts]
    assert min(lengths) >= 32
    assert max(lengths) <= 400
    assert len(set(lengths)) > 25
    short = PromptSet("t", ((5,), (5, 6)), 12, ((),) * 2, (0, 1))
    assert all(1 <= len(prompt) <= 2 for prompt in random_cuts(short, 1).prompts)


def test_what_is_cut_off_begins_the_reference():
    prompts = PromptSet("t", (tuple(range(100)),) * 20, 12, (tuple(range(100, 112)),) * 20, tuple(range(20)))
    cut = random_cuts(prompts, 1)
    for prompt, reference in zip(cut.prompts, cut.references, strict=True):
        assert prompt == tuple(range(len(prompt)))
        assert reference == tuple(range(len(prompt), len(prompt) + 12))


def test_answers_side_by_side_are_those_of_each_prompt_alone(decoder, monkeypatch):
    """A stop token ends one answer and not its neighbours'."""
    many = PromptSet("t", PROMPTS * 9, 12, ((),) * 18, tuple(range(18)))
    alone = []
    for stop in (None, 5):
        for prompt in PROMPTS:
            walk = GreedyWalk(decoder, prompt, 12)
            walk.prefill(8)
            walk.extend(8, 12)
            alone.append(tuple(walk.tokens))
        found = with_greedy_answers(decoder, many, 8)
        assert found.references == tuple(alone[-2:]) * 9
        if stop is not None:
            assert len(alone[-2]) < 12 == len(alone[-1])
            return
        token = next(token for token in alone[0][2:8] if token not in (*alone[0][:2], *alone[1]))
        config = dataclasses.replace(decoder.config, eos_token_ids=(token,))
        monkeypatch.setattr(decoder, "config", config)


def test_answer_of_one_token_has_no_damage(decoder):
    short = dataclasses.replace(SET, references=((5,), (5, 6)))
    measured = measure_prompts(decoder, short, PLAN)
    assert not measured[0].damage.any()
    assert measured[1].damage[:, 0].all()
    assert not measured[1].damage[:, 1:].any()
