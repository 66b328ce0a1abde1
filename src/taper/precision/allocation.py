"""Bits per layer: the planes of each matrix under a budget, from the measured cost of every width.

The model's loss is taken to be the sum of its matrices' (KL divergences of small, independent errors add up),
so the best widths are a multiple-choice knapsack, solved by dynamic programming over the budget (Kellerer,
Pferschy, Pisinger, "Knapsack Problems", 2004, section 11.5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from taper.errors import UsageError

# Cells of the budget. Where the sizes' greatest common divisor gives no more, the result is exact: a model of
# 1.1 B weights has 13,000. Elsewhere sizes are rounded up to a cell, which leaves at most one cell a matrix
# unused: 155 matrices of 65,536 cells are 0.24 % of the planes, and the table of choices is 10 MB.
MAX_CELLS = 1 << 16

Losses = Mapping[str, Mapping[int, float]]


def allocate(losses: Losses, plane_sizes: Mapping[str, int], budget: float) -> dict[str, int]:
    """The width of every matrix with the least sum of losses whose planes fit the budget.

    Ties go to fewer planes of the earlier matrices, so the result is the same on every machine. A larger
    budget never has a larger loss.

    Args:
        losses: matrix name to width to loss; the widths are consecutive.
        plane_sizes: matrix name to the size of one of its planes, in the unit of the budget: weights for a
            budget in bits (bits per weight times weights), or bytes.
        budget: what all planes together may take.

    Raises:
        UsageError: the least widths do not fit.
    """
    floor = sum(min(widths) * plane_sizes[name] for name, widths in losses.items())
    if not budget >= floor:
        raise UsageError(
            f"the budget of {budget:,.0f} is below {floor:,}, which the least widths take",
            hint="ask for more bits, or for a larger file",
        )
    room = sum((max(widths) - min(widths)) * plane_sizes[name] for name, widths in losses.items())
    if budget - floor >= room:
        return {name: min(widths, key=lambda bits: (widths[bits], bits)) for name, widths in losses.items()}
    cell = max(math.gcd(*plane_sizes.values()), -(-room // MAX_CELLS))
    num_cells = int((budget - floor) // cell)
    return _least(losses, {name: _cells(losses[name], plane_sizes[name], cell) for name in losses}, num_cells)


def predicted_loss(losses: Losses, widths: Mapping[str, int]) -> float:
    """The sum of the losses of these widths."""
    return math.fsum(losses[name][bits] for name, bits in widths.items())


def bits_per_weight(widths: Mapping[str, int], num_weights: Mapping[str, int]) -> float:
    """Planes read over weights, embedding and head included."""
    planes = sum(bits * num_weights[name] for name, bits in widths.items())
    return planes / sum(num_weights[name] for name in widths)


def _cells(widths: Mapping[int, float], plane_size: int, cell: int) -> dict[int, int]:
    """Cells that each width takes beyond the least one, rounded up."""
    least = min(widths)
    return {bits: -(-(bits - least) * plane_size // cell) for bits in sorted(widths)}


def _least(losses: Losses, cells: Mapping[str, Mapping[int, int]], num_cells: int) -> dict[str, int]:
    """`best[c]` is the least loss of the matrices so far in c cells; the choices are kept to walk back."""
    best = np.zeros(num_cells + 1)
    choices: dict[str, npt.NDArray[np.uint8]] = {}
    for name, widths in losses.items():
        least = min(widths)
        total = best + widths[least]
        choice = np.full(num_cells + 1, least, dtype=np.uint8)
        for bits, taken in cells[name].items():
            if taken > num_cells or bits == least:
                continue
            with_bits = best[: num_cells + 1 - taken] + widths[bits]
            better = with_bits < total[taken:]
            total[taken:][better] = with_bits[better]
            choice[taken:][better] = bits
        best, choices[name] = total, choice
    left, chosen = num_cells, {}
    for name in reversed(list(losses)):
        chosen[name] = int(choices[name][left])
        left -= cells[name][chosen[name]]
    return {name: chosen[name] for name in losses}
