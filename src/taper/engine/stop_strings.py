"""Ends an output at a stop string, wherever the tokens happen to cut it."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from taper.errors import UsageError


class StopStrings:
    """Passes text on, except what is or could still become a stop string.

    The output ends before the stop string that is complete first, character by character; of two that are
    complete at the same character, before the longer one. So how the text is cut into pieces changes nothing.

    Args:
        strings: the stop strings; may be empty.

    Raises:
        UsageError: an empty stop string.
    """

    def __init__(self, strings: SequenceOf[str]) -> None:
        if any(not isinstance(string, str) or not string for string in strings):
            raise UsageError(f"stop is {list(strings)!r}; every stop string needs at least one character")
        self._strings = tuple(strings)
        self._longest_start = max(map(len, self._strings), default=1) - 1
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """Take the next piece of text and return what may be shown; after a match, what came before it."""
        if not self._strings:
            return piece
        text = self._held + piece
        self.matched = self._first_match(text)
        if self.matched is not None:
            self._held = ""
            return text[: text.index(self.matched)]
        shown = len(text) - self._held_length(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Return what was held back, at the end of the output."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> str | None:
        """The stop string whose first occurrence ends first; of equals the longest."""
        found = [(text.index(s) + len(s), -len(s), s) for s in self._strings if s in text]
        return min(found)[2] if found else None

    def _held_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest_start), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return length
        return 0
