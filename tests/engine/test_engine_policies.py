"""The engine asks the policy before every pass, takes whole bits and fractions, and refuses the rest."""

from __future__ import annotations

import numpy as np
import pytest

from taper.engine import Engine, Request
from taper.errors import UsageError
from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.precision import LayerBits, Progressive, parse_policy
from taper.testing.tiny import tiny_taper


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


class ByLayer:
    """4 for the prompt; then layer 0 falls from 5 to 2 while the rest stays at 3."""

    name = "by-layer"

    def bits(self, step):
        if step.phase == "prefill":
            return 4
        return LayerBits([max(2.0, 6 - step.num_generated), np.int64(3)], 3)


def test_each_layer_may_have_bits_of_its_own_and_records_say_their_mean(tmp_path):
    model = Decoder.from_taper(TaperFile.open(tiny_taper(tmp_path / "tiny.taper")))
    request = Request([7, 8, 9], ByLayer(), max_tokens=6, ignore_eos=True)
    completion = Engine(model, None).generate(request)
    readings = [4, *(LayerBits((bits, 3), 3) for bits in (5, 4, 3, 2, 2))]
    assert completion.bits == tuple(model.bits_per_weight(bits) for bits in readings)
    assert completion.bits[3] == 3
    assert completion.usage.average_bits == pytest.approx(sum(completion.bits[1:]) / 5)
    cache = model.new_cache(9)
    kv = [cache.bytes_read(entries) for entries in range(4, 9)]
    weights = [model.bytes_per_pass(bits) for bits in readings[1:]]
    assert completion.usage.decode_bytes == sum(weights) + sum(kv)
    expected, tokens = [], [7, 8, 9]
    for bits in readings:
        logits = model.forward(tokens, cache, bits)
        tokens = [int(logits[0].argmax())]
        expected += tokens
    assert list(completion.token_ids) == expected


@pytest.mark.parametrize(
    ("layers", "head", "message"),
    [
        ((3, 9), 3, "gave 9 bits"),
        ((3, 3), 1, "gave 1 bits"),
        ((3,), 3, "1 layers"),
        ((3, 3.5), 3, "fraction"),
    ],
)
def test_layer_bits_outside_the_model_are_refused(tmp_path, layers, head, message):
    class Wrong:
        name = "wrong"

        def bits(self, step):
            return LayerBits(layers, head)

    model = Decoder.from_taper(TaperFile.open(tiny_taper(tmp_path / "tiny.taper")))
    with pytest.raises(UsageError, match=message):
        Engine(model, None).generate(Request([7], Wrong(), max_tokens=2))
