"""What a single token spells, as bytes: a token may be half a letter."""

from __future__ import annotations

import json
import re
from functools import lru_cache

from taper.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """Spells the tokens of one tokenizer.

    Args:
        tokenizer: of the model; None spells tokens as `token_id:N`.
        tokenizer_json: its text, for how it writes bytes.
    """

    def __init__(self, tokenizer: Tokenizer | None, tokenizer_json: str | None) -> None:
        self._tokenizer = tokenizer
        layout = json.loads(tokenizer_json) if tokenizer_json else {}
        self._is_byte_level = '"ByteLevel"' in json.dumps(
            [layout.get("decoder"), layout.get("pre_tokenizer")]
        )
        self._bytes = byte_alphabet()
        self.text_of = lru_cache(maxsize=1 << 14)(self._text_of)

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes; a special token gives its name."""
        spelling = None if self._tokenizer is None else self._tokenizer.token(token_id)
        if spelling is None or self._tokenizer is None:
            return f"token_id:{token_id}".encode()
        if self._tokenizer.is_silent(token_id):
            return spelling.encode()
        if self._is_byte_level and all(letter in self._bytes for letter in spelling):
            return bytes(self._bytes[letter] for letter in spelling)
        byte = _BYTE.fullmatch(spelling)
        return bytes([int(byte[1], 16)]) if byte else spelling.replace("\u2581", " ").encode()

    def _text_of(self, token_id: int) -> str:
        """The token as text; bytes that are no whole letter as OpenAI writes them, `bytes:\\xe2\\x80`."""
        spelling = self.bytes_of(token_id)
        try:
            return spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, others for letters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
