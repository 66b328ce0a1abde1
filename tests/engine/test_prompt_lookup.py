"""Drafts from what was said before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taper.engine.prompt_lookup import MATCH_LENGTHS, PromptLookup


def test_the_longest_match_wins_over_a_later_shorter_one():
    lookup = PromptLookup([1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4])
    assert lookup.continuation(2) == (4, [50, 9])


def test_of_equal_matches_the_last_counts():
    assert PromptLookup([7, 8, 1, 7, 8, 2, 7, 8]).continuation(1) == (2, [2])


def test_no_match_gives_nothing():
    assert PromptLookup([1, 2, 3, 4]).continuation(5) == (0, [])
    assert PromptLookup([1]).continuation(5) == (0, [])
    assert PromptLookup([1, 1]).continuation(5) == (0, [])


def test_tokens_of_the_answer_are_found_too():
    lookup = PromptLookup([5, 6])
    for token in (7, 5, 6):
        lookup.append(token)
    assert lookup.continuation(9) == (2, [7, 5, 6])


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 8))
def test_it_is_what_a_search_from_the_end_finds(tokens, most):
    def searched():
        for length in MATCH_LENGTHS:
            for start in range(len(tokens) - 1, length - 1, -1):
                if len(tokens) >= length and tokens[start - length : start] == tokens[-length:]:
                    return length, tokens[start : start + most]
        return 0, []

    assert PromptLookup(tokens).continuation(most) == searched()
