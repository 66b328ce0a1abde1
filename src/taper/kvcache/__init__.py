"""KV cache of a sequence."""

from taper.kvcache.cache import KvCache, KvLayer

__all__ = ["KvCache", "KvLayer"]
