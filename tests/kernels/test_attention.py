"""RoPE, the KV cache and attention of every instruction set against the NumPy oracle, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ISAS, assert_same_bits, rows, seeds, thread_counts, threads
from numpy.typing import NDArray

from taper import kernels
from taper.kernels import oracle

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# (query heads, KV heads): multi-head, grouped with and without a remainder of four, multi-query.
HEADS = [(1, 1), (4, 4), (8, 2), (9, 3), (6, 2), (7, 1), (32, 4)]
DTYPES = [np.float16, np.float32]


def in_blocks(keys: NDArray[Any]) -> NDArray[Any]:
    """Keys (kv_heads, rows, dim) as the cache holds them: sixteen entries side by side."""
    kv_heads, num_rows, dim = keys.shape
    return np.ascontiguousarray(keys.reshape(kv_heads, num_rows // 16, 16, dim).transpose(0, 1, 3, 2))


def in_rows(keys: NDArray[Any]) -> NDArray[Any]:
    """The inverse of `in_blocks`."""
    kv_heads, blocks, dim, _ = keys.shape
    return keys.transpose(0, 1, 3, 2).reshape(kv_heads, 16 * blocks, dim)


@dataclass
class Case:
    """Tokens of one layer before RoPE, and a cache that holds the entries before them."""

    heads: int
    qkv: NDArray[np.float32]
    keys: NDArray[Any]
    values: NDArray[Any]
    position: int
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]

    @classmethod
    def random(
        cls, seed: int, heads: tuple[int, int], dim: int, tokens: int, position: int, dtype: Any
    ) -> Case:
        num_heads, kv_heads = heads
        capacity = -(-(position + tokens + 3) // 16) * 16
        cache = rows(seed + 1, 2 * kv_heads * capacity, dim).reshape(2, kv_heads, capacity, dim)
        cache[:, :, position:] = np.nan  # entries that are not there yet
        cos, sin = kernels.rope_tables(10000.0 ** -(np.arange(dim // 2) / max(dim // 2, 1)), capacity)
        qkv = rows(seed, tokens, (num_heads + 2 * kv_heads) * dim, 3.0)
        keys, values = in_blocks(cache[0].astype(dtype)), np.ascontiguousarray(cache[1], dtype)
        return cls(num_heads, qkv, keys, values, position, cos, sin)

    def run(self, library: Any) -> list[NDArray[Any]]:
        qkv, keys, values = self.qkv.copy(), self.keys.copy(), self.values.copy()
        library.rope_store(qkv, self.heads, keys, values, self.position, self.cos, self.sin)
        scale = self.values.shape[2] ** -0.5
        out = library.attention(qkv, self.heads, keys, values, self.position, scale)
        return [qkv, keys, values, out]


@settings(max_examples=40, deadline=None)
@given(
    seeds,
    st.sampled_from(HEADS),
    st.sampled_from([2, 6, 16, 20, 32, 64, 80, 96, 128]),
    st.integers(1, 3),
    st.integers(0, 40) | st.sampled_from([254, 255, 256, 300, 511, 600]),
    st.sampled_from(DTYPES),
    thread_counts,
)
def test_rope_store_and_attention(seed, heads, dim, tokens, position, dtype, num_threads):
    case = Case.random(seed, heads, dim, tokens, position, dtype)
    expected = case.run(oracle)
    with threads(num_threads):
        for isa in ISAS:
            with kernels.use_isa(isa):
                for got, wanted in zip(case.run(kernels), expected, strict=True):
                    assert_same_bits(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "tokens"), [((32, 4), 5), ((9, 3), 1), ((20, 1), 1), ((8, 8), 1), ((6, 2), 40)]
)
def test_long_sequence_agrees_across_instruction_sets_and_threads(dtype, heads, tokens):
    """Long enough that the work is shared: by chunks where tokens are few, else by tiles of tokens."""
    case = Case.random(1, heads, 64, tokens, 1000, dtype)
    with kernels.use_isa("reference"):
        expected = case.run(kernels)
    for isa in ISAS:
        for num_threads in (1, 2, 3):
            with kernels.use_isa(isa), threads(num_threads):
                for got, wanted in zip(case.run(kernels), expected, strict=True):
                    assert_same_bits(got, wanted)


@pytest.mark.parametrize("isa", ISAS)
def test_tokens_together_equal_tokens_one_by_one(isa):
    case = Case.random(2, (9, 3), 64, 20, 500, np.float16)  # from the second into the third chunk
    with kernels.use_isa(isa):
        together = case.run(kernels)[3]
        keys, values = case.keys.copy(), case.values.copy()
        for t in range(20):
            alone = Case(
                case.heads, case.qkv[t : t + 1].copy(), keys, values, case.position + t, case.cos, case.sin
            )
            kernels.rope_store(alone.qkv, 9, keys, values, alone.position, case.cos, case.sin)
            got = kernels.attention(alone.qkv, 9, keys, values, alone.position, 64**-0.5)
            assert_same_bits(got[0], together[t])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e5, 1e-6])
def test_extreme_keys_and_values(isa, dtype, poison):
    """Infinities, NaN, halves that overflow and halves that are subnormal."""
    case = Case.random(3, (4, 2), 16, 3, 17, dtype)
    case.qkv[1, 4 * 16 + 3] = poison  # a key
    case.qkv[2, -1] = poison  # a value
    case.qkv[0, 2] = poison  # a query
    expected = case.run(oracle)
    with kernels.use_isa(isa):
        for got, wanted in zip(case.run(kernels), expected, strict=True):
            assert_same_bits(got, wanted)


@pytest.mark.parametrize("isa", ISAS)
def test_every_half_is_read_right(isa):
    """One entry has the weight 1, so attention hands its value back."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(1024, 1, 64)
    qkv = np.zeros((1, 3 * 64), np.float32)
    keys, values = np.zeros((1, 1, 64, 16), np.float16), np.zeros((1, 16, 64), np.float16)
    with kernels.use_isa(isa):
        for value in halves[::7]:
            values[0, 0] = value
            got = kernels.attention(qkv, 1, keys, values, 0, 1.0)
            assert_same_bits(np.where(got == 0, 0, got), np.where(value == 0, 0, value).astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=50, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=64, max_size=64))
