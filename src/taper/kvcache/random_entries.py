"""Random entries, over which attention takes as long as over real ones: for what is timed."""

from __future__ import annotations

import numpy as np

from taper.config import ModelConfig
from taper.kvcache.cache import KvCache
from taper.kvcache.planes import PlanesCache

# Entries that are made at a time.
_ROWS = 256


def fill_with_random_entries(
    cache: KvCache | PlanesCache, config: ModelConfig, num_tokens: int, seed: int = 0
) -> None:
    """Write entries up to `num_tokens` behind those that are there.

    Args:
        cache: of a model with this configuration.
        config: of the model.
        num_tokens: entries afterwards.
        seed: of the values, which are Gaussian.

    Raises:
        DoesNotFitError: beyond the capacity.
    """
    generator = np.random.default_rng(seed)
    half = config.head_dim // 2
    cos, sin = np.ones((num_tokens, half), np.float32), np.zeros((num_tokens, half), np.float32)
    while cache.num_tokens < num_tokens:
        begin = cache.num_tokens
        rows = min(_ROWS, num_tokens - begin)
        cache.require(rows)
        for layer in cache.layers:
            qkv = generator.standard_normal((rows, config.qkv_features), np.float32)
            layer.store(qkv, config.num_heads, begin, cos, sin)
        cache.advance(rows)
