"""Windows that a model writes itself."""

from __future__ import annotations

import numpy as np
import pytest

from taper.errors import UsageError
from taper.tune import own_text
from taper.tune.own_text import write_windows


def test_a_window_is_what_the_model_draws_alone(decoder):
    """Each token again from a pass over what stands before it, with the same noise."""
    tokens = write_windows(decoder, 4, 3, 9, [1])
    assert tokens.shape == (3, 9)
    assert (tokens[:, 0] == 1).all()
    noise = np.random.default_rng(own_text._STREAM)
    vocab = decoder.config.vocab_size
    np.testing.assert_array_equal(tokens[:, 1], noise.integers(vocab, size=3))
    logits = [decoder.forward(row, decoder.new_cache(9), 4, logits="all") for row in tokens]
    for position in range(1, 8):
        drawn = np.stack([rows[position] for rows in logits]) + noise.gumbel(size=(3, vocab))
        np.testing.assert_array_equal(tokens[:, position + 1], drawn.argmax(axis=1))


def test_windows_beyond_one_batch_differ_and_progress_ends_at_one(decoder):
    done = []
    tokens = write_windows(decoder, 4, own_text._TOGETHER + 2, 6, [], done.append)
    assert len({tuple(row) for row in tokens.tolist()}) == own_text._TOGETHER + 2
    assert done == sorted(done)
    assert done[-1] == pytest.approx(1.0)
    np.testing.assert_array_equal(tokens, write_windows(decoder, 4, own_text._TOGETHER + 2, 6, []))


def test_a_window_without_room_is_refused(decoder):
    with pytest.raises(UsageError, match="windows of 2 tokens have no room"):
        write_windows(decoder, 4, 1, 2, [1])
