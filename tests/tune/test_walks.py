"""Walks measure what a fresh run measures, whatever was walked before; losses compare as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from taper.errors import UsageError
from taper.evaluate.divergence import kl_divergences, log_normalisers
from taper.evaluate.sequences import rouge_l
from taper.tune.greedy import GreedyWalk
from taper.tune.losses import LOSSES
from taper.tune.prompts import PromptSet
from taper.tune.schedule import Schedule
from taper.tune.search import walk_tree
from taper.tune.walks import Reference, Task

RANDOM = np.random.default_rng(0)
PROMPT = tuple(int(token) for token in RANDOM.integers(2, 300, 9))
ANSWER = tuple(int(token) for token in RANDOM.integers(2, 300, 12))
SCHEDULES = [
    Schedule(8, ((8, 4), (8, 4), (8, 4))),
    Schedule(8, ((4, 4), (4, 4), (2, 4))),
    Schedule(8, ((4, 4), (3, 4), (3, 4))),
    Schedule(4, ((3, 4), (2, 4), (2, 4))),
    Schedule(3, ((8, 12),)),
    Schedule(8, ((5, 1), (4, 6), (8, 5))),
]


@pytest.fixture
def task(decoder, tokenizer):
    prompts = PromptSet("t", (PROMPT,), 12, (ANSWER,), (0,))
    return Task(decoder, tokenizer, prompts, 8, Reference(decoder, 8))


def rows_of(decoder, schedule, tokens):
    """The distribution of every token, pass by pass, each of one token."""
    cache = decoder.new_cache(len(PROMPT) + len(tokens))
    rows = [decoder.forward(PROMPT, cache, schedule.prefill_bits)[0]]
    for token, bits in zip(tokens[:-1], schedule.decode_bits, strict=True):
        rows.append(decoder.forward([token], cache, bits)[0])
    return np.stack(rows)


def divergence(wanted, used):
    return float(kl_divergences(wanted, log_normalisers(wanted), used, log_normalisers(used)).mean())


def test_likelihood_is_that_of_the_engines_passes(decoder, task):
    found = walk_tree(task.likelihood(0), SCHEDULES)
    for schedule in SCHEDULES:
        rows = rows_of(decoder, schedule, ANSWER)
        wanted = (log_normalisers(rows) - rows[np.arange(12), ANSWER]).mean()
        assert found[schedule.key] == pytest.approx(wanted, rel=1e-12)


def test_divergence_along_the_true_answer_is_from_uniform_high(decoder, task):
    found = walk_tree(task.divergence(0), SCHEDULES)
    high = rows_of(decoder, SCHEDULES[0], ANSWER)
    for schedule in SCHEDULES:
        assert found[schedule.key] == pytest.approx(divergence(high, rows_of(decoder, schedule, ANSWER)))
    assert found[SCHEDULES[0].key] == 0.0 < found[SCHEDULES[2].key]


def test_audit_reads_the_schedules_own_answer_at_full_width(decoder, task):
    found = walk_tree(task.audit(0), SCHEDULES)
    for schedule in SCHEDULES:
        walk = GreedyWalk(decoder, PROMPT, 12)
        walk.prefill(schedule.prefill_bits)
        for bits, count in schedule.runs:
            walk.extend(bits, count)
        tokens = walk.tokens
        used = rows_of(
            decoder, Schedule(schedule.prefill_bits, schedule.runs), [*tokens, *[0] * (12 - len(tokens))]
        )
        wanted = rows_of(decoder, SCHEDULES[0], [*tokens, *[0] * (12 - len(tokens))])
        assert found[schedule.key] == pytest.approx(divergence(wanted[: len(tokens)], used[: len(tokens)]))
    assert found[SCHEDULES[0].key] == 0.0


def test_rouge_compares_with_the_text_or_with_the_reference(decoder, tokenizer, task):
    found = walk_tree(task.rouge(0), SCHEDULES)
    of_model = walk_tree(task.rouge_of_model(0), SCHEDULES)
    walk = GreedyWalk(decoder, PROMPT, 12)
    walk.prefill(8)
    walk.extend(8, 12)
    text = tokenizer.decode(walk.tokens)
    assert found[SCHEDULES[0].key] == rouge_l(tokenizer.decode(ANSWER), text)
    assert of_model[SCHEDULES[0].key] == 1.0
    walk.prefill(3)
    walk.extend(8, 12)
    assert of_model[SCHEDULES[4].key] == rouge_l(text, tokenizer.decode(walk.tokens))


def test_short_answer_ends_where_it_ends(decoder, tokenizer):
    prompts = PromptSet("t", (PROMPT,), 12, (ANSWER[:5],), (0,))
    task = Task(decoder, tokenizer, prompts, 8, Reference(decoder, 8))
    rows = rows_of(decoder, Schedule(8, ((4, 5),)), ANSWER[:5])
    wanted = (log_normalisers(rows) - rows[np.arange(5), ANSWER[:5]]).mean()
    whole = Schedule(8, ((4, 4), (4, 4), (2, 4)))
    found = walk_tree(task.likelihood(0), [whole, Schedule(8, ((8, 4), (4, 4), (2, 4)))])
    assert found[whole.key] == pytest.approx(wanted, rel=1e-12)


def test_missing_answer_is_said(decoder, tokenizer):
    task = Task(decoder, tokenizer, PromptSet("t", (PROMPT,), 4, ((),), (0,)), 8, Reference(decoder, 8))
    with pytest.raises(UsageError, match="no true answer"):
        task.likelihood(0)


def test_terms_average_to_the_loss():
    high, values = np.array([0.5, 0.3, 0.4]), np.array([0.4, 0.35, 0.35])
    rouge = LOSSES["rouge"]
    assert rouge.loss(rouge.terms(values, high).mean()) == pytest.approx(1 - values.sum() / high.sum())
    np.testing.assert_allclose(rouge.terms(high, high), 0.0, atol=1e-15)
    np.testing.assert_array_equal(rouge.terms(high, np.zeros(3)), 0.0)
    likelihood = LOSSES["likelihood"]
    wanted = math.exp(values.mean()) / math.exp(high.mean()) - 1
    assert likelihood.loss(likelihood.terms(values, high).mean()) == pytest.approx(wanted)
    kl = LOSSES["kl"]
    assert kl.loss(kl.terms(values, high).mean()) == pytest.approx(math.expm1(values.mean()))
