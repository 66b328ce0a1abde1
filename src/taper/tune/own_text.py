"""Text that a model writes itself, where the user has none: its own domains, mixed as it mixes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.models import Decoder

Int32 = NDArray[np.int32]

OWN_TEXT = "own text"
_TOGETHER = 16
# Drawn from a stream of its own, apart from those of other seeds.
_STREAM = 6


def write_windows(
    decoder: Decoder,
    bits: int,
    num_windows: int,
    length: int,
    begin: list[int],
    progress: Callable[[float], None] = lambda done: None,
) -> Int32:
    """Draw windows at temperature 1, each on its own, so that no two continue one another.

    A window begins with the tokenizer's first tokens and a random one (LLM-QAT, arXiv 2305.17888). Costs a
    decode step for every sixteen tokens; the same for every call, thread count and instruction set.

    Args:
        decoder: the model, of a `.taper` file.
        bits: of every pass.
        num_windows: at least 1.
        length: tokens of a window.
        begin: ids that the tokenizer puts before every text.
        progress: called with the share done.

    Returns:
        int32 (num_windows, length).

    Raises:
        UsageError: windows without room for a token of the model's own.
    """
    if length < len(begin) + 2:
        raise UsageError(
            f"windows of {length} tokens have no room for text", "give --text TEXT, or a longer context"
        )
    generator = np.random.default_rng(_STREAM)
    tokens = np.empty((num_windows, length), np.int32)
    tokens[:, : len(begin)] = begin
    tokens[:, len(begin)] = generator.integers(decoder.config.vocab_size, size=num_windows)
    for row in range(0, num_windows, _TOGETHER):
        part = tokens[row : row + _TOGETHER]
        caches = [decoder.new_cache(length) for _ in part]
        for position in range(length - 1):
            logits = decoder.decode_batch(np.ascontiguousarray(part[:, position]), caches, bits)
            if position >= len(begin):
                # Adding Gumbel noise and taking the largest draws from the softmax.
                part[:, position + 1] = np.argmax(logits + generator.gumbel(size=logits.shape), axis=1)
            progress((row + len(part) * (position + 2) / length) / num_windows)
    return tokens
