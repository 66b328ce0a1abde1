"""How much of one sequence is in another: common beginning, ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence


def rouge_l(reference: str, candidate: str) -> float:
    """ROUGE-L F1 (Lin 2004, section 3, with beta 1) of two texts, 0..1; 1 where neither has a word.

    With L the longest common subsequence of words, P = L / words of the candidate, R = L / words of the
    reference, F1 = 2 P R / (P + R). Words are runs of a-z and 0-9 of the lower-cased text, unstemmed, as in
    the rouge_score package with use_stemmer=False.
    """
    left, right = _words(reference), _words(candidate)
    if not left and not right:
        return 1.0
    return 2.0 * _longest_common_subsequence(left, right) / (len(left) + len(right))


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading entries that agree."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length, by the usual dynamic programme over one row."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for column, other in enumerate(right, 1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
