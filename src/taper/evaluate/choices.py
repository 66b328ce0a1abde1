"""Multiple choice by log-likelihood: the choice that the model finds likeliest is its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from taper.evaluate.likelihood import Score, Scorer
from taper.evaluate.perplexity import check_vocabularies, checked_widths, open_model
from taper.evaluate.statistics import proportion
from taper.evaluate.tasks import Item, Task
from taper.models.parts import FLOAT_BITS


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Figures of one width on one task; errors are sqrt(p (1 - p) / (n - 1)).

    Attributes:
        bits: the width; 32 is the float checkpoint.
        accuracy: share of items whose likeliest choice is right; with a single choice, share that greedy
            decoding gives word for word.
        normalised_accuracy: the same by log-likelihood per character of the choice, which does not favour
            short ones; None with a single choice, as its error.
        agreement: share of items with the reference's answer, right or wrong; None without a reference.
        num_cut: items whose context lost its beginning because it was longer than the model's.
    """

    bits: float
    accuracy: float | None
    accuracy_standard_error: float | None
    normalised_accuracy: float | None
    normalised_accuracy_standard_error: float | None
    agreement: float | None
    agreement_standard_error: float | None
    num_cut: int


@dataclass(frozen=True, slots=True)
class TaskReport:
    """All widths on one task; the reference, where there is one, comes first."""

    name: str
    num_items: int
    results: tuple[TaskResult, ...]


@dataclass(frozen=True, slots=True)
class Answers:
    """What one width said: index of the choice by plain and by normalised likelihood, for each item.

    With a single choice the index is 0 where greedy decoding gives it and -1 where not.
    """

    plain: tuple[int, ...]
    normalised: tuple[int, ...]
    num_cut: int


def measure_tasks(
    model: str | Path,
    tasks: Sequence[Task],
    *,
    bits: Sequence[float] | None = None,
    against: str | Path | None = None,
    progress: Callable[[str, float], None] | None = None,
    kv: str | None = None,
) -> list[TaskReport]:
    """Answer every task at every width.

    Args:
        model: a `.taper` file or a Hugging Face folder.
        tasks: from `read_task`.
        bits: widths of the file; None means all whole ones.
        against: the float checkpoint's folder; adds its own result and the agreement with it.
        progress: called as progress(what, done fraction) after each item.
        kv: of the model, as `open_model` takes it.

    Raises:
        UsageError: a width outside the file, a model without a tokenizer, another vocabulary, a choice
            longer than the model's context.
    """
    decoder, tokenizer = open_model(model, kv)
    scorers = [Scorer(decoder, tokenizer, width) for width in checked_widths(decoder, bits)]
    if against is not None:
        reference, _ = open_model(against)
        check_vocabularies(reference, decoder)
        scorers.insert(0, Scorer(reference, tokenizer, FLOAT_BITS))
    total = sum(len(task.items) for task in tasks) * len(scorers)
    done = 0

    def count(task: Task) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(task.name, done / total)

    reports = []
    for task in tasks:
        answers = [answer_task(scorer, task, partial(count, task)) for scorer in scorers]
        first = None if against is None else answers[0]
        results = [_result(s.bits, task, a, first) for s, a in zip(scorers, answers, strict=True)]
        reports.append(TaskReport(task.name, len(task.items), tuple(results)))
    return reports


def answer_task(scorer: Scorer, task: Task, on_item: Callable[[], None] | None = None) -> Answers:
    """The choices of one width."""
    plain, normalised, num_cut = [], [], 0
    for item in task.items:
        scores = [scorer.score(item.context, choice) for choice in item.choices]
        by_sum, by_character = choose(item, scores)
        plain.append(by_sum)
        normalised.append(by_character)
        num_cut += any(score.num_dropped for score in scores)
        if on_item is not None:
            on_item()
    return Answers(tuple(plain), tuple(normalised), num_cut)


def choose(item: Item, scores: Sequence[Score]) -> tuple[int, int]:
    """Index of the likeliest choice, plain and per character (ties: the first)."""
    if len(item.choices) == 1:
        index = 0 if scores[0].is_greedy else -1
        return index, index
    sums = [score.log_likelihood for score in scores]
    means = [total / len(choice.strip()) for total, choice in zip(sums, item.choices, strict=True)]
    return sums.index(max(sums)), means.index(max(means))


def _result(bits: float, task: Task, answers: Answers, reference: Answers | None) -> TaskResult:
    right = tuple(item.answer for item in task.items)
    accuracy, accuracy_error = _share(answers.plain, right)
    normalised, normalised_error = _share(answers.normalised, None if task.is_completion else right)
    is_compared = reference is not None and reference is not answers
    agreement, agreement_error = _share(answers.plain, reference.plain if is_compared and reference else None)
    return TaskResult(
        bits=bits,
        accuracy=accuracy,
        accuracy_standard_error=accuracy_error,
        normalised_accuracy=normalised,
        normalised_accuracy_standard_error=normalised_error,
        agreement=agreement,
        agreement_standard_error=agreement_error,
        num_cut=answers.num_cut,
    )


def _share(given: Sequence[int], wanted: Sequence[int] | None) -> tuple[float | None, float | None]:
    """Share of equal entries and its error; nothing where there is nothing to compare with."""
    if wanted is None:
        return None, None
    estimate = proportion(sum(a == b for a, b in zip(given, wanted, strict=True)), len(given))
    return estimate.value, estimate.standard_error
