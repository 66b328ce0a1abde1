"""Text to token ids and back, as the model's tokenizer.json says."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

from taper.errors import CorruptFileError, UsageError


class Tokenizer:
    """A tokenizer.json, with truncation and padding switched off: neither drops nor adds a token in silence.

    Args:
        text: the content of tokenizer.json.

    Raises:
        CorruptFileError: text that is no tokenizer.
    """

    def __init__(self, text: str) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise CorruptFileError(
                f"the model's tokenizer.json cannot be read: {str(error).splitlines()[0]}",
                "take the tokenizer.json that belongs to the model",
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; empty text gives the special tokens alone.
            special_tokens: add those that tokenizer.json puts around a text, such as the beginning-of-text
                token.

        Raises:
            UsageError: text with half of a surrogate pair, which is no Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text holds {text[error.start]!r} at character {error.start}; it must be valid Unicode",
                "decode the input as UTF-8",
            ) from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, special_tokens: bool = False) -> str:
        """Text of token ids; ids without a token give nothing, broken UTF-8 gives U+FFFD.

        Args:
            token_ids: at least 0 each.
            special_tokens: write special tokens out instead of leaving them out.
        """
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=not special_tokens)
        return text

    def is_silent(self, token_id: int) -> bool:
        """Whether decoding leaves the token out: a special token, or an id without a token."""
        return token_id in self._special_ids or self._tokenizer.id_to_token(token_id) is None

    def token(self, token_id: int) -> str | None:
        """The token's own spelling, such as `</s>`; None where there is none."""
        spelling: str | None = self._tokenizer.id_to_token(token_id)
        return spelling

    def token_id(self, token: str) -> int | None:
        """The id of a token's own spelling; None where there is none."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id
