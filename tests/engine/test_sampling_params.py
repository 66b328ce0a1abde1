"""Every field's range, with the field, the value and the rule in the message."""

from __future__ import annotations

import math

import pytest

from taper.engine import SamplingParams
from taper.errors import UsageError

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("temperature", [-0.1, NAN, INF, "1", None, True], [0, 0.7, 2, 1e-300]),
        ("top_k", [-1, 1.5, NAN, "3", True], [0, 1, 10**9]),
        ("top_p", [0, -0.1, 1.01, NAN, True], [1e-9, 0.5, 1]),
        ("min_p", [-0.1, 1.01, NAN], [0, 0.5, 1]),
        ("repetition_penalty", [0, -1, NAN, INF], [0.5, 1, 2]),
        ("presence_penalty", [-2.1, 2.1, NAN], [-2, 0, 2]),
        ("frequency_penalty", [-2.1, 2.1, NAN], [-2, 0, 2]),
        ("seed", [-1, 2**64, 1.0, "1", True], [None, 0, 2**64 - 1]),
        ("logprobs", [1, None, "yes"], [False, True]),
    ],
)
def test_ranges(name, bad, good):
    for value in good:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(UsageError) as error:
            SamplingParams(**{name: value})
        assert str(error.value).startswith(f"{name} is {value!r}; it must be ")


@pytest.mark.parametrize("count", [-1, 21, 1.5])
def test_top_logprobs_range(count):
    with pytest.raises(UsageError, match="from 0 to 20"):
        SamplingParams(logprobs=True, top_logprobs=count)


def test_top_logprobs_need_logprobs():
    with pytest.raises(UsageError, match="logprobs is False"):
        SamplingParams(top_logprobs=3)


@pytest.mark.parametrize(
    "bias", [[1], {1: 101}, {1: -100.5}, {1: NAN}, {1: "2"}, {-1: 0.0}, {1.5: 0.0}, {"1": 0.0}]
)
def test_bad_logit_bias(bias):
    with pytest.raises(UsageError, match="logit_bias"):
        SamplingParams(logit_bias=bias)


def test_greedy_is_temperature_zero():
    assert SamplingParams().is_greedy
    assert not SamplingParams(temperature=1e-9).is_greedy
