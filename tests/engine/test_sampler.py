"""The sampler against its definitions: exact sets and probabilities, not luck."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taper.engine import SamplingParams
from taper.engine.sampler import (
    MOST_IN_ONE_RACE,
    Sampler,
    candidates,
    descending,
    log_softmax,
    logit_features,
    race,
    race_in_blocks,
)
from taper.errors import TaperError, UsageError

# The specified exp and float32 division are within 4 units in the last place; sums are float64.
EXP_RTOL = 8 * 2.0**-23
QUICK = settings(max_examples=200, deadline=None)
# Halves make ties common; -200 has weight 0 beside 0.
LOGITS = st.lists(
    st.one_of(st.integers(-8, 8).map(lambda v: v / 2), st.just(-200.0)), min_size=1, max_size=60
).map(lambda values: np.array(values, np.float32))


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def distribution(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that can be drawn and their exact probabilities."""
    ids, weights = candidates(logits, params)
    ids = np.arange(len(logits)) if ids is None else ids
    weights = weights.astype(np.float64)
    return ids[weights > 0], weights[weights > 0] / weights.sum()


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def kept(logits: np.ndarray, **params: float) -> list[int]:
    return sorted(distribution(logits, SamplingParams(**{"temperature": 1.0, **params}))[0].tolist())


def draw(params: SamplingParams, logits: np.ndarray, count: int, seed: int = 1, prompt: tuple[int, ...] = ()):
    sampler = Sampler(params, len(logits), prompt, seed)
    return [sampler.sample(logits).token_id for _ in range(count)]


def keys(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2**64, size=count, dtype=np.uint64).tolist()


def assert_frequencies(drawn: list[int], probabilities: np.ndarray) -> None:
    """Within 6 standard deviations of a count around n p: once in a billion; the keys are fixed besides.

    Counts of which fewer than 10 are expected are not normal, and left out.
    """
    counts = np.bincount(drawn, minlength=len(probabilities))
    expected = len(drawn) * probabilities
    far = np.abs(counts - expected) > 6 * np.sqrt(expected * (1 - probabilities))
    assert not (far & (expected >= 10)).any()


# --- the filters ---


@QUICK
@given(LOGITS, st.floats(0.1, 3))
def test_temperature_alone_is_the_softmax(logits, temperature):
    ids, probabilities = distribution(logits, SamplingParams(temperature=temperature))
    expected = softmax(logits / np.float32(temperature))
    # A weight is above 0 down to exp(-87). There (x - max) / t, and x / t - max / t in the expected value,
    # are rounded at magnitudes up to 87 + 2 * 40, which moves an exponent by at most as many units of 2^-24.
    np.testing.assert_allclose(probabilities, expected[ids], rtol=EXP_RTOL + (2 * 87 + 2 * 40) * 2.0**-24)
    assert np.delete(expected, ids).sum() < 60 * math.exp(-86)
    assert probabilities.sum() == pytest.approx(1, abs=1e-14)


@QUICK
@given(LOGITS, st.integers(1, 70))
def test_top_k_keeps_the_k_likeliest_and_the_lower_of_equal_ids(logits, k):
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:k]
    alive = [i for i in order if logits[i] - logits.max() >= -87]
    assert kept(logits, top_k=k) == sorted(alive)


@QUICK
@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_sufficient_set(logits, top_p):
    ids, _ = distribution(logits, SamplingParams(temperature=1.0, top_p=top_p))
    share = softmax(logits)
    assert share[ids].sum() >= top_p - EXP_RTOL
    assert share[ids[:-1]].sum() < top_p + EXP_RTOL
    left_out = np.setdiff1d(np.arange(len(logits)), ids)
    assert all(
        logits[i] < logits[ids].min() or i > ids.max() or logits[i] == logits[ids].min() for i in left_out
    )


def test_top_p_takes_the_token_that_crosses():
    logits = np.log(f32(0.5, 0.3, 0.15, 0.05))
    assert kept(logits, top_p=0.49) == [0]
    assert kept(logits, top_p=0.51) == [0, 1]
    assert kept(logits, top_p=0.94) == [0, 1, 2]
    assert kept(logits, top_p=1.0) == [0, 1, 2, 3]


def test_top_p_grows_beyond_its_first_candidates():
    """A nearly flat distribution over 4096 tokens needs 90 % of them, more than the first candidates."""
    logits = np.arange(4096, dtype=np.float32) * np.float32(-1e-6)
    ids = distribution(logits, SamplingParams(temperature=1.0, top_p=0.9))[0]
    assert 0.895 * 4096 < len(ids) < 0.9 * 4096  # the likelier half weighs up to 0.4 % more
    assert ids.tolist() == list(range(len(ids)))


