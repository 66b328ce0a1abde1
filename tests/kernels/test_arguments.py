"""Each argument that can never be right is refused with what was wrong, the value and the rule."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import rows, signs

from taper import kernels

X = rows(0, 2, 64)
PLANES = kernels.pack_planes(np.zeros((3, 64), np.uint8), 4)
VALUES = {b: np.zeros(2**b, np.int8) for b in (2, 3, 4)}
SCALES = dict.fromkeys(VALUES, 1.0)
ROW_SCALES = np.ones((1, 3), np.float32)
ACTIVATIONS = kernels.prepare(X, cols=64, signs=None, block=1)


def planes(**changes):
    parts = {
        "planes": PLANES,
        "values": VALUES,
        "level_scales": SCALES,
        "row_scales": ROW_SCALES,
        "bias": None,
        "in_features": 64,
    }
    return kernels.Planes(**(parts | changes))


def prepare(x=X, **changes):
    return kernels.prepare(x, **({"cols": 64, "signs": None, "block": 1} | changes))


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (X.astype(np.float64), TypeError, "x is float64, expected a NumPy array of float32"),
        (X.astype(">f4"), TypeError, "x is >f4, expected a NumPy array of float32"),
        ([[1.0]], TypeError, "x is list, expected a NumPy array of float32"),
        (X[0], ValueError, "x has 1 dimensions, expected 2"),
        (X[:, ::2], ValueError, "x is not C-contiguous"),
        (X.T, ValueError, "x is not C-contiguous"),
        (np.zeros((0, 64), np.float32), ValueError, r"rows, expected at least 1"),
    ],
)
def test_array(array, error, message):
    with pytest.raises(error, match=message):
        prepare(array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cols": 128}, "cols is 128, expected 64 for rows of 64"),
        ({"cols": 65}, "65 columns, expected a multiple of 64"),
        ({"magnitude_bits": 16}, "magnitude_bits is 16, expected 1..15"),
        ({"magnitude_bits": 0}, "magnitude_bits is 0, expected 1..15"),
        ({"signs": signs(0, 32)}, "signs has 32 elements, expected 64"),
        ({"signs": signs(0, 64), "block": 3}, "rotation block is 3, expected a power of two"),
        ({"signs": signs(0, 64), "block": 128}, "rotation block 128 does not divide 64 features"),
        ({"eps": 1e-5, "gain": np.ones(3, np.float32)}, "gain has 3 elements, expected 64"),
        ({"gain": np.ones(64, np.float32)}, "gain is given without eps"),
    ],
)
def test_prepare(changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(**changes)


def test_prepare_swiglu_of_an_odd_width():
    with pytest.raises(ValueError, match="gate_up has 3 columns, expected an even number"):
        kernels.prepare_swiglu(rows(0, 1, 3), cols=64, signs=None, block=1)


def test_swiglu_of_an_odd_width():
    with pytest.raises(ValueError, match="gate_up has 3 columns, expected an even number"):
        kernels.swiglu(rows(0, 1, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"planes": PLANES[:1]}, "values for 2..4 bits has 1 planes"),
        ({"planes": [*PLANES, PLANES[0]]}, "values for 2..4 bits has 5 planes"),
        (
            {"planes": [PLANES[0][:, :4].copy(), *PLANES[1:]]},
            r"a plane has shape \(3, 4\), expected \(3, 8\)",
        ),
        ({"values": {}, "level_scales": {}}, "needs the values of at least one width"),
        ({"values": {2: VALUES[2], 4: VALUES[4]}}, "values skip 3 bits"),
        ({"values": VALUES | {3: VALUES[2]}}, "values of 3 bits have 4 entries, expected 8"),
        (
            {"values": VALUES | {3: np.full(8, -128, np.int8)}},
            "values of 3 bits hold -128, outside -127..127",
        ),
        ({"values": VALUES | {3: np.full(8, 200, np.int16)}}, "values of 3 bits hold 200, outside -127..127"),
        (
            {"values": VALUES | {3: np.full((3, 8), -128, np.int8)}},
            "values of 3 bits hold -128, outside -127..127",
        ),
        ({"values": VALUES | {3: np.zeros((2, 8), np.int8)}}, r"expected 1, or int8 \(3, 2\^bits\)"),
        ({"values": VALUES | {3: np.zeros((3, 8), np.int16)}}, "values of int16 have 2 dimensions"),
        ({"values": VALUES | {3: np.zeros((3, 16), np.int8)[:, ::2]}}, "values is not C-contiguous"),
        ({"values": {0: np.zeros(1, np.int8)}}, "values are for 0 bits, the least width is 1"),
        ({"values": {9: np.zeros(512, np.int8)}}, "values are for 9 bits, the largest width is 8"),
        ({"level_scales": {2: 1.0, 3: 1.0}}, "level_scales lacks 4 bits"),
        ({"level_scales": SCALES | {5: 1.0}}, "level_scales has 4 widths, values have 3"),
        (
            {"row_scales": np.ones((2, 3), np.float32)},
            "row_scales has 2 rows, expected 1 or one for each of 3",
        ),
        ({"row_scales": np.ones((1, 2), np.float32)}, r"a plane has shape \(3, 8\), expected \(2, 8\)"),
        ({"bias": np.ones(4, np.float32)}, "bias has 4 elements, expected 3"),
        ({"in_features": 65}, r"a plane has shape \(3, 8\), expected \(3, 16\)"),
        ({"in_features": 0}, "in_features is 0|a plane has shape"),
    ],
)
def test_planes(changes, message):
    with pytest.raises(ValueError, match=message):
        planes(**changes)


@pytest.mark.parametrize("bits", [-1, 0, 1, 5])
def test_bits_outside_the_matrix(bits):
    with pytest.raises(ValueError, match=rf"bits {bits} is outside this matrix's 2\.\.4"):
        planes().matmul(ACTIVATIONS, bits)


def test_matmul_of_another_width():
    wide = kernels.prepare(rows(0, 1, 128), cols=128, signs=None, block=1)
    with pytest.raises(ValueError, match="activations have 128 columns, the matrix has 64"):
        planes().matmul(wide, 2)


def test_residual_of_another_shape():
    with pytest.raises(ValueError, match=r"residual has shape \(2, 4\), expected \(2, 3\)"):
        planes().matmul(ACTIVATIONS, 2, rows(0, 2, 4))


@pytest.mark.parametrize("index", [-1, 3])
def test_row_outside_the_matrix(index):
    with pytest.raises(ValueError, match=f"row {index} is outside the matrix's 3 rows"):
        planes().rows(np.array([0, index]), 4)


def test_rows_of_float_indices():
    with pytest.raises(TypeError, match="indices is float64, expected a NumPy array of int32 or int64"):
        planes().rows(np.array([0.0]), 4)


def test_code_that_does_not_fit():
    with pytest.raises(ValueError, match="code 8 does not fit 3 bits"):
        kernels.pack_planes(np.full((1, 4), 8, np.uint8), 3)


@pytest.mark.parametrize("parent_bits", [0, 9])
def test_parent_bits_out_of_range(parent_bits):
    with pytest.raises(ValueError, match=f"parent_bits is {parent_bits}, expected 1..8"):
        kernels.pack_planes(np.zeros((1, 4), np.uint8), parent_bits)


def test_unpacking_more_bits_than_planes():
    with pytest.raises(ValueError, match=r"bits is 5, expected 1\.\.4"):
        kernels.unpack_codes(PLANES, 5, 64)


@pytest.mark.parametrize("function", [kernels.padded_cols, kernels.hadamard_block])
def test_no_features(function):
    with pytest.raises(ValueError, match="features is 0, expected at least 1"):
        function(0)


def test_rotate_with_a_block_that_does_not_divide():
    with pytest.raises(ValueError, match="rotation block 32 does not divide 48 features"):
        kernels.rotate(rows(0, 1, 48), signs(0, 48), 32)


def attention_arguments(**changes):
    parts = {
        "qkv": rows(0, 2, 8 * 4),
        "heads": 4,
        "keys": np.zeros((2, 1, 4, 16), np.float32),
        "values": np.zeros((2, 16, 4), np.float32),
        "position": 3,
    }
    return parts | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"heads": 3}, ValueError, "heads is 3, expected a multiple of the 2 KV heads"),
        ({"heads": 0}, ValueError, "heads is 0, expected at least 1"),
        ({"heads": 6}, ValueError, "qkv has 32 columns, expected 40"),
        ({"position": -1}, ValueError, "position is -1, expected at least 0"),
        ({"position": 15}, ValueError, r"positions 15\.\.16 are outside a KV cache of 16"),
        (
            {"values": np.zeros((2, 9, 4), np.float32)},
            ValueError,
            "keys have 2 heads of 16 entries of 4 elements, values have 2 of 9 of 4",
        ),
        ({"keys": np.zeros((2, 2, 4, 8), np.float32)}, ValueError, "blocks of 8 entries, expected 16"),
        ({"values": np.zeros((2, 16, 4), np.float16)}, ValueError, "different dtypes"),
        (
            {"keys": np.zeros((2, 1, 4, 16))},
            TypeError,
            "keys is float64, expected a NumPy array of float16 or float32",
        ),
    ],
)
def test_attention(changes, error, message):
    with pytest.raises(error, match=message):
        kernels.attention(**attention_arguments(**changes), scale=1.0)


COS = np.zeros((20, 2), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cos": COS[:4]}, "cos and sin differ in shape"),
        ({"cos": COS[:4], "sin": COS[:4]}, "position 4 is outside RoPE tables of 4 rows"),
        ({"cos": np.zeros((20, 3), np.float32)}, "cos has 3 columns, expected 2"),
        ({"position": 15}, r"positions 15\.\.16 are outside a KV cache of 16"),
    ],
)
def test_rope_store(changes, message):
    with pytest.raises(ValueError, match=message):
        kernels.rope_store(**(attention_arguments(cos=COS, sin=COS) | changes))


def test_rope_store_into_read_only_keys():
    keys = np.zeros((2, 1, 4, 16), np.float32)
    keys.flags.writeable = False
    with pytest.raises(ValueError, match="keys is read-only, expected a writable array"):
        kernels.rope_store(**attention_arguments(keys=keys), cos=COS, sin=COS)


def test_rope_store_of_an_odd_head():
    keys, values = np.zeros((2, 1, 5, 16), np.float32), np.zeros((2, 16, 5), np.float32)
    with pytest.raises(ValueError, match="head_dim is 5, expected an even number"):
        kernels.rope_store(rows(0, 1, 40), 4, keys, values, 0, COS, COS)


def test_rope_tables_of_no_positions():
    with pytest.raises(ValueError, match="num_positions is 0, expected at least 1"):
        kernels.rope_tables(np.ones(2), 0)


def test_wide_value_beyond_its_parts():
    values = np.zeros(128, np.int16)
    values[-1] = 16320
    with pytest.raises(ValueError, match=r"values of 7 bits hold 16320, outside -16319\.\.16319"):
        kernels.Planes([PLANES[0]] * 7, {7: values}, {7: 1.0}, ROW_SCALES, None, 64)


@pytest.mark.parametrize(
    ("low", "low_sum", "message"),
    [
        (np.zeros((2, 64), np.int8), None, "low and low_sum come together"),
        (np.zeros((1, 64), np.int8), np.zeros(1, np.int32), r"low has shape \(1, 64\), expected \(2, 64\)"),
        (np.zeros((2, 64), np.int8), np.zeros(1, np.int32), "low_sum has 1 elements, expected 2"),
    ],
)
def test_low_parts(low, low_sum, message):
    with pytest.raises(ValueError, match=message):
        kernels.Activations(
            np.zeros((2, 64), np.int8), np.ones(2, np.float32), np.zeros(2, np.int32), low, low_sum
        )


def test_activations_of_different_lengths():
    with pytest.raises(ValueError, match="scale has 3 elements, expected 2"):
        kernels.Activations(np.zeros((2, 64), np.int8), np.ones(3, np.float32), np.zeros(2, np.int32))
