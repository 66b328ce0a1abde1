"""Drafts without a model: what followed the last tokens when they occurred before (prompt lookup)."""

from __future__ import annotations

from collections.abc import Iterable

# Matches shorter than 2 are right too seldom to draft by; one longer than 4 nearly always has the
# continuation that its last 4 tokens have.
MATCH_LENGTHS = (4, 3, 2)


class PromptLookup:
    """The tokens of one sequence, and where each run of 2 to 4 of them last occurred.

    The method is prompt lookup decoding (A. Saxena 2023; assisted generation in transformers).

    Args:
        tokens: the prompt.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._end: tuple[int, ...] = ()  # the last tokens, as many as the longest match
        self._followed_at: dict[tuple[int, ...], int] = {}  # a run to the index of the token after it
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Take the next token of the sequence."""
        end = self._end
        for length in MATCH_LENGTHS:
            if length <= len(end):
                self._followed_at[end[-length:]] = len(self._tokens)
        self._end = (*end, token)[-MATCH_LENGTHS[0] :]
        self._tokens.append(token)

    def continuation(self, most: int) -> tuple[int, list[int]]:
        """The length of the longest end of the sequence that occurred before, and what followed it last.

        Returns:
            That length and up to `most` tokens, at least one; 0 and none without a match.
        """
        end = self._end
        for length in MATCH_LENGTHS:
            start = self._followed_at.get(end[-length:])
            if start is not None and length <= len(end):
                return length, self._tokens[start : start + most]
        return 0, []
