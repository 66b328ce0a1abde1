"""The bit-serial unit against plain products, and the engine's integer products against the unit."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import ISAS, rows

from taper import kernels
from taper.kernels import Planes, anda, anda_serial


@pytest.mark.parametrize("magnitude_bits", [1, 4, 7, 11, 16])
@pytest.mark.parametrize(("group_size", "n"), [(64, 200), (16, 48), (None, 100)])
def test_planes_one_by_one_give_the_product(magnitude_bits, group_size, n):
    values = anda.quantize(rows(1, 5, n), magnitude_bits, group_size)
    weights = np.random.default_rng(0).integers(-7, 8, (6, n))
    dots = anda_serial.serial_dots(values, weights)
    signed = np.where(values.negative, -1, 1) * values.magnitudes.astype(np.int64)
    size = values.group_size
    for g in range(dots.shape[2]):
        part = slice(g * size, (g + 1) * size)
        np.testing.assert_array_equal(dots[:, :, g], signed[:, part] @ weights[:, part].T)


def test_the_float_of_a_product_is_that_of_the_values():
    values = anda.quantize(rows(2, 4, 192), 7)
    weights = np.random.default_rng(0).integers(-7, 8, (5, 192))
    scales = np.random.default_rng(1).random((5, 3)).astype(np.float32)
    x, exact = anda.dequantize(values), np.zeros((4, 5), np.float32)
    for g, begin in enumerate(range(0, 192, 64)):
        part = slice(begin, begin + 64)
        exact += (x[:, part] @ weights[:, part].T.astype(np.float32)) * scales[:, g]
    np.testing.assert_allclose(
        anda_serial.serial_matmul(values, weights, scales, half=False), exact, rtol=1e-5
    )
    rounded = anda_serial.serial_matmul(values, weights, scales)
    assert rounded.astype(np.float16).astype(np.float32).tobytes() == rounded.tobytes()
    # Each group's sum is rounded to 11 bits, and the total once more.
    largest = max(np.abs(x[:, b : b + 64] @ weights[:, b : b + 64].T).max() for b in range(0, 192, 64))
    assert np.abs(rounded - exact).max() <= 2.0**-11 * (3 * largest + np.abs(exact).max() * 1.01)
    assert anda_serial.cycles(7, 3) == 24


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("magnitude_bits", [3, 7, 11, 14])
def test_the_engines_product_is_the_units_for_one_group_a_row(isa, magnitude_bits):
    """The engine's integers go into the unit as signs and magnitudes; what follows is its own arithmetic."""
    n, outputs, bits = 200, 9, 4
    rng = np.random.default_rng(magnitude_bits)
    with kernels.use_isa(isa):
        made = kernels.prepare(
            rows(3, 5, n), cols=kernels.padded_cols(n), signs=None, block=1, magnitude_bits=magnitude_bits
        )
        q = made.q.astype(np.int64)
        if made.low is not None:
            q = 256 * q + made.low
        codes = rng.integers(0, 2**bits, (outputs, n)).astype(np.uint8)
        table = np.sort(rng.integers(-127, 128, 2**bits)).astype(np.int8)
        scales = rng.random((1, outputs)).astype(np.float32)
        planes = Planes(
            planes=kernels.pack_planes(codes, bits), values={bits: table}, level_scales={bits: 0.01},
            row_scales=scales, bias=None, in_features=n,
        )  # fmt: skip
        found = planes.matmul(made, bits, None)
    values = anda.AndaValues(
        q[:, :n] < 0, np.abs(q[:, :n]).astype(np.uint16), np.ones((5, 1), np.uint8), magnitude_bits, n
    )
    weights = table[codes].astype(np.int64)
    acc = anda_serial.serial_dots(values, weights)[:, :, 0]
    alpha = made.scale * np.float32(0.01)
    expected = acc.astype(np.float32) * (scales * alpha[:, None])
    np.testing.assert_array_equal(found, expected)
