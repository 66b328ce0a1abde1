"""The sweep's simulation of the Anda format, and what the KV benchmarks count."""

from __future__ import annotations

import numpy as np
import pytest

kv_quality = pytest.importorskip("kv_quality")
kv_time = pytest.importorskip("kv_time")
sweep = pytest.importorskip("sweep")

from taper.formats.container import TaperFile  # noqa: E402
from taper.kernels import anda  # noqa: E402
from taper.models import Decoder  # noqa: E402
from taper.testing.tiny import tiny_taper  # noqa: E402


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return TaperFile.open(
        tiny_taper(tmp_path_factory.mktemp("sweep") / "tiny.taper", max_position_embeddings=512)
    )


@pytest.mark.parametrize("spread", [1e-6, 1e-3, 1.0, 300.0])
@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("group", [64, None])
def test_the_fast_form_is_the_format(spread, rounding, group):
    x = (np.random.default_rng(0).standard_normal((20, 192)) * spread).astype(np.float32)
    x[0] = 0
    for bits in (1, 3, 7, 11, 13):
        expected = anda.dequantize(anda.quantize(x, bits, group, rounding))
        np.testing.assert_array_equal(sweep.through_format(x, bits, group, rounding), expected)


def test_without_the_format_the_simulation_is_the_model(file):
    """Float activations over dequantised weights against the engine's 14 bits: the same but for rounding."""
    simulation = sweep.Simulation(file, 4)
    windows = np.random.default_rng(1).integers(2, 290, (3, 64)).astype(np.int32)
    engine = Decoder.from_taper(file, activations=sweep.ActivationBits(dict.fromkeys(sweep.TENSOR_TYPES, 14)))
    exact = simulation.nll(windows)
    for window, expected in zip(windows, exact, strict=True):
        logits = engine.forward(window, engine.new_cache(64), 4, "all")[32:-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert -scores[np.arange(31), window[33:]].mean() == pytest.approx(expected, abs=2e-3)
    simulation.bits = (2, 2, 2, 2)
    assert np.abs(simulation.nll(windows) - exact).max() > 1e-2


def test_bits_at_a_loss_are_interpolated_by_its_logarithm():
    losses = [(3, 0.1), (4, 0.01), (5, 0.001), (6, -0.001)]
    assert sweep.bits_at(losses, 0.01) == pytest.approx(4)
    assert sweep.bits_at(losses, 10**-2.5) == pytest.approx(4.5)
    assert sweep.bits_at(losses, 1.0) is None


def test_the_gains_range_comes_from_the_errors():
    def curve(rounding, error):
        return {
            "group": "64",
            "rounding": rounding,
            "loss": {m: (10.0 ** (shift(rounding) - m), error) for m in range(3, 8)},
        }

    def shift(rounding):
        return 2.0 if rounding == "nearest" else 3.0

    exact = [curve("nearest", 0.0), curve("truncate", 0.0)]
    assert sweep.gain_range(exact, 0.005) == pytest.approx((1.0, 1.0))
    low, high = sweep.gain_range([curve("nearest", 0.001), curve("truncate", 0.001)], 0.005)
    assert low < 1.0 < high
    assert sweep.gain_range(exact, 10.0) is None


def test_a_block_is_scored_whole_and_its_bytes_are_those_of_the_blocks(file):
    block = np.random.default_rng(2).integers(2, 290, 320).astype(np.int32)
    plain, planes = Decoder.from_taper(file, kv="float16"), Decoder.from_taper(file, kv="7")
    loss, held = kv_quality.read(plain, block, 4)
    logits = plain.forward(block, plain.new_cache(320), 4, "all")[:-1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert loss == pytest.approx(-scores[np.arange(319), block[1:]].mean())
    assert held == plain.new_cache(320).bytes_at(320)
    assert kv_quality.read(planes, block, 4)[1] == planes.new_cache(320).bytes_at(320)


def test_times_of_a_context_have_a_row_a_format(file):
    decoders = {kv: Decoder.from_taper(file, kv=kv) for kv in kv_time.FORMATS}
    rows = kv_time.measure(decoders, 70, 4, 2)
    assert [row["kv"] for row in rows] == [*kv_time.FORMATS]
    assert rows[0]["ratio"] == 1.0
    assert all(0 < row["attention_ms"] < row["step_ms"] for row in rows)
    assert rows[1]["bytes_read"] < rows[0]["bytes_read"]
