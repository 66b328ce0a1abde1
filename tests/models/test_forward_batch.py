"""Passes over several sequences that each bring one token or many."""

from __future__ import annotations

import numpy as np
import pytest

from taper.engine import embedded_model
from taper.errors import UsageError
from taper.formats.container import TaperFile
from taper.models import Decoder


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.from_taper(TaperFile.open(embedded_model()))


def test_each_sequence_gets_the_bytes_of_a_pass_of_its_own(decoder: Decoder) -> None:
    tokens = np.arange(1, 25, dtype=np.int32)
    counts = (1, 20, 3)
    alone, together = [], [decoder.new_cache(64) for _ in counts]
    begin = 0
    for count in counts:
        alone.append(decoder.forward(tokens[begin : begin + count], decoder.new_cache(64), 3))
        begin += count
    out = decoder.forward_batch(tokens, list(zip(counts, together, strict=True)), 3)
    np.testing.assert_array_equal(out, np.concatenate([row for row in alone if row is not None]))
    assert [cache.num_tokens for cache in together] == list(counts)


def test_tokens_that_nobody_or_two_take_are_refused(decoder: Decoder) -> None:
    cache = decoder.new_cache(8)
    for counts in ((), (1,), (0, 2), (3,)):
        with pytest.raises(UsageError, match="tokens come for sequences"):
            decoder.forward_batch([1, 2], [(count, decoder.new_cache(8)) for count in counts], 3)
    with pytest.raises(UsageError, match="twice"):
        decoder.forward_batch([1, 2], [(1, cache), (1, cache)], 3)
    assert cache.num_tokens == 0
