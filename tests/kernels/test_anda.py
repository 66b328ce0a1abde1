"""The Anda format against its definition in Python integers, over every 16-bit float."""

from __future__ import annotations

import functools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from taper.kernels import anda, oracle

PATTERNS = np.arange(2**16, dtype=np.uint16)
EXPONENT_FIELD = PATTERNS >> 10 & 31
FINITE = PATTERNS[EXPONENT_FIELD < 31]
ALL_BITS = range(1, 17)
ROUNDINGS = ("nearest", "truncate")


def parts(pattern: int) -> tuple[int, int]:
    """Exponent and significand of a finite float16, whose magnitude is significand * 2^(exponent - 25)."""
    exponent, fraction = pattern >> 10 & 31, pattern & 1023
    return (exponent, 1024 + fraction) if exponent else (1, fraction)


@functools.cache
def magnitude(significand: int, shift: int, rounding: str) -> int:
    """significand / 2^shift, rounded, in integers."""
    if shift <= 0:
        return significand << -shift
    if rounding == "truncate":
        return significand >> shift
    whole, rest = divmod(significand, 1 << shift)
    half = 1 << (shift - 1)
    return whole + (rest > half or (rest == half and whole % 2 == 1))


@functools.cache
def table(rounding: str, magnitude_bits: int) -> np.ndarray:
    """m of every significand (2,048) at every distance 0..29 below the group's exponent."""
    most = 2**magnitude_bits - 1
    rows = [
        [min(magnitude(sig, 11 - magnitude_bits + distance, rounding), most) for sig in range(2048)]
        for distance in range(30)
    ]
    return np.array(rows)


def value_of(x: np.floating) -> Fraction:
    return Fraction(*x.item().as_integer_ratio())