def test_min_p_compares_with_the_likeliest():
    logits = np.log(f32(0.1, 0.4, 0.04, 0.36, 0.1))
    assert kept(logits, min_p=0.5) == [1, 3]
    assert kept(logits, min_p=0.24) == [0, 1, 3, 4]
    assert kept(logits, min_p=1.0) == [1]


def test_top_p_counts_within_top_k():
    """0.5 / (0.5 + 0.3) is 0.625: enough for p = 0.6 after top-k, not before."""
    logits = np.log(f32(0.5, 0.3, 0.2))
    assert kept(logits, top_p=0.6) == [0, 1]
    assert kept(logits, top_k=2, top_p=0.6) == [0]


def test_min_p_cuts_what_top_k_left():
    logits = np.log(f32(0.1, 0.4, 0.04, 0.36, 0.1))
    assert kept(logits, top_k=4, min_p=0.5) == [1, 3]
    assert kept(logits, top_k=1, min_p=0.5) == [1]


def test_min_p_comes_after_temperature():
    """0.2 / 0.8 is below 0.4, but its square root is above it."""
    logits = np.log(f32(0.8, 0.2))
    assert kept(logits, min_p=0.4) == [0]
    assert kept(logits, min_p=0.4, temperature=2.0) == [0, 1]


@QUICK
@given(LOGITS, st.integers(0, 70), st.floats(0.01, 1), st.floats(0, 1), st.floats(1e-40, 5))
def test_the_likeliest_always_stays(logits, top_k, top_p, min_p, temperature):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, probabilities = distribution(logits, params)
    assert int(logits.argmax()) in ids
    assert len(set(ids.tolist())) == len(ids) == len(probabilities)
    assert probabilities.min() > 0
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)


@QUICK
@given(st.lists(st.integers(0, 5), min_size=1, max_size=50), st.integers(1, 60))
def test_descending_is_the_head_of_a_stable_sort(values, count):
    array = np.array(values, np.float32)
    expected = [i for i in sorted(range(len(values)), key=lambda i: (-values[i], i)) if values[i] > 0]
    result = descending(array, count).tolist()
    assert result == expected[: len(result)]
    assert len(result) >= min(count, len(expected))


# --- drawing ---


def test_the_winner_is_the_one_that_the_definition_names():
    """splitmix64 in whole numbers, one logarithm a token."""
    weights, key, mask = f32(0.3, 5, 1e-3, 2, 0), 0x0123456789ABCDEF, 2**64 - 1

    def arrival(token: int) -> float:
        x = (token * 0x9E3779B97F4A7C15 + key) & mask
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        return -math.log(((x ^ x >> 31) >> 12) * 2.0**-52 + 2.0**-53)

    for key in keys(50):
        scores = [float(weight) / arrival(token) for token, weight in enumerate(weights)]
        assert race(weights, None, key) == scores.index(max(scores))


@pytest.mark.parametrize("draw_one", [lambda w, key: race(w, None, key), race_in_blocks])
def test_races_follow_the_weights(draw_one):
    """Over 600 tokens, blocks of 256 and a rest; a third of them have weight 0."""
    generator = np.random.default_rng(3)
    weights = (generator.random(600) ** 8 * (generator.random(600) < 0.7)).astype(np.float32)
    drawn = [draw_one(weights, key) for key in keys(20000)]
    probabilities = weights / weights.sum(dtype=np.float64)
    assert_frequencies(drawn, probabilities)
    # Sums over tokens find what single rare tokens hide.
    groups = np.arange(600) % 7
    assert_frequencies(groups[drawn].tolist(), np.bincount(groups, probabilities))


