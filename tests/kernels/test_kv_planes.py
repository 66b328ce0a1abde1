"""The KV cache as planes: the native kernels against the NumPy oracle, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ISAS, assert_same_bits, rows, seeds, thread_counts, threads

from taper import kernels
from taper.kernels import PlanesBlocks, PlanesLayout, anda, kv_planes, oracle

BLOCK = kv_planes.BLOCK_ENTRIES
FAR = 1 << 40


class Cache:
    """Blocks of one sequence on arrays, and the same through the oracle."""

    def __init__(self, stored, heads, dim, num_blocks, read, window=FAR, seed=0):
        self.shape, self.stored = (len(stored), heads, dim), stored
        self.layout = PlanesLayout(heads, dim, stored)
        rng = np.random.default_rng(seed)
        # Whatever earlier entries left there must not matter.
        self.upper = rng.integers(0, 256, (num_blocks, self.layout.upper_bytes), np.uint8)
        self.lower = None
        if self.layout.lower_bytes:
            self.lower = rng.integers(0, 256, (num_blocks, self.layout.lower_bytes), np.uint8)
        self.read, self.window = np.array(read, np.uint8), window
        # Blocks lie in the pool in another order than in the sequence.
        self.table = np.stack([np.arange(num_blocks)[::-1]] * 2).astype(np.int32)
        self.native = PlanesBlocks(self.layout, self.upper, self.lower, self.table, self.read, window)

    def view(self, layer, block):
        index = self.table[0, block]
        lower = None if self.lower is None else self.lower[index]
        return kv_planes.BlockView(self.stored, self.shape, layer, self.upper[index], lower)

    def store(self, qkv, num_heads, layer, position, cos, sin):
        """The oracle's store; qkv is rotated in place."""
        tokens, heads, dim = len(qkv), *self.shape[1:]
        keys = np.zeros((heads, -(-(position + tokens) // 16), dim, 16), np.float32)
        values = np.zeros((heads, keys.shape[1] * 16, dim), np.float32)
        oracle.rope_store(qkv, num_heads, keys, values, position, cos, sin)
        parts = qkv.reshape(tokens, -1, dim)
        parts[:, : num_heads + heads] = kv_planes.rotated(parts[:, : num_heads + heads])
        for t in range(tokens):
            view = self.view(layer, (position + t) // BLOCK)
            for side in range(2):
                for head in range(heads):
                    row = parts[t, num_heads + side * heads + head]
                    view.write(side, head, (position + t) % BLOCK, row)

    def attention(self, qkv, num_heads, layer, position, scale):
        heads, dim = self.shape[1:]
        parts = qkv.reshape(len(qkv), -1, dim)
        out = np.zeros((len(qkv), num_heads, dim), np.float32)
        for t in range(len(qkv)):
            seen = position + t + 1
            for h in range(num_heads):
                state = None
                for begin in range(0, seen, oracle.ATTENTION_CHUNK):
                    count = min(oracle.ATTENTION_CHUNK, seen - begin)
                    sides = [
                        [self._read(layer, block, side, h * heads // num_heads, position + t) for block in
                         range(begin // BLOCK, -(-(begin + count) // BLOCK))]
                        for side in range(2)
                    ]  # fmt: skip
                    chunk = kv_planes.attend(parts[t, h], *sides, count, scale)
                    state = chunk if state is None else oracle.merged(state, chunk)
                out[t, h] = state[2] * (np.float32(1) / state[1])
        return out.reshape(len(qkv), -1)

    def _read(self, layer, block, side, head, position):
        old = position - (block * BLOCK + BLOCK - 1) >= self.window
        bits = int(self.read[layer, 2 * old + side])
        return self.view(layer, block).read(side, head, self.shape[2], bits)


@settings(max_examples=25, deadline=None)
@given(
    seeds,
    st.sampled_from([16, 32, 48, 64, 80, 96, 128]),
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 3),
    thread_counts,
)
def test_store_and_attention_are_the_oracle(seed, dim, key_bits, value_bits, group, num_threads):
    rng = np.random.default_rng(seed)
    heads, tokens, position = 2, int(rng.integers(1, 6)), int(rng.integers(0, 300))
    key_upper, value_upper = int(rng.integers(1, key_bits + 1)), int(rng.integers(1, value_bits + 1))
    recent = [int(rng.integers(1, key_bits + 1)), int(rng.integers(1, value_bits + 1))]
    old = [int(rng.integers(1, key_bits + 1)), int(rng.integers(1, value_bits + 1))]
    num_blocks = -(-(position + tokens) // BLOCK)
    make = lambda: Cache(  # noqa: E731
        [(3, 3, 2, 1), (key_bits, key_upper, value_bits, value_upper)],
        heads, dim, num_blocks, [[1, 1, 1, 1], recent + old], int(rng.integers(1, 200)), seed,
    )  # fmt: skip
    state = rng.bit_generator.state
    expected = make()
    width = (group + 2) * heads * dim
    x = rows(seed, position + tokens, width, spread=10.0 ** rng.integers(-2, 3))
    angles = rng.standard_normal((position + tokens, dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, last = x[:position], x[position:]
    wanted = [part.copy() for part in (first, last)]
    if position:
        expected.store(wanted[0], group * heads, 1, 0, cos, sin)
    expected.store(wanted[1], group * heads, 1, position, cos, sin)
    out = expected.attention(wanted[1], group * heads, 1, position, 0.3)
    for isa in ISAS:
        rng.bit_generator.state = state
        found = make()
        got = [part.copy() for part in (first, last)]
        with kernels.use_isa(isa), threads(num_threads):
            if position:
                kernels.planes_rope_store(got[0], group * heads, found.native, 1, 0, cos, sin)
            kernels.planes_rope_store(got[1], group * heads, found.native, 1, position, cos, sin)
            mixed = kernels.planes_attention(got[1], group * heads, found.native, 1, position, 0.3)
        assert_same_bits(got[1], wanted[1])
        np.testing.assert_array_equal(found.upper, expected.upper)
        if expected.lower is not None:
            np.testing.assert_array_equal(found.lower, expected.lower)
        assert_same_bits(mixed, out)


def test_a_value_costs_exactly_the_bits_of_the_format():
    layout = PlanesLayout(4, 64, [(7, 7, 7, 7)] * 22)
    assert layout.upper_bytes * 8 == BLOCK * 22 * 2 * 4 * 64 * anda.bits_per_value(7)
    assert 16 / anda.bits_per_value(7) > 1.98
    windowed = PlanesLayout(4, 64, [(7, 4, 7, 4)] * 22)
    assert windowed.upper_bytes * 8 == BLOCK * 22 * 2 * 4 * 64 * anda.bits_per_value(4)
    assert windowed.lower_bytes * 8 == BLOCK * 22 * 2 * 4 * 64 * 3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e6])
@pytest.mark.parametrize("side", ["key", "value"])
def test_what_is_not_finite_reaches_the_result(isa, bad, side):
    cache = Cache([(7, 4, 7, 4)], 1, 16, 1, [[7, 7, 4, 4]])
    qkv = rows(1, 5, 3 * 16)
    qkv[2, 20 if side == "key" else 40] = bad
    ones, zeros = np.ones((5, 8), np.float32), np.zeros((5, 8), np.float32)
    with kernels.use_isa(isa):
        kernels.planes_rope_store(qkv, 1, cache.native, 0, 0, ones, zeros)
        out = kernels.planes_attention(qkv, 1, cache.native, 0, 0, 1.0)
    assert np.isfinite(out[:2]).all()
    assert np.isnan(out[2:]).any(axis=1).all()


@pytest.mark.parametrize(
    ("heads", "dim", "layers", "message"),
    [
        (2, 8, [(7, 7, 7, 7)], "head_dim is 8"),
        (2, 272, [(7, 7, 7, 7)], "head_dim is 272"),
        (2, 16, [(8, 7, 7, 7)], "keys have 8 magnitude bits"),
        (2, 16, [(7, 7, 4, 5)], "values have 5 of 4 bits in the upper part"),
        (2, 16, [], "at least one layer"),
        (0, 16, [(7, 7, 7, 7)], "kv_heads is 0"),
    ],
)
def test_layouts_that_planes_cannot_hold_are_refused(heads, dim, layers, message):
    with pytest.raises(ValueError, match=message):
        PlanesLayout(heads, dim, layers)


def test_blocks_outside_the_pool_and_planes_that_are_gone_are_refused():
    cache = Cache([(7, 4, 7, 4)], 1, 16, 4, [[7, 7, 4, 4]], window=64)
    qkv, ones = rows(1, 1, 48), np.ones((256, 8), np.float32)
    attend = lambda position: kernels.planes_attention(qkv, 1, cache.native, 0, position, 1.0)  # noqa: E731
    cache.table[1, 0] = -1
    attend(127)  # block 0 is old: position - 63 >= 64
    with pytest.raises(ValueError, match="block 0 has given up its lower planes, which position 126 reads"):
        attend(126)
    with pytest.raises(ValueError, match="block 0 has given up"):
        kernels.planes_rope_store(qkv, 1, cache.native, 0, 5, ones, ones)
    cache.table[0, 1] = 4
    with pytest.raises(ValueError, match="part 4 is outside a pool of 4"):
        attend(100)
    cache.table[0, 1] = -1
    with pytest.raises(ValueError, match="block 1 of the KV cache has no memory"):
        attend(100)
    with pytest.raises(ValueError, match="position 256 is outside a KV cache of 256"):
        attend(256)
    with pytest.raises(ValueError, match=r"layer is 1, expected 0\.\.0"):
        kernels.planes_attention(qkv, 1, cache.native, 1, 3, 1.0)


def test_readings_beyond_what_is_stored_are_refused():
    cache = Cache([(5, 5, 4, 4)], 1, 16, 1, [[6, 4, 4, 4]])
    with pytest.raises(ValueError, match=r"keys of layer 0 are read at 6 bits, expected 1\.\.5"):
        kernels.planes_attention(rows(1, 1, 48), 1, cache.native, 0, 3, 1.0)


@pytest.mark.parametrize("window", [1, 63, 64, 100])
def test_a_block_is_old_from_exactly_the_window_on(window):
    """Tokens of one call on both sides of where the first block becomes old."""
    stored, read = [(7, 4, 6, 3)], [[7, 5, 4, 2]]
    last = BLOCK - 1 + window  # the first position that sees it as old
    make = lambda: Cache(stored, 1, 32, -(-(last + 2) // BLOCK), read, window)  # noqa: E731
    expected, found = make(), make()
    qkv = rows(window, last + 2, 4 * 32)
    angles = np.random.default_rng(window).standard_normal((last + 2, 16))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    wanted = qkv.copy()
    expected.store(wanted, 2, 0, 0, cos, sin)
    kernels.planes_rope_store(qkv, 2, found.native, 0, 0, cos, sin)
    tail = slice(last - 1, last + 2)
    out = expected.attention(wanted[tail], 2, 0, last - 1, 0.3)
    for isa in ISAS:
        with kernels.use_isa(isa):
            assert_same_bits(kernels.planes_attention(qkv[tail], 2, found.native, 0, last - 1, 0.3), out)
