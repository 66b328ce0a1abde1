"""Multiple choice: who is right, by which likelihood, and agreement with the float model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from taper.evaluate.choices import Answers, _result, choose, measure_tasks
from taper.evaluate.likelihood import Score
from taper.evaluate.tasks import Item, Task
from taper.testing.tiny import tiny_hf_dir, tiny_taper


def score(log_likelihood: float, is_greedy: bool = False) -> Score:
    return Score(log_likelihood, is_greedy, 1, 0)


def test_the_likeliest_choice_and_the_likeliest_per_character() -> None:
    item = Item("x", (" ab", " abcdefgh"), 1)
    # -4 > -8, but -4 / 2 < -8 / 8; the space that a choice begins with is no character of it.
    assert choose(item, [score(-4), score(-8)]) == (0, 1)
    assert choose(item, [score(-2), score(-8)]) == (0, 0)
    assert choose(item, [score(-3), score(-3)]) == (0, 1)
    # -2 / 1 < -5 / 3; counting the spaces would make it -2 / 2 > -5 / 4.
    assert choose(Item("x", (" a", " abc"), 0), [score(-2), score(-5)]) == (0, 1)
    single = Item("x", (" a",), 0)
    assert choose(single, [score(-1, True)]) == (0, 0)
    assert choose(single, [score(-1, False)]) == (-1, -1)


def test_figures() -> None:
    task = Task("t", tuple(Item("x", ("a", "b"), answer) for answer in (0, 1, 1, 0)))
    answers = Answers((0, 1, 0, 1), (0, 1, 1, 1), 2)
    result = _result(3.3, task, answers, Answers((0, 0, 0, 1), (0, 0, 0, 0), 0))
    assert (result.accuracy, result.normalised_accuracy, result.agreement) == (0.5, 0.75, 0.75)
    assert result.accuracy_standard_error == pytest.approx(math.sqrt(0.25 / 3))
    assert (result.bits, result.num_cut) == (3.3, 2)
    assert _result(32, task, answers, answers).agreement is None
    completion = Task("t", (Item("x", ("a",), 0),) * 4)
    assert (
        _result(3, completion, Answers((0, -1, -1, 0), (0, -1, -1, 0), 0), None).normalised_accuracy is None
    )


def test_a_checkpoint_agrees_with_itself_and_counts_items(tmp_path: Path) -> None:
    folder = tiny_hf_dir(tmp_path / "hf")
    items = tuple(Item(f"the sea {i}", (" of rain", " in the"), i % 2) for i in range(4))
    seen: list[float] = []
    (report,) = measure_tasks(
        folder, [Task("t", items)], against=folder, progress=lambda what, done: seen.append(done)
    )
    assert [result.bits for result in report.results] == [32, 32]
    assert report.results[1].agreement == 1.0
    assert report.results[1].accuracy == report.results[0].accuracy
    assert seen == [i / 8 for i in range(1, 9)]


def test_widths_of_a_file(tmp_path: Path) -> None:
    path = tiny_taper(tmp_path / "tiny.taper", 2, 4)
    (report,) = measure_tasks(path, [Task("t", (Item("the " * 300, (" sea",), 0),))], bits=[2, 4])
    assert [result.bits for result in report.results] == [2, 4]
    assert [result.num_cut for result in report.results] == [1, 1]
