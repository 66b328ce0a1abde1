"""Activation bits per tensor type: the adaptive precision combination search of Anda (arXiv 2411.15982).

Uniform combinations are queued as seeds. The cheapest queued combination is evaluated; one that is cheaper
than the best so far and holds the loss becomes the best, and its neighbours, one entry lower by a bit, join
the queue.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from taper.errors import UsageError

# The paper's seeds, limit of evaluations, and what it counts costs with: 4-bit weights, against float16.
SEEDS = range(4, 14)
MAX_EVALUATIONS = 32
WEIGHT_BITS = 4
FLOAT_BITS = 16

Combination = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One combination that was tried.

    Attributes:
        bits: magnitude bits of each tensor type.
        cost: BOPs, or what the search was given.
        loss: as measured.
        is_best: whether it held the loss at less than the cost of the best before it.
    """

    bits: Combination
    cost: float
    loss: float
    is_best: bool


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: None where nothing that was tried held the loss.
        evaluations: in order.
        is_finished: whether nothing that could still become the best was left; False: the limit came first.
    """

    best: Evaluation | None
    evaluations: tuple[Evaluation, ...]
    is_finished: bool


def bops(macs: Sequence[int], bits: Sequence[int], weight_bits: int = WEIGHT_BITS) -> int:
    """Bit operations of a combination: multiplications of each tensor type times the bits of both factors.

    Args:
        macs: multiply-accumulates of each tensor type; only their ratios matter to the search.
        bits: magnitude bits of each.
        weight_bits: of the other factor.
    """
    return sum(count * b * weight_bits for count, b in zip(macs, bits, strict=True))


def bops_saving(macs: Sequence[int], bits: Sequence[int]) -> float:
    """How many times fewer bit operations than float16 activations, which count as 16 bits."""
    return bops(macs, [FLOAT_BITS] * len(macs)) / bops(macs, bits)


def search_bits(
    macs: Sequence[int],
    loss: Callable[[Combination], float],
    max_loss: float,
    *,
    max_evaluations: int = MAX_EVALUATIONS,
    early_stop: bool = True,
    progress: Callable[[Evaluation], None] = lambda evaluation: None,
) -> SearchResult:
    """Find the combination of least cost that holds a loss, as the paper does.

    Of equal costs the one queued first is tried first; neighbours are queued in the tensor types' order.

    Args:
        macs: multiply-accumulates of each tensor type, positive.
        loss: of a combination on calibration data, such as perplexity over that of float activations, minus
            1; called once for each combination. NaN never holds.
        max_loss: the largest loss that is accepted.
        max_evaluations: the paper's cap on iterations.
        early_stop: stop once the cheapest queued combination costs as much as the best; the paper goes on,
            which changes neither the best nor the path to it.
        progress: called with each evaluation.

    Raises:
        UsageError: no tensor type, one without multiplications, or `max_evaluations` below 1.
    """
    if not macs or min(macs) <= 0 or max_evaluations < 1:
        raise UsageError(f"macs {[*macs]} and {max_evaluations} evaluations; all must be positive")
    seeds = [(bits,) * len(macs) for bits in SEEDS]
    # Neighbours cost less than all that is queued, so only neighbours of one combination can cost the same,
    # and among these the order of the heap is the order of the tensor types.
    return search_combinations(
        seeds,
        lambda bits: bops(macs, bits),
        _lowered,
        loss,
        max_loss,
        max_evaluations=max_evaluations,
        early_stop=early_stop,
        progress=progress,
    )


def search_combinations(
    seeds: Sequence[Combination],
    cost_of: Callable[[Combination], float],
    neighbours: Callable[[Combination], Sequence[Combination]],
    loss: Callable[[Combination], float],
    max_loss: float,
    *,
    max_evaluations: int,
    early_stop: bool = True,
    progress: Callable[[Evaluation], None] = lambda evaluation: None,
) -> SearchResult:
    """The same search over any variables and any cost.

    Args:
        seeds: what is queued at first.
        cost_of: of a combination.
        neighbours: of one that became the best: cheaper ones.
        loss, max_loss, max_evaluations, early_stop, progress: as in `search_bits`.
    """
    queue = [(cost_of(bits), bits) for bits in seeds]
    heapq.heapify(queue)
    queued = set(seeds)
    best: Evaluation | None = None
    evaluations: list[Evaluation] = []
    while queue and len(evaluations) < max_evaluations and not (early_stop and _is_beaten(queue[0][0], best)):
        cost, bits = heapq.heappop(queue)
        lost = loss(bits)
        tried = Evaluation(bits, cost, lost, lost <= max_loss and not _is_beaten(cost, best))
        evaluations.append(tried)
        progress(tried)
        if tried.is_best:
            best = tried
            for neighbour in neighbours(bits):
                if neighbour not in queued:
                    queued.add(neighbour)
                    heapq.heappush(queue, (cost_of(neighbour), neighbour))
    return SearchResult(best, tuple(evaluations), not queue or _is_beaten(queue[0][0], best))


def _is_beaten(cost: float, best: Evaluation | None) -> bool:
    return best is not None and cost >= best.cost


def _lowered(bits: Combination) -> list[Combination]:
    """The combinations with one entry lower by one bit, none below 1."""
    return [(*bits[:i], b - 1, *bits[i + 1 :]) for i, b in enumerate(bits) if b > 1]
