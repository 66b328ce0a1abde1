"""The bytes behind PMPD's NPU figures, by hand on one cell, and the shape of the tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import npu
import pytest


def test_one_cell_by_hand() -> None:
    # Vicuna-7B on Dialogsum: 4 matrices of 4096 x 4096 and 3 of 4096 x 11008 in each of 32 layers, a head of
    # 32,000 rows; keys and values of 32 layers, 4,096 features each, 2 bytes; 30 tokens of instruction, 172
    # of dialogue, half of an answer of 33.
    shape = npu.SHAPES["Vicuna-7B"]
    assert shape.weights == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 32_000 * 4096 == 6_607_077_376
    assert shape.kv_bytes == 2 * 32 * 4096 * 2 == 524_288
    cell = next(cell for cell in npu.CELLS if (cell.model, cell.task) == ("Vicuna-7B", "Dialogsum"))
    assert npu.context_of(cell) == pytest.approx(30 + 172 + 16.5)
    kv = 524_288 * 218.5
    fp16, three = 6_607_077_376 * 2 + kv, 6_607_077_376 * 3 / 8 + kv
    assert npu.speedup(shape, 3, 218.5) == pytest.approx(fp16 / three)
    assert npu.tokens_per_second(shape, 16, 218.5) == pytest.approx(32e9 / fp16)
    row = next(r for r in npu.rows() if (r.model, r.task, r.kind) == ("Vicuna-7B", "Dialogsum", "uniform"))
    assert row.from_facts == pytest.approx(fp16 / three)
    assert row.deviation == pytest.approx(fp16 / three / 5.2 - 1)


def test_the_first_decode_forward_is_not_in_the_log() -> None:
    # s = 11 of 33 forwards at 4 bits: the log has the 32 others, 10 of them at 4 bits.
    assert npu.real_bits((10 * 4 + 22 * 3) / 32, 4, 33) == pytest.approx((11 * 4 + 22 * 3) / 33)
    # Zero high steps still run one forward at p_h.
    zero = next(cell for cell in npu.CELLS if (cell.model, cell.task) == ("Vicuna-7B", "Dialogsum"))
    assert npu.schedule_bits(zero) == npu.bits_of(zero, "static")[1] == pytest.approx((3 + 32 * 2) / 33)


def test_the_known_absolute_speeds() -> None:
    for name, speed in npu.FP16_SPEEDS.items():
        assert npu.tokens_per_second(npu.SHAPES[name], 16, 0) == pytest.approx(speed, rel=0.02)


def test_the_factor_is_the_best_of_its_grid() -> None:
    def loss(scale: float) -> float:
        return sum(
            abs(have / want - 1) ** 2
            for have, want in zip(npu.predictions(scale), npu.published(), strict=True)
        )

    best = npu.fitted_scale()
    assert 0 < best < 1
    assert loss(best) < loss(best - 0.05)
    assert loss(best) < loss(best + 0.05)


def test_tables_have_a_row_for_every_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["npu.py", "--plot", str(tmp_path / "npu.png")])
    npu.main()
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert len(record["rows"]) == record["num_figures"] == 3 * len(npu.CELLS)
    first = lines[: lines.index("")]
    assert len(first) == 2 + record["num_figures"]
    assert {line.count("|") for line in first} == {11}
    assert sum("**" in line for line in first) == sum(
        abs(row["deviation"]) > 0.1 for row in record["rows"]
    ) + sum(abs(row["fitted_deviation"]) > 0.1 for row in record["rows"])
    assert record["num_figures"] - record["within_from_facts"] == sum("**" in line for line in first)
    assert (tmp_path / "npu.png").read_bytes().startswith(b"\x89PNG")
