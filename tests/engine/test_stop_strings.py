"""Stop strings are found wherever tokens cut them, and nothing of them is ever shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taper.engine.stop_strings import StopStrings
from taper.errors import UsageError

LETTERS = st.text("ab", max_size=14)


def run(strings, pieces):
    """What is shown after each piece and at the end, and the stop string that matched."""
    stops = StopStrings(strings)
    shown = []
    for piece in pieces:
        shown.append(stops.feed(piece))
        if stops.matched is not None:
            return shown, stops.matched
    return [*shown, stops.flush()], None


def reference(strings, text):
    """Character by character: the first end of any stop string, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ending = [s for s in strings if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.lists(LETTERS, max_size=6))
def test_shown_text_and_match_do_not_depend_on_the_pieces(strings, pieces):
    shown, matched = run(strings, pieces)
    assert ("".join(shown), matched) == reference(strings, "".join(pieces))


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), LETTERS)
def test_no_more_is_held_than_could_begin_a_stop_string(strings, text):
    stops = StopStrings(strings)
    shown = ""
    for end, character in enumerate(text, 1):
        shown += stops.feed(character)
        if stops.matched is not None:
            return
        held = text[len(shown) : end]
        assert held == "" or any(s.startswith(held) for s in strings)
        assert not any(s.startswith(text[start:end]) for s in strings for start in range(len(shown)))


def test_stop_string_across_three_pieces():
    assert run(["\nUser:"], ["Hi", " there\nU", "se", "r: more"]) == (["Hi", " there", "", ""], "\nUser:")


def test_false_start_is_shown_once_it_is_settled():
    assert run(["\nUser:"], ["a\nUs", "ual", "."]) == (["a", "\nUsual", ".", ""], None)


def test_overlapping_starts_are_not_lost():
    assert run(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", ""], "aab")


def test_the_stop_string_complete_first_wins():
    assert run(["abcd", "bc"], ["abcd"]) == (["a"], "bc")


def test_of_two_complete_together_the_longer_wins():
    assert run(["END", "THE END"], ["at THE END."]) == (["at "], "THE END")


def test_without_stop_strings_text_passes():
    assert run([], ["a", "b"]) == (["a", "b", ""], None)


@pytest.mark.parametrize("strings", [[""], ["a", ""], [3]])
def test_empty_stop_string_is_refused(strings):
    with pytest.raises(UsageError, match="at least one character"):
        StopStrings(strings)
