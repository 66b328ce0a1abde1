"""benchmarks/dftsp: searches that agree, all batchings on the same requests, pictures from their JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nodes
import pytest
import throughput

FOLDER = Path(__file__).parents[2] / "benchmarks" / "dftsp"


def run(script: str, *options: str) -> str:
    outcome = subprocess.run(
        [sys.executable, FOLDER / script, *options], capture_output=True, text=True, timeout=120, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout.splitlines()[-1]


@pytest.mark.parametrize("setting", nodes.NAMES)
def test_pruning_cuts_more_than_the_paper_prints(setting):
    row = nodes.small(setting, 10, 3)
    assert row["cut"]["subsets"] > 0.9
    assert row["cut"]["unpruned"] > 0.45
    assert row["nodes"]["subsets"] == 2**10 - 1
    assert 1 < row["mean_size"] < 10


def test_a_search_that_differs_is_noticed(monkeypatch):
    monkeypatch.setattr(nodes, "exhaustive", lambda problem: nodes.Selection((), 1, 0))
    with pytest.raises(RuntimeError, match="differ on instance 0 of 8, scarce"):
        nodes.small("scarce", 8, 1)


def test_the_budget_ends_a_search_and_the_gap_is_reported(monkeypatch):
    monkeypatch.setattr(nodes, "MAX_NODES", 10)
    row = nodes.large("uncorrelated", 40, 3)
    assert row["most_nodes"] == 10
    assert row["proven"] < 3
    assert row["largest_gap"] > 0


def test_every_resource_of_the_scarce_node_can_bind():
    problem = nodes.instance("scarce", 20, 0)
    columns = list(zip(*(one.uses for one in problem.candidates), strict=True))
    assert all(sum(column) > budget for column, budget in zip(columns, problem.budgets, strict=True))


def test_a_point_of_the_curves():
    node = throughput.EdgeNode()
    row = throughput.point("bloom-3b", "gptq-w4a16", 20.0, 2.0, node, seeds=2, duration_s=10.0)
    assert row["served"]["stb"] == max(row["served"][f"stb-{size}"] for size in (2, 4, 8, 16))
    assert row["served"][row["best_stb"]] == row["served"]["stb"]
    assert row["served"]["dftsp"] > row["served"]["fcfs"] > row["served"]["stb"] > 0
    assert 0.45 < row["admitted_frac"] < 0.65
    assert row["error"] > 0


def test_scripts_write_what_the_plots_read(tmp_path):
    pytest.importorskip("matplotlib")
    cuts = json.loads(run("nodes.py", "--out", str(tmp_path), "--instances", "1"))["cut"]
    assert min(cut["subsets"] for cut in cuts.values()) > 0.9
    last = run("throughput.py", "--out", str(tmp_path), "--seeds", "1", "--duration", "2")
    assert "bloom-3b at 80" in json.loads(last)["dftsp_over"]
    found = ("--throughput", str(tmp_path / "throughput.json"), "--nodes", str(tmp_path / "nodes.json"))
    run("plots.py", *found, "--out", str(tmp_path))
    assert {path.name for path in tmp_path.glob("*.png")} == {"dftsp_throughput.png", "dftsp_nodes.png"}
