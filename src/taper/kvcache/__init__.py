"""KV cache of a sequence."""

from taper.kvcache.cache import KEY_BLOCK, KvCache, KvLayer

__all__ = ["KEY_BLOCK", "KvCache", "KvLayer"]