def test_place_in_the_block_does_not_depend_on_the_block():
    """Two blocks alike: were the two races one, the winning block would tell of the winning token."""
    drawn = np.array([race_in_blocks(np.ones(512, np.float32), key) for key in keys(20000)])
    assert_frequencies((drawn // 256 * 4 + drawn % 256 // 64).tolist(), np.full(8, 1 / 8))


@QUICK
@given(st.integers(0, 2**32), st.sampled_from([1, 255, 256, 257, 5000]))
def test_a_weight_of_zero_never_wins(seed, size):
    generator = np.random.default_rng(seed)
    weights = (generator.random(size) * (generator.random(size) < 0.3)).astype(np.float32)
    weights[generator.integers(size)] = 1e-30
    for key in (*keys(3, seed), 0, 2**64 - 1):
        assert weights[race(weights, None, key)] > 0
        assert weights[race_in_blocks(weights, key)] > 0


@QUICK
@given(st.integers(0, 2**32))
def test_other_tokens_in_the_race_change_nothing_unless_they_win(seed):
    """So that a filter, or a slightly other distribution, leaves most draws as they are."""
    generator = np.random.default_rng(seed)
    weights, key = generator.random(50).astype(np.float32), keys(1, seed)[0]
    winner = race(weights, None, key)
    some = np.unique([winner, *generator.integers(50, size=10)])
    order = generator.permutation(some)
    assert order[race(weights[order], order, key)] == winner


@pytest.mark.parametrize("draw_one", [lambda w, key: race(w, None, key), race_in_blocks])
def test_similar_distributions_draw_the_same_token_as_often_as_the_theorem_says(draw_one):
    generator = np.random.default_rng(5)
    one = softmax(generator.normal(0, 2, 600))
    other = softmax(np.log(one) + generator.normal(0, 0.1, 600))
    distance = np.abs(one - other).sum() / 2
    agreed = np.mean([draw_one(one.astype("f4"), k) == draw_one(other.astype("f4"), k) for k in keys(5000)])
    # Two races, of the blocks and within one, each at least at their own bound.
    bound = (1 - distance) / (1 + distance) if draw_one is not race_in_blocks else (1 - distance) ** 4
    assert agreed > bound - 6 * math.sqrt(bound * (1 - bound) / 5000)
    assert distance > 0.03


def test_a_large_vocabulary_races_in_blocks():
    logits = np.random.default_rng(0).normal(0, 3, MOST_IN_ONE_RACE + 1).astype(np.float32)
    params = SamplingParams(temperature=1.0)
    sampler = Sampler(params, len(logits), (), 0)
    drawn = [sampler.draw(logits) for _ in range(20)]
    weights = candidates(logits, params)[1]
    assert drawn == [race_in_blocks(weights, key) for key in sampler._keys]


def test_draws_are_the_same_on_every_machine():
    """Of a flat distribution, so that they show the numbers; changing them changes every seed's answers."""
    drawn = draw(SamplingParams(temperature=1.0), np.zeros(1000, np.float32), 6, seed=7)
    assert drawn == [912, 656, 232, 963, 443, 492]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "frequency_penalty": 2.0, "repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "logprobs": True},
    ],
)
def test_a_fork_draws_ahead_and_leaves_the_sampler_as_it_was(params):
    generator = np.random.default_rng(0)
    logits = [generator.normal(0, 1, 12).astype(np.float32) for _ in range(8)]
    alone = Sampler(SamplingParams(**params), 12, (1, 2), 4)
    expected = [alone.sample(row) for row in logits]
    sampler = Sampler(SamplingParams(**params), 12, (1, 2), 4)
    found = []
    while len(found) < len(logits):
        fork, rest = sampler.fork(), logits[len(found) :]
        assert [fork.draw(row) for row in rest[:3]] == [t.token_id for t in expected[len(found) :]][:3]
        sampler.fork().draw(-rest[0])  # a wrong draft
        found.append(sampler.sample(rest[0]))
    assert found == expected


def test_frequencies_follow_the_distribution():
    probabilities = np.array([0.05, 0.6, 0.35])
    logits = np.log(probabilities).astype(np.float32)
    assert_frequencies(draw(SamplingParams(temperature=1.0), logits, 4000), probabilities)


def test_a_seed_repeats_and_another_differs():
    logits = np.zeros(1000, np.float32)
    params = SamplingParams(temperature=1.0)
    assert draw(params, logits, 20, seed=7) == draw(params, logits, 20, seed=7)
    assert draw(params, logits, 20, seed=7) != draw(params, logits, 20, seed=8)


def test_token_n_uses_the_nth_number_whatever_the_others_were():
    """Changing the first distribution leaves the later draws as they were."""
    flat, peaked = np.zeros(1000, np.float32), np.zeros(1000, np.float32)
    peaked[3] = 100
    params = SamplingParams(temperature=1.0)
    one, other = Sampler(params, 1000, (), 5), Sampler(params, 1000, (), 5)
    assert other.sample(peaked).token_id == 3
    one.sample(flat)
    assert [one.sample(flat).token_id for _ in range(5)] == [other.sample(flat).token_id for _ in range(5)]


def test_greedy_takes_the_lowest_of_equal_ids_and_no_random_number():
    sampler = Sampler(SamplingParams(top_k=1, top_p=0.1), 4, (), 0)
    assert sampler.sample(f32(1, 3, 3, 2)).token_id == 1
    assert sampler._keys == []


