"""The benchmarks of loading, refreshing and switching, on a tiny model."""

from __future__ import annotations

import itertools

import loading
import numpy as np
import pytest
import refresh
import switches

from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.testing.tiny import tiny_taper


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_taper(tmp_path_factory.mktemp("precision") / "tiny.taper")


def test_every_step_is_a_switch_also_between_sequences(path):
    switcher = switches.Switcher(switches.open_decoder(path), 50, 3)
    widths = [bits for index in range(4) for bits in switcher.plan(index)[1]]
    assert all(left != right for left, right in itertools.pairwise(widths))
    assert set(widths) == set(range(2, 9))
    assert switcher.plan(1)[1] != switcher.plan(2)[1]


def test_replays_are_compared_with_what_was_run(path, monkeypatch):
    endured = switches.endure(path, 90, 30, 0)
    assert (endured["switches"], endured["replayed_sequences"]) == (90, 3)
    assert endured["differing_sequences"] == []
    # A cache that keeps an entry of the sequence before is found.
    run = switches.Switcher.run
    runs = []

    def forgetful(self, index):
        runs.append(index)
        return run(self, index) if len(runs) != 5 else np.zeros(32, np.uint8)

    monkeypatch.setattr(switches.Switcher, "run", forgetful)
    assert switches.endure(path, 90, 30, 0)["differing_sequences"] == [1]


def test_costs_come_with_their_interval(path):
    rows = switches.switch_cost(switches.open_decoder(path), (2, 3), 60, 0)
    assert [(row["from_bits"], row["to_bits"]) for row in rows] == [(3, 2), (2, 3)]
    for row in rows:
        assert row["cost_95_us"][0] <= row["cost_us"] <= row["cost_95_us"][1]
        assert sum(row["steps"]) > 0


def test_a_refresh_gives_what_no_plane_missing_gives(path):
    full, cut = (Decoder.from_taper(TaperFile.open(path, max_bits=bits)) for bits in (8, 2))
    windows = [np.arange(start, start + 30, dtype=np.int32) for start in (5, 50)]
    ways = refresh.measure(windows, full, cut, 8, 12, 6)["ways"]
    assert ways["refreshed"]["kl"] == ways["never short"]["kl"] == 0
    assert ways["kept"]["kl"] > 0


def test_a_copy_is_no_faster_than_its_rate(path, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(loading.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(loading.time, "sleep", slept.append)
    target = tmp_path / "copy.taper"
    loading.copy_at(path, target, 1e6, 100.0)
    size = path.stat().st_size
    assert target.read_bytes() == path.read_bytes()
    assert slept[-1] == pytest.approx(size * 1e-6)
    assert slept[0] == pytest.approx(loading.COPY_S)


def test_rows_name_the_ratio_and_the_widths_over_time():
    run = {"first_token_s": 2.0, "ceilings": [(0, 2, 1.9), (5, 3, 2.5)]}
    result = {
        "prompt_tokens": 64,
        "first_token_s": {"progressive": 2.0, "whole": 6.0},
        "ratio": 3.0,
        "ratios": [2.9, 3.1],
        "rounds": {"progressive": [run]},
    }
    first, second = loading.rows(result)
    assert "3.00 x sooner (2.90 to 3.10 in 2 rounds)" in first
    assert second.endswith("there were 2 bits from token 0 (1.90 s), 3 bits from token 5 (2.50 s)")