def test_every_value_is_stored_as_the_nearest_half(isa, bits):
    value = np.array(bits, np.uint32).view(np.float32)
    qkv = np.zeros((1, 3 * 64), np.float32)
    qkv[0, 128:] = value
    keys, values = np.zeros((1, 1, 64, 16), np.float16), np.zeros((1, 16, 64), np.float16)
    ones, zeros = np.ones((1, 32), np.float32), np.zeros((1, 32), np.float32)
    with kernels.use_isa(isa):
        kernels.rope_store(qkv, 1, keys, values, 0, ones, zeros)
    with np.errstate(over="ignore"):
        assert_same_bits(values[0, 0], value.astype(np.float16))


def test_attention_against_plain_mathematics():
    case = Case.random(4, (8, 2), 32, 2, 30, np.float32)
    _, keys, values, got = case.run(kernels)
    qkv = case.qkv.copy()
    kernels.rope_store(qkv, 8, keys, values, 30, case.cos, case.sin)
    for t in range(2):
        for h in range(8):
            k, v = (x[h // 4, : 31 + t].astype(np.float64) for x in (in_rows(keys), values))
            scores = k @ qkv[t, h * 32 : (h + 1) * 32] * 32**-0.5
            weights = np.exp(scores - scores.max())
            exact = weights @ v / weights.sum()
            # Errors of a score of size 20 reach the weights as 20 * 2**-23; values are of size 3.
            np.testing.assert_allclose(got[t, h * 32 : (h + 1) * 32], exact, atol=3 * 32 * 20 * 2.0**-23)


@pytest.mark.parametrize("attention_factor", [1.0, 1.25])
def test_rope_tables(attention_factor):
    inv_freq = 500000.0 ** -(np.arange(32) / 32)
    got = kernels.rope_tables(inv_freq, 3000, attention_factor)
    for table, expected in zip(got, oracle.rope_tables(inv_freq, 3000, attention_factor), strict=True):
        assert_same_bits(table, expected)


def test_rope_rows_follow_the_position():
    case = Case.random(5, (1, 1), 4, 1, 6, np.float32)
    x = case.qkv[0, :4].astype(np.float64)
    angle = 6 * 10000.0 ** -(np.arange(2) / 2)
    expected = np.concatenate(
        [x[:2] * np.cos(angle) - x[2:] * np.sin(angle), x[:2] * np.sin(angle) + x[2:] * np.cos(angle)]
    )
    np.testing.assert_allclose(case.run(kernels)[0][0, :4], expected, atol=4 * 2.0**-24 * np.abs(x).max())
