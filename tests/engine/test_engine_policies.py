"""The engine asks the policy before every pass, takes whole bits and fractions, and refuses the rest."""

from __future__ import annotations

import numpy as np
import pytest

from taper.engine import Engine, Request
from taper.errors import UsageError
from taper.precision import Progressive, parse_policy


def test_every_token_has_the_bits_of_the_pass_that_drew_it(says, tokenizer):
    model = says("abcdef")
    policy = Progressive(((6, 0), (4, 2), (3, 4)))
    stream = Engine(model, tokenizer).stream(Request("p", policy, max_tokens=6))
    assert [step.bits for step in stream] == [6, 6, 4, 4, 3, 3]
    assert [bits for _, bits, _ in model.passes] == [6, 6, 4, 4, 3, 3]
    assert stream.completion().bits == (6, 6, 4, 4, 3, 3)
    assert stream.completion().policy == "progressive:6@0,4@2,3@4"


def test_policy_is_asked_before_every_pass_with_what_is_known(says, tokenizer):
    class Recorder:
        name = "recorder"

        def __init__(self):
            self.steps = []

        def bits(self, step):
            features = step.logit_features and step.logit_features()
            self.steps.append(
                (step.phase, step.position, step.num_generated, features and features.max_probability)
            )
            assert (step.max_tokens, step.min_bits, step.max_bits) == (3, 2, 8)
            return np.int64(5)

    policy = Recorder()
    completion = Engine(says("abc"), tokenizer, 2).generate(Request("12345", policy, max_tokens=3))
    likeliest = pytest.approx(np.exp(9) / (np.exp(9) + 257))
    assert policy.steps == [
        ("prefill", 0, 0, None),
        ("prefill", 2, 0, None),
        ("prefill", 4, 0, None),
        ("decode", 5, 1, likeliest),
        ("decode", 6, 2, likeliest),
    ]
    assert completion.bits == (5, 5, 5)
    assert all(type(bits) is int for bits in completion.bits)


@pytest.mark.parametrize("answer", [1, 9, 8.5, float("nan"), None, "4"])
def test_policy_outside_the_model_is_refused(says, tokenizer, answer):
    class Wrong:
        name = "wrong"

        def bits(self, step):
            return answer

    model = says("a")
    with pytest.raises(UsageError, match=r"'wrong' gave .* 2 to 8 bits"):
        Engine(model, tokenizer).generate(Request("p", Wrong()))
    assert model.passes == []


class Fractions:
    """4.0 for the prompt, 3.5 from then on."""

    name = "fractions"

    def bits(self, step):
        return 4.0 if step.phase == "prefill" else 3.5


def test_fraction_reaches_the_model_and_the_record(says, tokenizer):
    model = says("abc")
    model.has_sensitivity = True
    completion = Engine(model, tokenizer).generate(Request("p", Fractions(), max_tokens=3))
    assert [bits for _, bits, _ in model.passes] == [4, 3.5, 3.5]
    assert [str(bits) for bits in completion.bits] == ["4", "3.5", "3.5"]
    assert completion.usage.average_bits == 3.5


def test_average_of_equal_fractions_is_that_fraction(says, tokenizer):
    """Added one by one, three times 3.3 is 9.9 less one rounding."""
    model = says("abcdefgh")
    model.has_sensitivity = True
    request = Request("p", parse_policy("fixed:3.3", 2, 8, allows_fractions=True), max_tokens=4)
    assert Engine(model, tokenizer).generate(request).usage.average_bits == 3.3


def test_fraction_is_refused_where_the_model_has_no_sensitivity(says, tokenizer):
    model = says("abc")
    with pytest.raises(UsageError, match=r"gave 3\.5 bits; a fraction needs a file with sensitivity"):
        Engine(model, tokenizer).generate(Request("p", Fractions(), max_tokens=3))
    assert len(model.passes) == 1