def of_group(group: list[Fraction], magnitude_bits: int, rounding: str) -> tuple[int, list[int]]:
    """Exponent and magnitudes of a group of exact values, straight from the definition."""

    def exponent(x: Fraction) -> int:
        e = 1
        while abs(x) >= Fraction(2) ** (e + 1 - 15):
            e += 1
        return e

    shared = max(map(exponent, group))
    unit = Fraction(2) ** (shared - 15 - (magnitude_bits - 1))
    rounded = [round(abs(x) / unit) if rounding == "nearest" else abs(x) // unit for x in group]
    return shared, [min(int(m), 2**magnitude_bits - 1) for m in rounded]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("magnitude_bits", ALL_BITS)
def test_every_float16_under_every_shared_exponent(magnitude_bits: int, rounding: str) -> None:
    exponents, significands = np.array([parts(int(p)) for p in FINITE]).T
    expected = table(rounding, magnitude_bits)
    for shared in range(1, 31):
        below = exponents <= shared
        values = anda.quantize(FINITE[below].view(np.float16)[None], magnitude_bits, None, rounding)
        assert values.exponents.tolist() == [[shared]]
        np.testing.assert_array_equal(values.negative[0], FINITE[below] >> 15 == 1)
        got = values.magnitudes[0]
        np.testing.assert_array_equal(got, expected[shared - exponents[below], significands[below]])


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_float16_alone_has_its_own_exponent_and_returns_from_eleven_bits(rounding: str) -> None:
    x = FINITE.view(np.float16)[:, None]
    for magnitude_bits in range(11, 17):
        values = anda.quantize(x, magnitude_bits, 1, rounding)
        assert values.exponents[:, 0].tolist() == [parts(int(p))[0] for p in FINITE]
        assert anda.dequantize(values, np.float16).tobytes() == x.tobytes()
        assert anda.dequantize(values).tobytes() == x.astype(np.float32).tobytes()


def test_not_one_infinity_or_nan_passes() -> None:
    refused = 0
    for pattern in PATTERNS[EXPONENT_FIELD == 31]:
        with pytest.raises(ValueError, match="finite"):
            anda.quantize(np.array([[pattern]]).view(np.float16), 7)
        refused += 1
    assert refused == 2048


@pytest.mark.parametrize("x", [65504.01, -65536, 1e30, np.inf, np.nan])
def test_float32_beyond_float16_is_refused(x: float) -> None:
    with pytest.raises(ValueError, match="65504"):
        anda.quantize(np.array([[x]], np.float32), 7)


# Ties, the edges of exponents, float32's own subnormals, the largest value, negative zero.
EDGES = [
    0.0,
    -0.0,
    1.5,
    2.5,
    -3.5,
    1.9999999,
    2.0,
    65504.0,
    -65503.996,
    6.1035156e-05,
    6.1035153e-05,
    2.98e-08,
    1e-45,
]
floats = st.one_of(
    st.sampled_from(EDGES),
    st.floats(-65504, 65504, width=32),
    st.floats(-4, 4, width=16),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(floats, min_size=1, max_size=40),
    st.integers(1, 16),
    st.sampled_from([1, 2, 8, 16, 64, None]),
    st.sampled_from(ROUNDINGS),
)
@example([1.5, 0.5], 1, None, "nearest")
@example([127.5, 0.5, 1.5], 7, None, "nearest")
def test_float32_groups_follow_the_definition(
    row: list[float], magnitude_bits: int, group_size: int | None, rounding: str
) -> None:
    x = np.array([row, row[::-1]], np.float32)
    values = anda.quantize(x, magnitude_bits, group_size, rounding)
    size = group_size or len(row)
    back = anda.dequantize(values)
    for t in range(2):
        for g, begin in enumerate(range(0, len(row), size)):
            span = slice(begin, begin + size)
            shared, magnitudes = of_group([value_of(v) for v in x[t, span]], magnitude_bits, rounding)
            assert values.exponents[t, g] == shared
            assert values.magnitudes[t, span].tolist() == magnitudes
            unit = Fraction(2) ** (shared - 15 - (magnitude_bits - 1))
            assert [value_of(abs(v)) for v in back[t, span]] == [m * unit for m in magnitudes]
    assert np.signbit(back).tolist() == np.signbit(x).tolist() == values.negative.tolist()


def serial_planes(group: list[int], magnitude_bits: int) -> list[list[int]]:
    """The paper's compressor, one bit of each value a cycle: the most significant plane first."""
    fields = [parts(p) for p in group]
    shared = max(e for e, _ in fields)
    registers = [sig for _, sig in fields]
    delays = [shared - e for e, _ in fields]
    planes = []
    for _ in range(magnitude_bits):
        plane = []
        for i in range(len(group)):
            if delays[i]:
                delays[i] -= 1
                plane.append(0)
            else:
                plane.append(registers[i] >> 10 & 1)
                registers[i] = registers[i] << 1 & 2047
        planes.append(plane)
    return planes


def word(bits: list[int]) -> int:
    return sum(bit << i for i, bit in enumerate(bits))


@pytest.mark.parametrize("magnitude_bits", [1, 4, 7, 11, 16])
def test_planes_are_what_the_serial_compressor_emits(magnitude_bits: int) -> None:
    rng = np.random.default_rng(magnitude_bits)
    # 3 rows of 6 groups are 18 words: one full address of 16 and 2 of the next.
    x = (rng.standard_normal((3, 384)) * 10.0 ** rng.integers(-6, 3, (3, 384))).astype(np.float16)
    planes = anda.pack(anda.quantize(x, magnitude_bits, rounding="truncate"))
    assert planes.words.shape == (2, magnitude_bits + 1, 16)
    groups = x.view(np.uint16).reshape(18, 64).tolist()
    stream = 0
    for i, group in enumerate(groups):
        block, lane = divmod(i, 16)
        expected = [[p >> 15 for p in group], *serial_planes(group, magnitude_bits)]
        assert planes.words[block, :, lane].tolist() == [word(bits) for bits in expected]
        stream |= max(parts(p)[0] for p in group) << 5 * i
    assert not planes.words[1, :, 2:].any()
    assert planes.exponents.tobytes() == stream.to_bytes(20, "little")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 200),
    st.integers(1, 16),
    st.sampled_from([1, 4, 32, 64, 128, None]),
    st.integers(0, 2**32 - 1),
)
def test_packing_loses_nothing(
    num_rows: int, num_values: int, magnitude_bits: int, group_size: int | None, seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((num_rows, num_values)).astype(np.float32)
    values = anda.quantize(x, magnitude_bits, group_size)
    assert_same(anda.unpack(anda.pack(values)), values)


@pytest.mark.parametrize("fewer", range(1, 8))
def test_fewer_bits_are_read_without_the_other_planes(fewer: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 640)).astype(np.float32)
    values = anda.quantize(x, 7, rounding="truncate")
    planes = anda.pack(values)
    planes.words[:, fewer + 1 :] = 2**64 - 1  # poison every plane the reader must not touch
    assert_same(anda.unpack(planes, fewer), values.first_bits(fewer))
    # Truncated planes are nested: the first bits are what fewer bits would have been from the start.
    assert_same(values.first_bits(fewer), anda.quantize(x, fewer, rounding="truncate"))


