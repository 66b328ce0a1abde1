"""The trainer: gradients against finite differences, balance, what can be learned and what cannot."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from taper.precision.learned import padded, predict
from taper.tune.learned_train import (
    TrainingPlan,
    balanced,
    cross_entropy,
    gradients,
    initial_weights,
    train,
)

HEADS, HEAD_DIM, CLASSES = 2, 6, 4


def prompts_of(count, seed=0, shift=None):
    """Random keys and values; `shift` moves the values of each prompt."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        tokens = int(generator.integers(1, 9))
        keys, values = generator.standard_normal((2, tokens, HEAD_DIM))
        found.append((keys, values + (0 if shift is None else shift[number])))
    return found


def moved_weights(seed):
    """Weights with nothing at its first value, in float64 so that differences are exact enough."""
    generator = np.random.default_rng(seed)
    weights = initial_weights(HEADS, HEAD_DIM, CLASSES, generator)
    return type(weights)(
        **{name: array.astype(np.float64) + 0.3 * generator.standard_normal(array.shape)
           for name, array in weights.arrays.items()}
    )  # fmt: skip


@pytest.mark.parametrize("name", list(initial_weights(2, 4, 2, np.random.default_rng(0)).arrays))
def test_gradients_are_the_differences_of_the_loss(name):
    weights, inputs = moved_weights(1), padded(prompts_of(5))
    labels, shares = np.array([0, 3, 1, 1, 2]), np.array([0.1, 0.3, 0.2, 0.15, 0.25])
    array = weights.arrays[name]
    wanted, step = np.empty(array.shape), 1e-6
    for place in np.ndindex(array.shape):
        losses = []
        for sign in (1, -1):
            changed = array.copy()
            changed[place] += sign * step
            logits = predict(dataclasses.replace(weights, **{name: changed}), inputs).logits
            losses.append(cross_entropy(logits, labels, shares))
        wanted[place] = (losses[0] - losses[1]) / (2 * step)
    found = gradients(weights, inputs, labels, shares)[name]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-8)
    assert np.abs(wanted).max() > 1e-5


def test_loss_is_on_logits():
    """A certain and right answer costs nothing; on softmax outputs it would cost 0.74 of four classes."""
    logits = np.array([[40.0, 0, 0, 0]])
    assert cross_entropy(logits, np.array([0]), np.ones(1)) < 1e-12
    assert cross_entropy(logits, np.array([1]), np.ones(1)) == pytest.approx(40)


def test_classes_weigh_the_same_however_often_they_occur():
    labels = np.array([0] * 9 + [3])
    shares = balanced(labels)
    assert shares[labels == 0].sum() == pytest.approx(0.5)
    assert shares[labels == 3].sum() == pytest.approx(0.5)


def learnable(count, seed=0):
    """The label is in the direction that the values are moved to."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count)
    directions = 3 * np.eye(HEAD_DIM)[:3]
    return prompts_of(count, seed, directions[labels]), labels


def test_what_the_values_say_is_learned():
    prompts, labels = learnable(240)
    trained = train(prompts[:200], labels[:200], CLASSES, HEADS, TrainingPlan())
    assert trained.epoch > 0
    assert trained.loss < 0.5 * np.log(3)
    chosen = predict(trained.weights, padded(prompts[200:])).logits.argmax(axis=1)
    assert (chosen == labels[200:]).mean() > 0.9


def test_training_is_the_same_for_the_same_seed():
    prompts, labels = learnable(60)
    texts = [
        train(prompts, labels, CLASSES, HEADS, TrainingPlan(seed=seed, max_epochs=4)).weights.to_text()
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_labels_that_nothing_tells_give_the_mean_one():
    """Noise is not learned: the predictor is then the static schedule of the mean label."""
    prompts = prompts_of(60)
    labels = np.random.default_rng(3).permutation(np.repeat([1, 2, 2, 3], 15))
    # Steps that are far too long: no epoch is better than not to look.
    trained = train(prompts, labels, CLASSES, HEADS, TrainingPlan(learning_rate=30.0, max_epochs=3))
    assert trained.epoch == 0
    assert set(predict(trained.weights, padded(prompts)).logits.argmax(axis=1)) == {2}
