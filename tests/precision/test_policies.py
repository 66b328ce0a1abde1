"""Every policy's bits at every step, and every way its text can be wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taper.errors import UsageError
from taper.precision import Exact, Fixed, PrecisionPolicy, StepContext, parse_policy

MIN_BITS, MAX_BITS = 2, 8


def bits_of_tokens(
    policy: PrecisionPolicy, num_tokens: int, min_bits: int = MIN_BITS, max_bits: int = MAX_BITS
):
    """Bits of the tokens 0..num_tokens - 1: token 0 from prefill, the others from decode passes."""
    steps = [
        StepContext("decode" if n else "prefill", 10 + n, n, num_tokens, min_bits, max_bits)
        for n in range(num_tokens)
    ]
    return [policy.bits(step) for step in steps]


def test_fixed_gives_one_width():
    assert bits_of_tokens(parse_policy("fixed:4", MIN_BITS, MAX_BITS), 5) == [4] * 5


def test_exact_draws_every_token_at_the_high_width():
    assert bits_of_tokens(parse_policy("exact:6/3", MIN_BITS, MAX_BITS), 5) == [6] * 5


def test_exact_verifies_at_all_bits_and_leaves_drafts_to_the_engine_unless_told():
    assert parse_policy("exact", MIN_BITS, MAX_BITS) == Exact(8, None)
    assert parse_policy("exact:6", MIN_BITS, MAX_BITS) == Exact(6, None)
    assert parse_policy("exact:6/2.5", MIN_BITS, MAX_BITS, True) == Exact(6, 2.5)


@pytest.mark.parametrize("text", ["exact:4/4", "exact:4/5"])
def test_drafts_take_fewer_bits(text):
    with pytest.raises(UsageError, match="it must be below 4"):
        parse_policy(text, MIN_BITS, MAX_BITS)


def test_phase_switches_after_the_prompt():
    assert bits_of_tokens(parse_policy("phase:6/3", MIN_BITS, MAX_BITS), 4) == [6, 3, 3, 3]


def test_phase_may_rise():
    assert bits_of_tokens(parse_policy("phase:3/6", MIN_BITS, MAX_BITS), 3) == [3, 6, 6]


def test_progressive_switches_exactly_at_its_tokens():
    policy = parse_policy("progressive:6@0,4@16,3@64", MIN_BITS, MAX_BITS)
    assert bits_of_tokens(policy, 70) == [6] * 16 + [4] * 48 + [3] * 6


def test_progressive_may_give_the_prompt_more_bits():
    policy = parse_policy("progressive:8/4@0,3@2", MIN_BITS, MAX_BITS)
    assert bits_of_tokens(policy, 4) == [8, 4, 3, 3]
    assert parse_policy(policy.name, MIN_BITS, MAX_BITS) == policy
    assert parse_policy("progressive:4/4@0,3@2", MIN_BITS, MAX_BITS).name == "progressive:4@0,3@2"


def test_default_progressive_uses_thirds_of_the_token_limit():
    policy = parse_policy("progressive", MIN_BITS, MAX_BITS)
    assert bits_of_tokens(policy, 9) == [8, 5, 5, 4, 4, 4, 3, 3, 3]


@pytest.mark.parametrize(
    ("widths", "expected"),
    [((2, 4), [4, 4, 4, 4, 3, 3]), ((2, 2), [2] * 6), ((4, 8), [8, 5, 4, 4, 4, 4]), ((32, 32), [32] * 6)],
)
def test_default_progressive_stays_inside_the_file(widths, expected):
    assert bits_of_tokens(parse_policy("progressive", *widths), 6, *widths) == expected


@given(st.integers(1, 8), st.integers(0, 7), st.integers(1, 300))
def test_default_progressive_never_rises_and_never_leaves_the_widths(min_bits, extra, num_tokens):
    bits = bits_of_tokens(
        parse_policy("progressive", min_bits, min_bits + extra), num_tokens, min_bits, min_bits + extra
    )
    assert bits == sorted(bits, reverse=True)
    assert min_bits <= min(bits) <= max(bits) <= min_bits + extra


@pytest.mark.parametrize(
    "text", ["fixed:4", "exact:8", "exact:8/4", "phase:6/3", "progressive", "progressive:6@0,4@16,3@64"]
)
def test_name_reads_back_as_the_same_policy(text):
    policy = parse_policy(text, MIN_BITS, MAX_BITS)
    assert policy.name == text
    assert parse_policy(policy.name, MIN_BITS, MAX_BITS) == policy
    assert isinstance(policy, PrecisionPolicy)


def test_spaces_around_a_policy_do_not_matter():
    assert parse_policy(" fixed:4 ", MIN_BITS, MAX_BITS) == Fixed(4)


@pytest.mark.parametrize(
    "text",
    [
        "fixed:1",
        "fixed:9",
        "phase:9/3",
        "phase:6/1",
        "exact:9",
        "exact:4/1",
        "progressive:9@0",
        "progressive:4@0,1@9",
    ],
)
def test_bits_outside_the_file_name_the_widths(text):
    with pytest.raises(UsageError, match="2 to 8 bits") as error:
        parse_policy(text, MIN_BITS, MAX_BITS)
    assert "from 2 to 8" in error.value.hint


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no policy is called ''"),
        ("exactly", "no policy is called 'exactly'"),
        ("exact:", "'' is not a number of bits"),
        ("exact:8/", "'' is not a number of bits"),
        ("exact:8/4/2", "'4/2' is not a number of bits"),
        ("fixed", "'' is not a number of bits"),
        ("fixed:", "'' is not a number of bits"),
        ("fixed:-4", "'-4' is not a number of bits"),
        ("fixed:4.", "'4.' is not a number of bits"),
        ("fixed:nan", "'nan' is not a number of bits"),
        ("fixed:1e1", "'1e1' is not a number of bits"),
        ("fixed:٤", "'٤' is not a number of bits"),
        ("fixed:4/3", "'4/3' is not a number of bits"),
        ("fixed:" + "9" * 5000, "is not a number of bits"),
        ("phase:4", "two widths"),
        ("phase:4/3/2", "'3/2' is not a number of bits"),
        ("progressive:", "no switch point"),
        ("progressive:4", "no switch point"),
        ("progressive:4@0,", "no switch point"),
        ("progressive:4@x", "'x' is not a count"),
        ("progressive:4@2", "must be at 0"),
        ("progressive:4@0,3@0", "0 does not come after 0"),
        ("progressive:4@0,3@8,2@8", "8 does not come after 8"),
        ("progressive:3@0,4@8", "bits rise from 3 to 4 at token 8"),
        ("progressive:3/4@0", "bits rise from 3 in the prompt to 4"),
        ("progressive:/4@0", "'' is not a number of bits"),
        ("progressive:8/", "'' is no switch point"),
        ("progressive:4@0/3@0", "'4@0' is not a number of bits"),
    ],
)
def test_bad_text_says_why_and_shows_an_example(text, reason):
    with pytest.raises(UsageError) as error:
        parse_policy(text, MIN_BITS, MAX_BITS)
    assert reason in str(error.value)
    assert "fixed:4" in error.value.hint


@pytest.mark.parametrize(
    ("text", "name", "bits"),
    [
        ("fixed:3.3", "fixed:3.3", [3.3, 3.3, 3.3]),
        ("fixed:3.0", "fixed:3", [3, 3, 3]),
        ("phase:6/2.75", "phase:6/2.75", [6, 2.75, 2.75]),
        ("progressive:4.5@0,3.3@2", "progressive:4.5@0,3.3@2", [4.5, 4.5, 3.3]),
    ],
)
def test_bits_may_be_a_fraction(text, name, bits):
    policy = parse_policy(text, MIN_BITS, MAX_BITS, allows_fractions=True)
    found = bits_of_tokens(policy, 3)
    assert policy.name == name
    assert found == bits
    assert [type(width) for width in found] == [type(width) for width in bits]


def test_fraction_is_refused_without_sensitivity():
    with pytest.raises(UsageError, match=r"'fixed:3\.3' asks for 3\.3 bits") as error:
        parse_policy("fixed:3.3", MIN_BITS, MAX_BITS)
    assert "taper allocate" in error.value.hint
    assert parse_policy("fixed:3.0", MIN_BITS, MAX_BITS).name == "fixed:3"


def test_fraction_outside_the_model_is_refused():
    with pytest.raises(UsageError, match=r"asks for 8\.5 bits; this model holds 2 to 8 bits"):
        parse_policy("fixed:8.5", MIN_BITS, MAX_BITS, allows_fractions=True)
