"""A cache of planes: accounting, blocks that are shared, given up and given back, and what it reads."""

from __future__ import annotations

import contextlib
import gc

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from taper.errors import DoesNotFitError, UsageError
from taper.kernels import anda
from taper.kvcache import BLOCK_ENTRIES, KvPlanes, KvPool, PlanesCache, parse_kv, planes_layout

LAYERS, HEADS, DIM = 2, 2, 32
WINDOWED = KvPlanes(7, 7, 4, 4, 64)


def cache(kv, capacity=1000, **options):
    return PlanesCache(parse_kv(kv) if isinstance(kv, str) else kv, LAYERS, HEADS, DIM, capacity, **options)


def fill(of, num_tokens, seed=0):
    """Entries as a decoder writes them."""
    rng = np.random.default_rng(seed)
    begin = of.num_tokens
    of.require(num_tokens)
    angles = np.zeros((begin + num_tokens, DIM // 2), np.float32)
    for layer in of.layers:
        qkv = rng.standard_normal((num_tokens, 3 * HEADS * DIM)).astype(np.float32)
        layer.store(qkv, HEADS, begin, np.cos(angles), np.sin(angles))
    of.advance(num_tokens)
    of.release_old()


def test_bytes_are_those_of_blocks_and_of_bits():
    of = cache("7")
    assert of.bytes_used == 0
    fill(of, 65)
    assert of.bytes_used == 2 * of.pool.layout.upper_bytes == of.bytes_at(65)
    bits = LAYERS * HEADS * DIM * (2 + 7 + 7 + 2 * 5 / 32)
    assert of.bytes_read(65) == int(65 * bits / 8)


def test_a_window_keeps_lower_planes_of_recent_blocks_only():
    of = cache(WINDOWED)
    fill(of, 256)
    fill(of, 1)
    # Blocks that are old for token 257 and lie a block behind that: (257 - 64 - 64 + 1) // 64.
    assert (of._table[1] >= 0).sum() == 5 - 2
    values = 257 // BLOCK_ENTRIES * BLOCK_ENTRIES * LAYERS * 2 * HEADS * DIM
    whole = of.bytes_used - 3 * of.pool.layout.lower_bytes
    assert whole == pytest.approx(values * anda.bits_per_value(4, 32) / 8 * 5 / 4, abs=5 * 64)
    old = (257 - 1 - 64 + 1) // 64 * 64
    bits = LAYERS * HEADS * DIM * ((257 - old) * (2 + 7 + 7) + old * (2 + 4 + 4) + 257 * 2 * 5 / 32)
    assert of.bytes_read(257) == int(bits / 8)


def test_entries_are_what_was_written_and_fewer_bits_are_further_away():
    rng = np.random.default_rng(3)
    written = rng.standard_normal((70, 3 * HEADS * DIM)).astype(np.float32)
    zeros = np.zeros((70, DIM // 2), np.float32)
    errors = {}
    for kv in ("7", "4", "2"):
        of = cache(kv)
        of.require(70)
        of.layers[1].store(written.copy(), HEADS, 0, zeros + 1, zeros)
        of.advance(70)
        found = np.stack(of.entries(1))
        expected = written.reshape(70, 3, HEADS, DIM)[:, 1:].transpose(1, 2, 0, 3)
        errors[kv] = np.abs(found - expected).max()
        # A step of the largest value in a group; keys are rotated there: all elements share its error.
        assert errors[kv] < 2 * np.abs(expected).max() * 2.0 ** -int(kv)
    assert errors["7"] < errors["4"] < errors["2"]


def test_reading_fewer_bits_of_what_is_stored():
    stored = cache("7")
    fill(stored, 130)
    less = cache("7", reading=parse_kv("4"))
    fill(less, 130)
    np.testing.assert_array_equal(stored.pool.upper.memory[:3], less.pool.upper.memory[:3])
    assert not np.array_equal(stored.entries(0)[0], less.entries(0)[0])
    assert less.bytes_read(130) < stored.bytes_read(130)
    with pytest.raises(UsageError, match="KV cache 4 cannot be read at 5"):
        cache("4", reading=parse_kv("5"))
    with pytest.raises(UsageError, match="keeps all bits for 64 entries; 7,4@128 reads them longer"):
        cache(WINDOWED, reading=parse_kv("7,4@128"))
    assert cache(WINDOWED, reading=parse_kv("6,3@32")).bytes_read(10) > 0


def test_truncate_stops_where_planes_were_given_up():
    of = cache(WINDOWED)
    fill(of, 300)
    released = (300 - 64 - 64 + 1) // 64
    least = released * 64 + 64 - 1  # the first position for which those blocks are old
    assert of.keeps(least) == least
    assert of.keeps(least - 1) == 0
    with pytest.raises(UsageError, match=f"cannot truncate to {least - 1} tokens: planes .* were given up"):
        of.truncate(least - 1)
    of.truncate(least)
    assert of.num_tokens == least
    of.truncate(0)
    assert of.bytes_used == 0
    of.pool.check_integrity()
    with pytest.raises(UsageError, match="cannot truncate to 1 tokens: the cache holds 0"):
        of.truncate(1)


def test_capacity_and_an_exhausted_pool_are_named_and_change_nothing():
    of = cache("7", capacity=100)
    fill(of, 90)
    with pytest.raises(DoesNotFitError, match="11 tokens after 90 are 101, the context holds 100"):
        of.require(11)
    layout = planes_layout(parse_kv("7"), LAYERS, HEADS, DIM)
    pool = KvPool(layout, 3)
    first, second = cache("7", pool=pool), cache("7", pool=pool)
    fill(first, 128)
    fill(second, 64)
    with pytest.raises(DoesNotFitError, match="all 3 blocks"):
        second.require(1)
    assert second.num_tokens == 64
    first.truncate(0)
    fill(second, 1)
    del first, second
    gc.collect()
    assert pool.num_free == 3
    pool.check_integrity()


def test_a_fork_shares_blocks_until_one_of_the_two_writes():
    pool = KvPool(planes_layout(parse_kv("7"), LAYERS, HEADS, DIM), 10)
    of = cache("7", pool=pool)
    fill(of, 100)
    other = of.fork(70, 1000)
    assert pool.num_free == 8
    before = [part.copy() for part in of.entries(1)]
    fill(other, 20, seed=9)
    assert pool.num_free == 7  # the block that both began
    for part, kept in zip(of.entries(1), before, strict=True):
        np.testing.assert_array_equal(part, kept)
    for part, kept in zip(other.entries(1), before, strict=True):
        np.testing.assert_array_equal(part[:, :70], kept[:, :70])
        assert not np.array_equal(part[:, 70:90], kept[:, 70:90])
    with pytest.raises(UsageError, match="101 entries cannot be shared"):
        of.fork(101, 1000)
    with pytest.raises(UsageError, match="the cache holds 100, the other one 69"):
        of.fork(70, 69)
    pool.check_integrity()


def test_a_fork_that_reads_more_than_is_left_is_refused():
    """This cache reads 3 bits and so needs no lower planes; the other one would."""
    of = cache(WINDOWED, reading=parse_kv("3"))
    fill(of, 300)
    assert of.keeps(150) == 150
    assert of.fork(150, 1000, parse_kv("4")).num_tokens == 150
    with pytest.raises(UsageError, match="150 entries cannot be shared"):
        of.fork(150, 1000)
    of.pool.check_integrity()


def test_nothing_is_given_up_before_it_is_said():
    of = cache(WINDOWED)
    of.require(300)
    of.advance(300)
    assert of.keeps(1) == 1
    of.release_old()
    assert of.keeps(1) == 0


def test_shapes_that_planes_cannot_hold_are_refused():
    with pytest.raises(UsageError, match="head_dim is 8"):
        planes_layout(parse_kv("7"), 1, 1, 8)
    with pytest.raises(UsageError, match="bits for 3 layers, the model has 2"):
        planes_layout(KvPlanes((7, 7, 7), 7), 2, 1, 16)
    with pytest.raises(UsageError, match="0 tokens"):
        cache("7", capacity=0)


class Sequences(RuleBasedStateMachine):
    """Sequences that grow, go back, fork and end over one pool: every block is held or free."""

    caches = Bundle("caches")

    def __init__(self):
        super().__init__()
        self.pool = KvPool(planes_layout(WINDOWED, LAYERS, HEADS, DIM), 12)

    @rule(target=caches)
    def begin(self):
        return cache(WINDOWED, pool=self.pool)

    @rule(of=caches, count=st.integers(1, 150), seed=st.integers(0, 9))
    def grow(self, of, count, seed):
        with contextlib.suppress(DoesNotFitError):
            fill(of, count, seed)

    @rule(of=caches, share=st.floats(0, 1))
    def go_back(self, of, share):
        of.truncate(of.keeps(int(share * of.num_tokens)))

    @rule(target=caches, of=caches, share=st.floats(0, 1))
    def fork(self, of, share):
        return of.fork(of.keeps(int(share * of.num_tokens)), 1000)

    @rule(of=consumes(caches))
    def end(self, of):
        of.truncate(0)

    @invariant()
    def blocks_are_held_or_free(self):
        self.pool.check_integrity()

    def teardown(self):
        self.pool.check_integrity()


Sequences.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestSequences = Sequences.TestCase
