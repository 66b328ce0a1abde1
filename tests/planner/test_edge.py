"""The edge node's costs by hand, and its epochs: who is served, who is late, who leaves."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, exp, log2

import numpy as np
import pytest

from taper.errors import UsageError
from taper.planner.dftsp import Problem
from taper.planner.edge import (
    BAND,
    MODELS,
    QUANTIZERS,
    EdgeCell,
    EdgeModel,
    EdgeNode,
    EdgeRequest,
    path_gain_db,
)
from taper.planner.epochs import (
    BATCHINGS,
    brute_force_batching,
    draw_requests,
    no_batching,
    optimal_batching,
    run_epochs,
    static_batching,
)

BLOOM, HALF = MODELS["bloom-3b"], QUANTIZERS["gptq-w8a16"]
CELL = EdgeCell(BLOOM, HALF)
# One layer of width 1 at 1000 FLOP/s, slots of a second: numbers that fit on a page.
TINY = EdgeModel("tiny", layers=1, width=1, ffn=1)
WHOLE = replace(QUANTIZERS["w16a16"], perplexity_increase={"tiny": 0.0})
TINY_NODE = EdgeNode(flops=1e3, memory_bytes=1e3, uplink_s=1.0, downlink_s=1.0, padded_prompt=4)
TINY_CELL = EdgeCell(TINY, WHOLE, TINY_NODE)


def request(arrival_s: float = 0.0, output: int = 3, latency_s: float = 10.0) -> EdgeRequest:
    return EdgeRequest(arrival_s, 2, output, latency_s, 0.5, 100.0)


def test_figures_of_the_specification() -> None:
    assert BLOOM.weight_bytes == pytest.approx(4.72e9, rel=1e-3)
    assert BLOOM.prefill_flops(512) / EdgeNode().flops == pytest.approx(0.094, abs=5e-4)
    assert BLOOM.decode_flops(512, 512) / EdgeNode().flops == pytest.approx(0.095, abs=5e-4)
    assert BLOOM.kv_bytes(512, 512) == 4 * 30 * 2560 * 1024


def test_costs_of_a_tiny_model_by_hand() -> None:
    assert TINY.weight_bytes == 8 + 4
    assert TINY.kv_bytes(4, 3) == 4 * 7
    assert TINY.prefill_flops(4) == 6 * 4 + (4 * 16 + 2 * 4) + 4 * 4
    assert TINY.decode_flops(4, 3) == 2 * (6 + (4 * (4 + 1.5) + 2) + 4)
    assert TINY_CELL.compute_ns(request()) == (112 + 68) * 10**6
    assert TINY_CELL.slack_ns(request(arrival_s=1.0), 4.5) == 4_500_000_000


def test_quantisers_scale_memory_and_time_and_cost_accuracy() -> None:
    half = EdgeCell(TINY, replace(WHOLE, memory_frac=0.5, time_frac=0.25), TINY_NODE)
    assert half.compute_ns(request()) == (112 + 68) * 10**6 // 4
    problem = half.problem([request()], 0.0, [1.0])
    assert problem.budgets[2] == 1000 - 6
    assert problem.candidates[0].uses[2] == 14
    assert HALF.accuracy(BLOOM) == pytest.approx(exp(-0.02))
    for name in MODELS:
        accuracies = [quantizer.accuracy(MODELS[name]) for quantizer in QUANTIZERS.values()]
        assert accuracies == sorted(accuracies, reverse=True)
    assert CELL.admits(replace(request(), min_accuracy=0.98))
    assert not CELL.admits(replace(request(), min_accuracy=0.99))


def test_least_share_of_the_band() -> None:
    node = EdgeNode(uplink_hz=1e6, downlink_hz=2e6, uplink_s=0.5, downlink_s=0.25, user_dbm=0, node_dbm=3)
    # Noise: -174 + 60 dBm; a gain of -104 dB leaves 10 dB.
    assert node.band_frac(100, -104, is_uplink=True) == pytest.approx(3200 / (0.5e6 * log2(11)))
    snr = 10 ** ((3 - 104 + 174) / 10) / 2e6
    assert node.band_frac(100, -104, is_uplink=False) == pytest.approx(3200 / (0.5e6 * log2(1 + snr)))
    assert path_gain_db(1000) == pytest.approx(-128.1)
    assert path_gain_db(100) == pytest.approx(-128.1 + 37.6)
    good, faded = (CELL.problem([request()], 0.0, [gain]).candidates[0].uses for gain in (1.0, 0.01))
    assert 0 < good[0] < faded[0] < BAND
    assert 0 < good[1] < faded[1] < BAND
    assert CELL.problem([request()], 0.0, [0.0]).candidates[0].uses[0] == 2 * BAND
    up, down = (
        CELL.node.band_frac(tokens, path_gain_db(100) - 20, is_uplink=tokens == 2) for tokens in (2, 3)
    )
    assert faded[:2] == (ceil(up * BAND), ceil(down * BAND))


def test_channels_are_drawn_anew_for_each_epoch_by_the_seed() -> None:
    two = [request(), request()]
    first, second = run_epochs(no_batching, TINY_CELL, two).problems
    assert first.candidates[1].uses[0] != second.candidates[0].uses[0]
    assert run_epochs(no_batching, TINY_CELL, two, seed=1).problems[0].candidates != first.candidates


def test_weights_beyond_the_memory_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"2\.36 GB for its weights, the node has 2\.00 GB"):
        EdgeCell(BLOOM, HALF, EdgeNode(memory_bytes=2e9))


def test_an_epoch_takes_uplink_computation_and_downlink() -> None:
    result = run_epochs(optimal_batching, TINY_CELL, [request(), request(), request(2.3)])
    assert result.batches == [2, 1]
    assert (result.met, result.late) == (3, 0)
    assert result.seconds == pytest.approx((2 + 0.36) + (2 + 0.18))
    assert result.throughput == pytest.approx(3 / result.seconds)


def test_nobody_waits_beyond_hope_and_bandwidth_can_be_too_little() -> None:
    tight = [request(latency_s=2.2), request(latency_s=2.2), request(latency_s=2.1)]
    result = run_epochs(no_batching, TINY_CELL, tight)
    assert (result.met, result.late, result.batches) == (1, 0, [1])
    narrow = EdgeCell(TINY, WHOLE, replace(TINY_NODE, uplink_hz=1.0))
    result = run_epochs(optimal_batching, narrow, [request(latency_s=9.0)])
    assert (result.met, result.batches) == (0, [])
    assert result.seconds == pytest.approx(7.0)  # 7 slots of T_U until the slack is gone
    assert run_epochs(no_batching, narrow, [request()]).batches == []


def test_inaccurate_precisions_serve_only_the_undemanding() -> None:
    demanding = [replace(request(), min_accuracy=accuracy) for accuracy in (0.2, 0.6, 0.9)]
    cell = EdgeCell(TINY, replace(WHOLE, perplexity_increase={"tiny": 0.4}), TINY_NODE)  # exp(-0.4) = 0.67
    result = run_epochs(optimal_batching, cell, demanding)
    assert (result.requests, result.admitted, result.met) == (3, 2, 2)


def test_static_batches_look_at_bands_and_memory_and_not_at_slack() -> None:
    three = [request(latency_s=latency) for latency in (2.3, 2.6, 2.6)]
    result = run_epochs(static_batching(3), TINY_CELL, three)
    assert (result.batches, result.met, result.late) == ([3], 2, 1)
    assert run_epochs(static_batching(2), TINY_CELL, three).batches[0] == 2
    small = EdgeCell(TINY, WHOLE, replace(TINY_NODE, memory_bytes=12 + 2 * 28))
    assert run_epochs(static_batching(3), small, three).batches[0] == 2


@pytest.mark.parametrize("seed", range(4))
def test_dftsp_serves_as_many_in_every_epoch_as_all_subsets(seed: int) -> None:
    cell = replace(CELL, node=EdgeNode(uplink_hz=2e4, downlink_hz=2e4, memory_bytes=3e9))
    result = run_epochs(optimal_batching, cell, draw_requests(8, 4.0, 10.0, seed), seed)
    small = [problem for problem in result.problems if len(problem.candidates) <= 14]
    assert len(small) >= 3
    for problem in small:
        assert len(optimal_batching(problem)) == len(brute_force_batching(problem))


def test_batchings_order_under_load_and_the_same_seed_gives_the_same_run() -> None:
    requests = draw_requests(20, 2.0, 20.0, seed=3)
    served = {name: run_epochs(choose, CELL, requests, 3).met for name, choose in BATCHINGS.items()}
    assert served == {name: run_epochs(choose, CELL, requests, 3).met for name, choose in BATCHINGS.items()}
    assert served["dftsp"] >= served["greedy"] > 1.5 * served["nob"] > 0
    assert served["dftsp"] > 1.5 * max(served[name] for name in BATCHINGS if name.startswith("stb"))


def test_drawn_requests() -> None:
    requests = draw_requests(100, 3.0, 20.0, seed=1)
    assert requests == draw_requests(100, 3.0, 20.0, seed=1) != draw_requests(100, 3.0, 20.0, seed=2)
    assert abs(len(requests) - 2000) < 5 * 2000**0.5
    arrivals = [one.arrival_s for one in requests]
    assert arrivals == sorted(arrivals)
    assert 0 <= arrivals[0] <= arrivals[-1] <= 20
    assert (
        {one.prompt_tokens for one in requests} == {one.output_tokens for one in requests} == {128, 256, 512}
    )
    assert 0.5 <= min(one.latency_s for one in requests) < 0.6
    assert 2.9 < max(one.latency_s for one in requests) <= 3
    # Uniform over the area: half of them beyond 250 m / sqrt(2).
    assert np.median([one.distance_m for one in requests]) == pytest.approx(250 / 2**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: draw_requests(0, 2, 1, 0), "the rate is 0"),
        (lambda: draw_requests(float("nan"), 2, 1, 0), "the rate is nan"),
        (lambda: draw_requests(1, 0.5, 1, 0), "latency bound is 0.5"),
        (lambda: draw_requests(1, 2, float("inf"), 0), "the duration is inf"),
        (lambda: draw_requests(1e6, 2, 2, 0), "more than 1,000,000"),
        (lambda: static_batching(0), "a batch of 0"),
        (lambda: brute_force_batching(TINY_CELL.problem([request()] * 21, 0, [1.0] * 21)), "21 candidates"),
    ],
)
def test_what_can_never_be_right_is_a_usage_error(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert caught.value.hint


def test_no_requests_are_no_epochs() -> None:
    result = run_epochs(optimal_batching, TINY_CELL, [])
    assert (result.requests, result.seconds, result.throughput) == (0, 0.0, 0.0)
    assert list(no_batching(Problem((), (1,)))) == []


def test_checked_batches_take_the_oldest_that_leave_all_in_time() -> None:
    three = [request(latency_s=latency) for latency in (2.3, 2.6, 2.6)]
    result = run_epochs(BATCHINGS["fcfs"], TINY_CELL, three)
    assert (result.batches, result.met, result.late) == ([1], 1, 0)
    result = run_epochs(BATCHINGS["fcfs"], TINY_CELL, three[1:])
    assert (result.batches, result.met, result.late) == ([2], 2, 0)
