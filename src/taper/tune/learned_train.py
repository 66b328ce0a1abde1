"""Training of the learned scheduler's predictor: NumPy, gradients by hand, the same result for the same seed.

PMPD (arXiv 2410.13461): both parts balanced, cross-entropy, Adam, the least evaluation loss wins. Its code
puts the loss on softmax outputs, a softmax too many; here it is on the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from taper.formats.learned import PredictorWeights, hidden_size
from taper.precision.learned import Activations, Prompts, padded, predict

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Arrays = dict[str, NDArray[np.floating]]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How to train.

    Attributes:
        learning_rate: of Adam.
        weight_decay: decoupled (AdamW), of the matrices and the query.
        batch_size: prompts in a step.
        max_epochs: over all prompts.
        patience: epochs without a better evaluation loss before the end.
        evaluation_frac: share of the prompts, the first ones, that only tell when to stop.
        seed: of the first weights and of the order.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    batch_size: int = 32
    max_epochs: int = 60
    patience: int = 12
    evaluation_frac: float = 0.2
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Trained:
    """A predictor and what it was chosen by.

    Attributes:
        weights: those of the least evaluation loss, at float16's precision. Where no epoch beats the guess
            that does not look at the prompt, they always give the class nearest to the mean label.
        epoch: after which they were taken; 0 is that constant.
        loss: balanced cross-entropy on the evaluation prompts, in nats.
        chance_loss: of the best guess that does not look: log of the number of their classes. The constant
            counts with it.
    """

    weights: PredictorWeights
    epoch: int
    loss: float
    chance_loss: float


def train(
    prompts: Sequence[tuple[F64, F64]], labels: Int64, num_classes: int, kv_heads: int, plan: TrainingPlan
) -> Trained:
    """Fit one predictor.

    Args:
        prompts: keys and values of each, float64 (tokens, head_dim), in random order.
        labels: int64 (prompts,), 0..num_classes - 1.
        num_classes: of the predictor.
        kv_heads: of the model.
        plan: how.
    """
    generator = np.random.default_rng(plan.seed)
    weights = initial_weights(kv_heads, prompts[0][0].shape[1], num_classes, generator)
    num_held = max(1, round(plan.evaluation_frac * len(prompts)))
    held, held_labels = padded(prompts[:num_held]), labels[:num_held]
    held_shares = balanced(held_labels)
    adam = Adam(weights, plan)
    constant = _constant(weights, round(float(labels.mean())))
    chance = float(np.log(len(np.unique(held_labels))))
    best = Trained(constant, 0, chance, chance)
    for epoch in range(1, plan.max_epochs + 1):
        if epoch - best.epoch > plan.patience:
            break
        shares = balanced(labels[num_held:])
        order = generator.permutation(len(prompts) - num_held)
        for begin in range(0, len(order), plan.batch_size):
            batch = order[begin : begin + plan.batch_size]
            inputs = padded([prompts[num_held + i] for i in batch])
            # Shares of the whole part: a batch then weighs as much as the classes in it.
            gradient = gradients(weights, inputs, labels[num_held + batch], shares[batch])
            weights = adam.step(weights, gradient)
        rounded = _as_stored(weights)
        loss = cross_entropy(predict(rounded, held).logits, held_labels, held_shares)
        if loss < best.loss:
            best = Trained(rounded, epoch, loss, chance)
    return best


def initial_weights(
    kv_heads: int, head_dim: int, num_classes: int, generator: np.random.Generator
) -> PredictorWeights:
    """Queries as Xavier, the hidden layer as He, classes near zero: the first guess is no guess."""
    features = kv_heads * head_dim
    hidden = hidden_size(features)
    shapes = PredictorWeights.shapes(kv_heads, head_dim, hidden, num_classes)
    deviations = {"query": features**-0.5, "hidden_weight": (2 / features) ** 0.5, "class_weight": 1e-3}
    arrays = {
        name: deviations.get(name, 0.0) * generator.standard_normal(shape) for name, shape in shapes.items()
    }
    arrays["norm_gain"] += 1.0
    return PredictorWeights(**{name: array.astype(np.float32) for name, array in arrays.items()})


def balanced(labels: Int64) -> F64:
    """Each prompt's share of the loss: the classes that occur weigh the same, all shares sum to 1."""
    counts = np.bincount(labels)
    return 1.0 / (np.count_nonzero(counts) * counts[labels])


