"""The search finds what exhaustion finds, runs nothing twice, and goes on after an interruption."""

from __future__ import annotations

import json

import numpy as np
import pytest

from taper.errors import UsageError
from taper.tune import search as search_module
from taper.tune.costs import Costs
from taper.tune.losses import Loss
from taper.tune.prompts import PromptSet
from taper.tune.schedule import monotone_schedules, uniform
from taper.tune.search import Bench, Search, front, walk_tree
from taper.tune.store import ValueStore
from taper.tune.walks import Task

WIDTHS = (8, 4, 3, 2)
COST = {8: 1.8, 4: 0.51, 3: 0.49, 2: 0.46}
PER_TOKEN = {8: 0.0, 4: 0.006, 3: 0.03, 2: 0.15}


class AdditiveWalk:
    """A model in which bits hurt less and less: the loss of token n is its width's over n + 1."""

    passes = 0

    def __init__(self, index):
        self.scores = []
        self.factor = 1.0 + 0.1 * (index % 3 - 1)

    @property
    def num_tokens(self):
        return len(self.scores)

    def prefill(self, bits):
        self.scores = []
        self.prompt = PER_TOKEN[bits]

    def extend(self, bits, num_tokens):
        AdditiveWalk.passes += 1
        for _ in range(num_tokens):
            self.scores.append(PER_TOKEN[bits] / (1 + len(self.scores)))

    def back_to(self, num_tokens):
        del self.scores[num_tokens:]

    def value(self):
        return self.factor * (self.prompt + sum(self.scores)) / len(self.scores)


LOSS = Loss(
    "additive",
    "",
    lambda task, index: AdditiveWalk(index),
    lambda task, index: AdditiveWalk(index),
    lambda values, high: values - high,
    lambda values, high: values - high,
    float,
)


def bench(folder, num_prompts=40):
    prompts = PromptSet("t", ((1,),) * num_prompts, 16, ((2,),) * num_prompts, tuple(range(num_prompts)))
    task = Task(None, None, prompts, 8, None)
    return Bench(task, LOSS.walk, ValueStore(folder, {"run": "1"}), "search")


def ladder(folder, max_loss, segments=4):
    costs = Costs("time", {bits: 2 * cost for bits, cost in COST.items()}, COST)
    schedules = monotone_schedules(WIDTHS, 16, segments)
    return schedules, costs, Search(bench(folder), LOSS, costs, max_loss, 8).ladder(schedules)


@pytest.mark.parametrize("max_tree", [2048, 20])
def test_cheapest_within_the_limit_is_a_rung(tmp_path, monkeypatch, max_tree):
    monkeypatch.setattr(search_module, "MAX_TREE", max_tree)
    monkeypatch.setattr(search_module, "_LEAST_KEPT", 10)
    schedules, costs, found = ladder(tmp_path / "w", 0.002)
    walks = [AdditiveWalk(index) for index in range(40)]
    losses = {s.key: 0.0 for s in schedules}
    for walk in walks:
        for key, value in walk_tree(walk, schedules).items():
            losses[key] += value / 40
    best = min((s for s in schedules if losses[s.key] <= 0.002), key=costs.of)
    rung = next(rung for rung in found if rung.schedule.key == best.key)
    assert rung.loss == pytest.approx(losses[best.key])
    assert 0.002 < found[-1].loss <= 0.004
    assert [rung.loss for rung in found] == sorted(rung.loss for rung in found)
    assert [rung.cost for rung in found] == sorted((rung.cost for rung in found), reverse=True)
    assert all(rung.schedule.key != "8/8@0" for rung in found)


def test_nothing_within_the_limit_leaves_no_rung(tmp_path):
    assert ladder(tmp_path / "w", 1e-9)[2] == ()


def test_shared_beginnings_are_walked_once():
    schedules = monotone_schedules(WIDTHS, 16, 4)
    AdditiveWalk.passes = 0
    values = walk_tree(AdditiveWalk(0), schedules)
    # A node of the tree is a falling word of 2 to 5 widths: the prompt's and those of the runs so far.
    assert AdditiveWalk.passes == sum(len(monotone_schedules(WIDTHS, 16, depth)) for depth in (1, 2, 3, 4))
    for schedule in schedules:
        alone = walk_tree(AdditiveWalk(0), [schedule])
        assert values[schedule.key] == alone[schedule.key]


def test_what_is_stored_is_not_run_again(tmp_path):
    first = ladder(tmp_path / "w", 0.002)[2]
    AdditiveWalk.passes = 0
    assert ladder(tmp_path / "w", 0.002)[2] == first
    assert AdditiveWalk.passes == 0


def test_front_is_the_least_loss_at_no_higher_cost():
    costs, losses = np.array([3.0, 1.0, 2.0, 2.0]), np.array([0.1, 0.5, 0.6, 0.3])
    np.testing.assert_array_equal(front(costs, losses), [0.1, 0.5, 0.3, 0.3])


def test_progress_is_told(tmp_path):
    told = []
    measuring = bench(tmp_path / "w", 3)
    measuring.report = lambda what, done_frac, left_s: told.append((what, done_frac))
    measuring.values([uniform(8, 16)], 3, "prompts")
    assert told == [("prompts", 1 / 3), ("prompts", 2 / 3), ("prompts", 1.0)]


def test_store_refuses_the_work_of_another_run(tmp_path):
    folder = tmp_path / "w"
    store = ValueStore(folder, {"loss": "kl", "seed": "0"})
    store.save("test", 3, {"8/8@0": 0.5})
    assert ValueStore(folder, {"loss": "kl", "seed": "0"}).values("test", 3) == {"8/8@0": 0.5}
    assert store.values("test", 4) == {}
    with pytest.raises(UsageError, match="unfinished work of another seed"):
        ValueStore(folder, {"loss": "kl", "seed": "1"})
    (folder / "test-00003.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        store.values("test", 3)
    (folder / "test-00003.json").write_text(json.dumps([1]))
    with pytest.raises(UsageError, match="no record"):
        store.values("test", 3)
    store.remove()
    assert not folder.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot keep unfinished work"):
        ValueStore(tmp_path / "file" / "w", {})


def test_costs_are_kept_as_they_were(tmp_path):
    store = ValueStore(tmp_path / "w", {})
    assert store.costs() is None
    costs = Costs("time", {8: 20.125, 3.3: 11.0}, {8: 1.8, 3.3: 0.5})
    store.save_costs(costs)
    assert store.costs() == costs
