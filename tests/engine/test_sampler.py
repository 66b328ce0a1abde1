"""The sampler against its definitions: exact sets and probabilities, not luck."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taper.engine import SamplingParams
from taper.engine.sampler import Sampler, candidates, descending, log_softmax, logit_features, pick
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


class FixedUniform:
    """In place of the random generator: gives the numbers it was made with."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def random(self) -> float:
        return self.values.pop(0)


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


def test_a_draw_inverts_the_cumulative_distribution():
    logits = np.log(f32(0.25, 0.5, 0.25))
    sampler = Sampler(SamplingParams(temperature=1.0), 3, (), 0)
    sampler._random = FixedUniform(0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53)
    assert [sampler.sample(logits).token_id for _ in range(6)] == [0, 0, 1, 1, 2, 2]


@QUICK
@given(
    st.lists(st.one_of(st.integers(0, 3), st.just(0)), min_size=1, max_size=40).filter(any),
    st.integers(1, 30),
    st.floats(0, 1, exclude_max=True),
)
def test_pick_is_the_running_sum_whatever_the_blocks(counts, repeat, uniform):
    """Small whole numbers make every sum exact, so the answer is exact too, across many blocks."""
    weights = np.repeat(np.array(counts, np.float32), repeat)
    target = uniform * float(weights.sum(dtype=np.float64))
    running = np.cumsum(weights, dtype=np.float64)
    assert pick(weights, uniform) == int(np.flatnonzero(running > target)[0])


@QUICK
@given(st.integers(0, 2**32), st.sampled_from([1, 255, 256, 257, 5000]))
def test_pick_never_takes_a_weight_of_zero(seed, size):
    generator = np.random.default_rng(seed)
    weights = (generator.random(size) * (generator.random(size) < 0.3)).astype(np.float32)
    weights[generator.integers(size)] = 1e-30
    for uniform in (0.0, 0.5, 1 - 2**-53, 1 - 2**-30):
        assert weights[pick(weights, uniform)] > 0


def test_pick_at_the_edge_of_a_block_takes_the_next_one():
    assert pick(np.ones(512, np.float32), 0.5) == 256
    assert pick(np.concatenate([np.zeros(256), np.ones(2)]).astype(np.float32), 0.0) == 256


def test_pick_bears_a_block_sum_above_its_running_sum():
    """The two orders of addition differ in the last bit for some of these; the last draw falls between."""
    exponents = np.random.default_rng(0).uniform(-60, 0, (100, 256))
    weights = np.exp(exponents).astype(np.float32)
    assert all(pick(row, 1 - 2**-53) < 256 for row in weights)
    assert any(np.add.reduceat(row, [0], dtype=float)[0] > np.cumsum(row, dtype=float)[-1] for row in weights)


def test_frequencies_follow_the_distribution():
    """6 standard deviations of a count around n p: once in a billion; the seed is fixed besides."""
    logits = np.log(f32(0.05, 0.6, 0.35))
    counts = Counter(draw(SamplingParams(temperature=1.0), logits, 4000))
    for token_id, probability in enumerate((0.05, 0.6, 0.35)):
        assert abs(counts[token_id] - 4000 * probability) < 6 * math.sqrt(
            4000 * probability * (1 - probability)
        )


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
    sampler._random = FixedUniform()
    assert sampler.sample(f32(1, 3, 3, 2)).token_id == 1


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
