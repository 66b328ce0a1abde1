"""Text from tokens as they come, never half a character."""

from __future__ import annotations

from collections.abc import Sequence

from taper.tokenizer.tokenizer import Tokenizer

REPLACEMENT = "�"  # what decoding gives for bytes that are no character, or not yet
CONTEXT_TOKENS = 8  # enough that the first new token is not the first of the window, whose space is stripped
MAX_PENDING_TOKENS = 8  # a character has at most 4 bytes, so more than 4 waiting tokens hold broken bytes


class IncrementalDetokenizer:
    """Turns one token at a time into the text it adds.

    Decodes a short window and returns what is new in it, once the window ends with a whole character (the
    method of text-generation-inference and vLLM). The pieces together are what decoding context and tokens at
    once adds to the context's text, so the space before a first word is kept. One case differs: a
    byte-fallback tokenizer turns a run of byte tokens that breaks off into U+FFFD for every byte of it;
    characters that were whole in it have been handed out by then and stay.

    Args:
        tokenizer: of the model.
        context: tokens before the first one, such as the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window, self._shown = _end_of(context, tokenizer)  # the text of the first `_read` tokens is out
        self._read = len(self._window)

    def append(self, token_id: int) -> str:
        """Take the next token; return the text that is now certain, empty while a character is incomplete."""
        if self._tokenizer.is_silent(token_id):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if len(text) > len(self._shown) and not text.endswith(REPLACEMENT):
            return self._emit(len(self._window), text)
        if len(self._window) - self._read > MAX_PENDING_TOKENS:
            return self._emit_broken(text)
        return ""

    def flush(self) -> str:
        """Return what is left at the end, U+FFFD for a character that never became whole."""
        text = self._tokenizer.decode(self._window)
        return self._emit(len(self._window), text) if len(text) > len(self._shown) else ""

    def _emit(self, end: int, text: str) -> str:
        """Hand out what `text`, that of the first `end` tokens, adds; what was new begins the next window."""
        if text.startswith(self._shown):
            new = text[len(self._shown) :]
        else:  # a run of byte tokens broke off and took back a character that is already out
            new = self._tokenizer.decode(self._window[self._read : end])
        del self._window[: self._read]
        self._read = end - self._read
        self._shown = self._tokenizer.decode(self._window[: self._read])
        return new

    def _emit_broken(self, text: str) -> str:
        """Hand out broken bytes up to the last token, which may begin a character; wait where it does not."""
        end = len(self._window) - 1
        head = self._tokenizer.decode(self._window[:end])
        return self._emit(end, head) if head + self._tokenizer.decode(self._window[end:]) == text else ""


def _end_of(context: Sequence[int], tokenizer: Tokenizer) -> tuple[list[int], str]:
    """The last tokens of a context and their text: whole characters, or nothing where it ends within one."""
    audible = [token_id for token_id in context if not tokenizer.is_silent(token_id)]
    count = CONTEXT_TOKENS
    text = tokenizer.decode(audible[-count:])
    while REPLACEMENT in text and count < len(audible):  # perhaps cut within a character
        count *= 2
        text = tokenizer.decode(audible[-count:])
    return ([], "") if text.endswith(REPLACEMENT) else (audible[-count:], text)
