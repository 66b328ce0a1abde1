"""Linear layers: the step before the product, bias, residual, bytes, and what an observer is told."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from taper.kernels import Planes, hadamard_block, pack_planes, padded_cols, rms_norm, rotate
from taper.layers.embedding import FloatEmbedding, PlanedEmbedding
from taper.layers.linear import Before, FloatLinear, Norm, PlanedLinear, Rotation, Swiglu

F32 = npt.NDArray[np.float32]
ROWS, FEATURES, BITS = 24, 96, 4
EPS = 1e-5


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def rotation(random: np.random.Generator) -> Rotation:
    signs = random.choice(np.array([-1, 1], dtype=np.float32), FEATURES)
    return Rotation(signs, hadamard_block(FEATURES))


@pytest.fixture
def planes(random: np.random.Generator) -> Planes:
    codes = random.integers(0, 2**BITS, (ROWS, FEATURES), dtype=np.uint8)
    values = {bits: np.linspace(-127, 127, 2**bits).astype(np.int8) for bits in (2, 3, 4)}
    scales = random.uniform(0.5, 1.5, (1, ROWS)).astype(np.float32)
    bias = random.standard_normal(ROWS).astype(np.float32)
    return Planes(pack_planes(codes, BITS), values, {2: 0.01, 3: 0.01, 4: 0.01}, scales, bias, FEATURES)


def input_of(before: Before, random: np.random.Generator) -> F32:
    width = 2 * FEATURES if isinstance(before, Swiglu) else FEATURES
    return random.standard_normal((3, width)).astype(np.float32)


def steps_before(random: np.random.Generator) -> list[Before]:
    gain = random.uniform(0.5, 1.5, FEATURES).astype(np.float32)
    return [None, Norm(EPS), Norm(EPS, gain), Swiglu()]


def exact_input(before: Before, x: F32) -> npt.NDArray[np.float64]:
    wide = x.astype(np.float64)
    if isinstance(before, Swiglu):
        gate, up = wide[:, :FEATURES], wide[:, FEATURES:]
        return gate / (1 + np.exp(-gate)) * up
    if isinstance(before, Norm):
        wide = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + before.eps)
        return wide if before.gain is None else wide * before.gain
    return wide


def test_observed_vector_gives_the_same_bytes_as_the_fused_call(
    planes: Planes, rotation: Rotation, random: np.random.Generator
) -> None:
    """Calibration sees exactly what the planes meet: norm or SwiGLU, gain, nothing of the rotation."""
    plain = PlanedLinear(planes, rotation)
    for before in steps_before(random):
        x = input_of(before, random)
        fused = PlanedLinear(planes, rotation, before)
        for bits in (2, 3, 4):
            np.testing.assert_array_equal(plain(fused.product_input(x), bits), fused(x, bits))


def test_product_input_is_the_named_function(random: np.random.Generator) -> None:
    weight = np.zeros((ROWS, FEATURES), dtype=np.float32)
    for before in steps_before(random):
        x = input_of(before, random)
        # A norm is a mean of 96 squares and three roundings, SwiGLU an exp of 6 terms: within 64 units.
        got = FloatLinear(weight, before=before).product_input(x)
        np.testing.assert_allclose(got, exact_input(before, x), rtol=64 * 2**-24, atol=1e-12)


def test_float_product_adds_bias_and_residual(random: np.random.Generator) -> None:
    weight = random.standard_normal((ROWS, FEATURES)).astype(np.float32)
    bias = random.standard_normal(ROWS).astype(np.float32)
    residual = random.standard_normal((3, ROWS)).astype(np.float32)
    x = input_of(None, random)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    # Sum of n products in any order: n roundings of at most 2**-24 of the sum of magnitudes each.
    bound = (FEATURES + 2) * 2**-24 * (np.abs(x) @ np.abs(weight.T) + np.abs(bias) + np.abs(residual))
    assert (np.abs(FloatLinear(weight)(x, 32) - exact) <= bound).all()
    got = FloatLinear(weight, bias)(x, 32, residual)
    assert (np.abs(got - (exact + bias + residual)) <= bound).all()


def test_float_product_leaves_its_arguments_alone(random: np.random.Generator) -> None:
    weight = random.standard_normal((FEATURES, FEATURES)).astype(np.float32)
    x = input_of(None, random)
    before = x.copy()
    FloatLinear(weight, weight[0].copy())(x, 32, x)
    np.testing.assert_array_equal(x, before)


def test_planed_residual_is_added_last(
    planes: Planes, rotation: Rotation, random: np.random.Generator
) -> None:
    x = input_of(None, random)
    residual = random.standard_normal((3, ROWS)).astype(np.float32)
    linear = PlanedLinear(planes, rotation)
    np.testing.assert_array_equal(linear(x, 3, residual), residual + linear(x, 3))


def test_bytes_read_grow_by_one_plane_a_bit(planes: Planes, rotation: Rotation) -> None:
    linear = PlanedLinear(planes, rotation)
    assert linear.bytes_read(4) - linear.bytes_read(2) == 2 * ROWS * padded_cols(FEATURES) // 8
    assert FloatLinear(np.zeros((ROWS, FEATURES), dtype=np.float32)).bytes_read(32) == ROWS * FEATURES * 4


def test_planed_embedding_turns_the_rows_of_all_planes_back(planes: Planes, rotation: Rotation) -> None:
    tokens = np.array([5, 0, 5, ROWS - 1], dtype=np.int32)
    embedding = PlanedEmbedding(planes, rotation)
    looked_up = embedding(tokens)
    np.testing.assert_array_equal(looked_up[0], looked_up[2])
    turned = rotate(looked_up, rotation.signs, rotation.block)
    stored = planes.rows(tokens, BITS)
    # There and back are 10 butterflies of a 32-wide block: at most 10 roundings of the row's norm.
    tolerance = 10 * 2**-24 * float(np.linalg.norm(stored, axis=1).max())
    np.testing.assert_allclose(turned, stored, rtol=0, atol=tolerance)
    # Beside the planes a float32 scale and a float32 bias.
    assert embedding.row_bytes() == BITS * padded_cols(FEATURES) // 8 + 8


def test_float_embedding_looks_rows_up(random: np.random.Generator) -> None:
    weight = random.standard_normal((ROWS, FEATURES)).astype(np.float32)
    embedding = FloatEmbedding(weight)
    tokens = np.array([3, 3, 0], dtype=np.int32)
    np.testing.assert_array_equal(embedding(tokens), weight[[3, 3, 0]])
    assert embedding.row_bytes() == FEATURES * 4


def test_norm_gain_reaches_the_planes(
    planes: Planes, rotation: Rotation, random: np.random.Generator
) -> None:
    gain = random.uniform(0.5, 1.5, FEATURES).astype(np.float32)
    x = input_of(None, random)
    with_gain = PlanedLinear(planes, rotation, Norm(EPS, gain))(x, 4)
    np.testing.assert_array_equal(with_gain, PlanedLinear(planes, rotation)(rms_norm(x, gain, EPS), 4))
    assert not np.array_equal(with_gain, PlanedLinear(planes, rotation, Norm(EPS))(x, 4))