def test_tiny_temperature_is_greedy():
    assert draw(SamplingParams(temperature=1e-300), f32(1, 3, 2.9999, -1), 5) == [1] * 5


def test_logits_of_minus_infinity_are_never_drawn():
    assert set(draw(SamplingParams(temperature=5.0), f32(-np.inf, 1, -np.inf, 1), 50)) == {1, 3}


@pytest.mark.parametrize("logits", [f32(1, np.nan, 2), f32(np.inf, 1), f32(-np.inf, -np.inf)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(logits, temperature):
    with pytest.raises(TaperError, match="not finite"):
        draw(SamplingParams(temperature=temperature), logits, 1)


# --- penalties and bias ---


def adjusted(params: SamplingParams, logits: np.ndarray, prompt=(), output=()) -> list[float]:
    sampler = Sampler(params, len(logits), prompt, 0)
    for token_id in output:
        forced = np.full(len(logits), -1e30, np.float32)
        forced[token_id] = 1e30
        assert sampler.sample(forced).token_id == token_id
    return sampler._adjusted(logits).tolist()


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output():
    logits = f32(4, -4, 4, 0, 4)
    result = adjusted(SamplingParams(repetition_penalty=2.0), logits, prompt=(0, 1, 0), output=(3, 4, 4))
    assert result == [2, -8, 4, 0, 2]


def test_presence_counts_once_and_frequency_every_time_in_the_output_only():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert adjusted(params, f32(1, 1, 1, 1), prompt=(0, 0), output=(1, 2, 2, 2)) == [1, 0.25, -0.25, 1]


def test_negative_penalties_encourage():
    assert adjusted(SamplingParams(presence_penalty=-2.0), f32(0, 0), output=(1,)) == [0, 2]


def test_bias_is_added_after_the_penalties():
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 3.0, 1: -100.0})
    assert adjusted(params, f32(4, 4, 4), output=(0,)) == [4 / 2 - 1 + 3, -96, 4]


def test_bias_moves_greedy():
    assert draw(SamplingParams(logit_bias={2: 5.0}), f32(3, 1, 0), 1) == [2]


def test_penalties_leave_the_models_logits_alone():
    logits = f32(1, 2, 3)
    draw(SamplingParams(repetition_penalty=2.0, logit_bias={0: 1.0}), logits, 3, prompt=(2,))
    assert logits.tolist() == [1, 2, 3]


@pytest.mark.parametrize("params", [{"logit_bias": {5: 1.0}}, {"logprobs": True, "top_logprobs": 6}])
def test_parameters_beyond_the_vocabulary_are_refused(params):
    with pytest.raises(UsageError, match="vocabulary has 5 tokens"):
        Sampler(SamplingParams(**params), 5, (), 0)


# --- log-probabilities ---


def test_logprobs_are_of_the_raw_distribution():
    """Temperature, filters, penalties and bias change the draw, not the report."""
    logits = np.log(f32(0.5, 0.25, 0.125, 0.125))
    params = SamplingParams(
        temperature=0.5, top_k=1, repetition_penalty=3.0, logit_bias={3: 50.0}, logprobs=True, top_logprobs=3
    )
    token = Sampler(params, 4, (0,), 0).sample(logits)
    assert token.token_id == 3
    assert token.logprob == pytest.approx(math.log(0.125), abs=1e-6)
    assert [i for i, _ in token.top_logprobs] == [0, 1, 2]  # 2 and 3 tie: the lower id
    assert [p for _, p in token.top_logprobs] == pytest.approx(
        [math.log(p) for p in (0.5, 0.25, 0.125)], abs=1e-6
    )


def test_no_logprobs_unless_asked_for():
    token = Sampler(SamplingParams(), 2, (), 0).sample(f32(0, 1))
    assert (token.logprob, token.top_logprobs) == (None, ())


@QUICK
@given(LOGITS)
def test_log_softmax_sums_to_one(logits):
    assert np.exp(log_softmax(logits)).sum() == pytest.approx(1, abs=1e-12)


def test_logit_features_of_known_distributions():
    flat = logit_features(np.zeros(8, np.float32))
    assert (flat.entropy, flat.margin) == (pytest.approx(math.log(8)), pytest.approx(0))
    assert flat.max_probability == pytest.approx(1 / 8)
    sure = logit_features(f32(0, -np.inf, -1000))
    assert (sure.entropy, sure.margin, sure.max_probability) == (pytest.approx(0), 1, 1)
    assert logit_features(f32(3)).margin == 1
