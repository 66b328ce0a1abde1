"""The KV cache of one sequence: shapes, accounting, refusal beyond the capacity, memory that grows."""

from __future__ import annotations

import resource

import numpy as np
import pytest

from taper.errors import DoesNotFitError, UsageError
from taper.kvcache import KvCache


def small_cache(capacity: int = 10) -> KvCache:
    return KvCache(num_layers=3, num_kv_heads=2, capacity=capacity, head_dim=4, dtype=np.float16)


def test_layers_are_separate_zeroed_arrays_per_head() -> None:
    cache = small_cache()
    assert len(cache.layers) == 3
    for layer in cache.layers:
        assert layer.keys.shape == (2, 1, 4, 16)  # rows come in blocks of sixteen
        assert layer.values.shape == (2, 16, 4)
        assert layer.keys.dtype == layer.values.dtype == np.float16
        assert layer.keys.flags.c_contiguous
        assert layer.keys.flags.writeable
    arrays = [array for layer in cache.layers for array in layer]
    for number, array in enumerate(arrays):
        array[:] = number + 1
    assert [array.min() for array in arrays] == [array.max() for array in arrays] == [1, 2, 3, 4, 5, 6]


def test_bytes_count_keys_and_values_of_every_layer_and_head() -> None:
    cache = small_cache()
    token_bytes = 3 * 2 * 2 * 4 * 2  # layers, keys and values, heads, head_dim, float16
    assert cache.bytes_used == 0
    cache.advance(7)
    assert cache.bytes_used == 7 * token_bytes
    assert cache.bytes_read(5) == 5 * token_bytes


def test_capacity_is_a_limit_that_is_named_and_changes_nothing() -> None:
    cache = small_cache()
    cache.advance(8)
    assert cache.require(2) == 10
    with pytest.raises(DoesNotFitError, match="3 tokens after 8 are 11, the context holds 10") as refusal:
        cache.advance(3)
    assert refusal.value.hint
    assert cache.num_tokens == 8


def test_truncate_goes_back_and_never_forward() -> None:
    cache = small_cache()
    cache.advance(6)
    cache.truncate(2)
    assert cache.num_tokens == 2
    for wrong in (3, -1):
        with pytest.raises(UsageError, match=f"truncate to {wrong} tokens"):
            cache.truncate(wrong)
    assert cache.num_tokens == 2


def test_a_cache_for_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="0 tokens"):
        small_cache(capacity=0)


def test_more_memory_than_the_machine_addresses_is_refused_with_the_size() -> None:
    with pytest.raises(DoesNotFitError, match=f"{2**40 * 96} bytes"):
        small_cache(capacity=2**40)


def test_memory_is_resident_only_where_it_was_written() -> None:
    before = resident_bytes()
    cache = KvCache(num_layers=4, num_kv_heads=4, capacity=65536, head_dim=128, dtype=np.float32)  # 1 GiB
    assert resident_bytes() - before < 16 * 2**20
    for layer in cache.layers:
        layer.keys[:, :6] = 1.0
        layer.values[:, :100] = 1.0
    # 32 head regions of about 100 rows of 512 bytes, in whole pages.
    assert resident_bytes() - before < 16 * 2**20


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
