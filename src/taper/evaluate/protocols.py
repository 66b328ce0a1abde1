"""How a text is cut into blocks and which tokens are scored; figures compare only within one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.tokenizer import Tokenizer

Int32 = NDArray[np.int32]

PROTOCOLS = ("llama.cpp", "blocks")
_LLAMA_CPP_TOKENS = 512
_BLOCK_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Blocks:
    """A tokenised text under one protocol.

    Attributes:
        protocol: `llama.cpp` or `blocks`.
        tokens: int32 (blocks, block_tokens); each block is read from an empty cache.
        first_scored: position of the first token of a block whose probability counts, at least 1.
        tokens_per_byte: of the whole text, for bits per byte.
    """

    protocol: str
    tokens: Int32
    first_scored: int
    tokens_per_byte: float

    @property
    def label(self) -> str:
        """What is measured, with its true numbers."""
        length = self.tokens.shape[1]
        scored = length - self.first_scored
        return f"{self.protocol}, {length}-token blocks, last {scored} tokens scored"

    @property
    def num_scored(self) -> int:
        """Scored tokens in all blocks."""
        num_blocks, length = (int(size) for size in self.tokens.shape)
        return num_blocks * (length - self.first_scored)


def cut(
    text: str, tokenizer: Tokenizer, context_tokens: int, protocol: str, max_blocks: int | None = None
) -> Blocks:
    """Cut a text as a protocol asks; a rest shorter than a block is left out, as in both originals.

    `llama.cpp`: llama-perplexity's windows of 512 tokens, of which the second half is scored: from position
    256 + 1 on, since position 256 is the first whose prediction counts. Where the tokenizer begins a text
    with a special token, that token takes the first place of every window. `blocks`: blocks of 2048 tokens as
    in GPTQ (arXiv 2210.17323, section 4), all tokens but the first scored. A shorter context shortens the
    blocks.

    Args:
        text: the concatenated text.
        tokenizer: the model's.
        context_tokens: the model's context length.
        protocol: one of `PROTOCOLS`.
        max_blocks: keep the first of them only.

    Raises:
        UsageError: an unknown protocol, or less text than one block.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"protocol {protocol!r} is none of {', '.join(PROTOCOLS)}")
    windows = protocol == "llama.cpp"
    length = min(_LLAMA_CPP_TOKENS if windows else _BLOCK_TOKENS, context_tokens)
    ids = np.array(tokenizer.encode(text), dtype=np.int32)
    begin = tokenizer.encode("")
    num_blocks = len(ids) // length
    if max_blocks is not None:
        if max_blocks < 1:
            raise UsageError(f"max_blocks is {max_blocks}, at least 1 is needed")
        num_blocks = min(num_blocks, max_blocks)
    if num_blocks < 1:
        raise UsageError(
            f"the text has {len(ids)} tokens, one block takes {length}", hint="give a longer text"
        )
    tokens = ids[: num_blocks * length].reshape(num_blocks, length).copy()
    if windows and begin:
        tokens[:, 0] = begin[0]
    first_scored = length // 2 + 1 if windows else 1
    per_byte = (len(ids) - len(begin)) / len(text.encode())
    return Blocks(protocol, tokens, first_scored, per_byte)


def passage_blocks(passages: Sequence[str], tokenizer: Tokenizer, context_tokens: int) -> Blocks:
    """One llama.cpp window from the beginning of each passage; those too short for one are left out.

    Raises:
        UsageError: no passage holds a window.
    """
    length = min(_LLAMA_CPP_TOKENS, context_tokens)
    begin = tokenizer.encode("")[:1]
    encoded = [tokenizer.encode(passage, special_tokens=False) for passage in passages]
    whole = [[*begin, *ids][:length] for ids in encoded if len(begin) + len(ids) >= length]
    if not whole:
        raise UsageError(
            f"none of {len(passages)} passages has the {length} tokens of a block", hint="give a longer text"
        )
    num_bytes = sum(len(passage.encode()) for passage in passages)
    per_byte = sum(len(ids) for ids in encoded) / num_bytes
    return Blocks("llama.cpp", np.array(whole, dtype=np.int32), length // 2 + 1, per_byte)