def cross_entropy(logits: F64, labels: Int64, shares: F64) -> float:
    """Sum over the prompts of share times -log softmax(logits)[label], in nats."""
    top = logits.max(axis=1)
    norms = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
    return float((shares * (norms - logits[np.arange(len(labels)), labels])).sum())


def gradients(weights: PredictorWeights, prompts: Prompts, labels: Int64, shares: F64) -> Arrays:
    """Derivatives of `cross_entropy` by every weight, float64, by name."""
    found = predict(weights, prompts)
    logits = found.logits - found.logits.max(axis=1, keepdims=True)
    errors = np.exp(logits)
    errors /= errors.sum(axis=1, keepdims=True)
    errors[np.arange(len(labels)), labels] -= 1.0
    errors *= shares[:, None]
    to_hidden = (errors @ weights.class_weight) * (found.hidden > 0)
    to_features = to_hidden @ weights.hidden_weight
    return {
        "query": _query_gradient(weights, prompts, found, to_features),
        "norm_gain": (to_features * found.normed).sum(axis=0),
        "norm_bias": to_features.sum(axis=0),
        "hidden_weight": to_hidden.T @ found.features,
        "hidden_bias": to_hidden.sum(axis=0),
        "class_weight": errors.T @ found.hidden,
        "class_bias": errors.sum(axis=0),
    }


def _query_gradient(weights: PredictorWeights, prompts: Prompts, found: Activations, to_features: F64) -> F64:
    """Back through layer norm, the mean over queries, and softmax."""
    heads, _, head_dim = weights.query.shape
    to_normed = to_features * weights.norm_gain
    along = (to_normed * found.normed).mean(axis=1, keepdims=True)
    centred = to_normed - to_normed.mean(axis=1, keepdims=True) - found.normed * along
    to_flat = centred * found.inverse_deviation
    to_pooled = to_flat.reshape(-1, head_dim, heads).swapaxes(1, 2)
    # Every query of a head has the same part in its mean.
    to_attention = (to_pooled @ prompts.values.swapaxes(1, 2) / heads)[:, :, None, :]
    mean = (found.attention * to_attention).sum(axis=3, keepdims=True)
    to_scores = found.attention * (to_attention - mean)
    by_query = np.einsum("bijt,btd->ijd", to_scores, prompts.keys, optimize=True)
    return np.asarray(by_query / np.sqrt(head_dim), dtype=np.float64)


class Adam:
    """Adam (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019)."""

    def __init__(self, weights: PredictorWeights, plan: TrainingPlan) -> None:
        self._plan = plan
        self._means = {name: np.zeros(array.shape) for name, array in weights.arrays.items()}
        self._squares = {name: np.zeros(array.shape) for name, array in weights.arrays.items()}
        self._steps = 0

    def step(self, weights: PredictorWeights, gradient: Arrays) -> PredictorWeights:
        """The weights after one step; the given ones stay as they are."""
        self._steps += 1
        return PredictorWeights(
            **{name: self._stepped(name, array, gradient[name]) for name, array in weights.arrays.items()}
        )

    def _stepped(self, name: str, array: F32, gradient: NDArray[np.floating]) -> F32:
        first, second = _BETAS
        self._means[name] += (1 - first) * (gradient - self._means[name])
        self._squares[name] += (1 - second) * (gradient**2 - self._squares[name])
        mean = self._means[name] / (1 - first**self._steps)
        deviation = np.sqrt(self._squares[name] / (1 - second**self._steps))
        decay = self._plan.weight_decay if array.ndim > 1 else 0.0
        change = self._plan.learning_rate * (mean / (deviation + _EPSILON) + decay * array)
        return np.asarray(array - change, dtype=np.float32)


def _constant(weights: PredictorWeights, label: int) -> PredictorWeights:
    """Weights that give one class whatever the prompt."""
    bias = np.zeros_like(weights.class_bias)
    bias[label] = 1.0
    return _as_stored(replace(weights, class_weight=np.zeros_like(weights.class_weight), class_bias=bias))


def _as_stored(weights: PredictorWeights) -> PredictorWeights:
    """What a file would give back."""
    shapes = {name: array.shape for name, array in weights.arrays.items()}
    return PredictorWeights.from_text(weights.to_text(), shapes)
