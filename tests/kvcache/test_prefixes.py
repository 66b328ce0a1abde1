"""Prefixes that are kept: found by tokens and bits, dropped by age, blocks given back."""

from __future__ import annotations

import numpy as np
import pytest

from taper.kvcache import KvPlanes, KvPool, PlanesCache, PrefixCache, planes_layout

KV = KvPlanes(7, 7)
TOKENS = list(range(200))


@pytest.fixture
def pool():
    return KvPool(planes_layout(KV, 1, 1, 16), 12)


def filled(pool, count):
    cache = PlanesCache(KV, 1, 1, 16, 256, pool)
    cache.advance(count)
    return cache


def test_the_longest_prefix_in_whole_blocks_is_found(pool):
    kept = PrefixCache()
    kept.keep(TOKENS, [4] * 200, filled(pool, 200))
    assert kept.find([*TOKENS[:150], 7], 4, 4).num_tokens == 128
    assert kept.find(TOKENS[:130], 2, 6).num_tokens == 128
    assert kept.find(TOKENS[:128], 2, 6).num_tokens == 64, "the last token has to be run"
    assert kept.find(TOKENS[:64], 2, 6) is None
    assert kept.find([9, *TOKENS[1:]], 2, 6) is None


@pytest.mark.parametrize(("low", "high", "found"), [(3, 4, 128), (4, 6, 64), (5, 6, None), (2, 2, None)])
def test_entries_count_only_at_bits_within_the_bounds(pool, low, high, found):
    kept = PrefixCache()
    kept.keep(TOKENS, [4] * 64 + [3] * 136, filled(pool, 200))
    prefix = kept.find(TOKENS[:150], low, high)
    assert (prefix and prefix.num_tokens) == found


def test_a_prefix_keeps_its_blocks_until_it_is_dropped(pool):
    kept, cache = PrefixCache(), filled(pool, 200)
    kept.keep(TOKENS, [4] * 200, cache)
    kept.keep(TOKENS, [4] * 200, cache)  # nothing new
    assert len(kept) == 1
    del cache
    assert pool.num_free == 12 - 3
    assert kept.drop_oldest()
    assert not kept.drop_oldest()
    assert pool.num_free == 12
    assert kept.find(TOKENS, 2, 6) is None
    pool.check_integrity()


def test_the_least_recently_used_goes_first(pool):
    kept = PrefixCache(max_kept=2)
    first, second, third = (np.arange(70) + 1000 * index for index in range(3))
    kept.keep(first.tolist(), [4] * 70, filled(pool, 70))
    kept.keep(second.tolist(), [4] * 70, filled(pool, 70))
    assert kept.find(first.tolist(), 4, 4)
    kept.keep(third.tolist(), [4] * 70, filled(pool, 70))
    assert kept.find(first.tolist(), 4, 4)
    assert not kept.find(second.tolist(), 4, 4)
