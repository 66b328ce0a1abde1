"""ROUGE-L against hand-computed cases, the definition of a subsequence, and symmetry."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taper.evaluate.sequences import common_prefix, rouge_l

WORDS = st.lists(st.sampled_from(["the", "sea", "of", "rain"]), max_size=7)


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        # Lin 2004, section 3: "police kill the gunman" and "the gunman kill police" have an LCS of 2.
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("police killed the gunman", "the gunman kill police", 2 / 4),
        # P = 2/2, R = 2/5.
        ("a b c d e", "b e", 2 * 1 * 0.4 / 1.4),
        ("The sea, the SEA!", "the sea the sea", 1.0),
        ("don't", "don t", 1.0),
        ("one", "two", 0.0),
        ("one", "", 0.0),
        ("", "...", 1.0),
    ],
)
def test_known_cases(reference: str, candidate: str, expected: float) -> None:
    assert rouge_l(reference, candidate) == pytest.approx(expected)


@given(WORDS, WORDS)
def test_longest_common_subsequence_by_brute_force(left: list[str], right: list[str]) -> None:
    subsequences = {c for size in range(len(left) + 1) for c in combinations(left, size)}
    longest = max(
        len(c) for size in range(len(right) + 1) for c in combinations(right, size) if c in subsequences
    )
    expected = 2 * longest / (len(left) + len(right)) if left or right else 1.0
    assert rouge_l(" ".join(left), " ".join(right)) == pytest.approx(expected)


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([2, 1], [1, 2]) == 0