def assert_same(got: anda.AndaValues, expected: anda.AndaValues) -> None:
    assert (got.magnitude_bits, got.group_size) == (expected.magnitude_bits, expected.group_size)
    for name in ("negative", "magnitudes", "exponents"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), strict=True)


@pytest.mark.parametrize(("magnitude_bits", "ratio"), [(7, 1.98), (5, 2.63), (4, 3.15)])
def test_stored_bits(magnitude_bits: int, ratio: float) -> None:
    planes = anda.pack(anda.quantize(np.ones((16, 256), np.float32), magnitude_bits))
    bits = 8 * planes.num_bytes / (16 * 256)
    assert bits == anda.bits_per_value(magnitude_bits) == magnitude_bits + 1 + 5 / 64
    assert round(16 / bits, 2) == ratio


@pytest.mark.parametrize("magnitude_bits", [4, 7, 11, 14])
def test_a_whole_row_is_the_engines_activations_unless_its_largest_value_rounds_up(
    magnitude_bits: int,
) -> None:
    x = np.random.default_rng(1).standard_normal((200, 96)).astype(np.float32)
    values = anda.quantize(x, magnitude_bits, None)
    got = np.where(values.negative, -1, 1) * values.magnitudes.astype(np.int64)
    engine = oracle.quantize(x, 96, magnitude_bits)
    same = engine.scale == np.ldexp(1.0, values.exponents[:, 0].astype(int) - 14 - magnitude_bits)
    assert same.mean() > 0.8
    np.testing.assert_array_equal(got[same], oracle.integers(engine)[same])
    assert (np.abs(got[~same]).max(axis=1, initial=0) == 2**magnitude_bits - 1).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.ones((1, 4))}, TypeError, "x is float64, expected float16 or float32"),
        ({"x": np.ones(4, np.float32)}, ValueError, r"shape \(4,\)"),
        ({"x": np.ones((1, 0), np.float32)}, ValueError, "n at least 1"),
        ({"magnitude_bits": 0}, ValueError, "magnitude_bits is 0, expected 1..16"),
        ({"magnitude_bits": 17}, ValueError, "magnitude_bits is 17"),
        ({"group_size": 48}, ValueError, "group_size is 48, expected a power of two"),
        ({"group_size": 0}, ValueError, "group_size is 0"),
        ({"rounding": "up"}, ValueError, "'up', expected one of nearest, truncate"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "x": np.ones((1, 4), np.float32),
        "magnitude_bits": 7,
        "group_size": 64,
        "rounding": "nearest",
    }
    with pytest.raises(error, match=message):
        anda.quantize(**(arguments | changes))


def test_bad_readings() -> None:
    values = anda.quantize(np.ones((1, 64), np.float32), 5)
    with pytest.raises(TypeError, match="dtype is int32"):
        anda.dequantize(values, np.int32)
    for bits in (0, 6):
        with pytest.raises(ValueError, match=rf"magnitude_bits is {bits}, expected 1..5"):
            values.first_bits(bits)
        with pytest.raises(ValueError, match=rf"magnitude_bits is {bits}, expected 1..5"):
            anda.unpack(anda.pack(values), bits)
