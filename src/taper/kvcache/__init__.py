"""KV caches of sequences: arrays of floats, or planes in paged blocks."""

from taper.kvcache.cache import KEY_BLOCK, KvCache, KvLayer
from taper.kvcache.format import MAX_KV_BITS, KvPlanes, parse_kv
from taper.kvcache.planes import BLOCK_ENTRIES, PlanesCache, PlanesLayer, planes_layout
from taper.kvcache.pool import KvPool
from taper.kvcache.prefixes import PrefixCache
from taper.kvcache.random_entries import fill_with_random_entries

AnyCache = KvCache | PlanesCache
AnyLayer = KvLayer | PlanesLayer

__all__ = [
    "BLOCK_ENTRIES",
    "KEY_BLOCK",
    "MAX_KV_BITS",
    "AnyCache",
    "AnyLayer",
    "KvCache",
    "KvLayer",
    "KvPlanes",
    "KvPool",
    "PlanesCache",
    "PlanesLayer",
    "PrefixCache",
    "fill_with_random_entries",
    "parse_kv",
    "planes_layout",
]
