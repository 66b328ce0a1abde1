"""What a tuned schedule is held against: uniform widths, other orders of its own widths, and PMPD's grid."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from taper.tune.schedule import Schedule, uniform

RANDOM_SEED = 0


def order_controls(winner: Schedule) -> dict[str, Schedule]:
    """Schedules with the winner's decode passes in another order and the same prompt bits."""
    prefill, runs = winner.prefill_bits, winner.runs
    shuffled = np.random.default_rng(RANDOM_SEED).permutation(len(runs))
    return {
        "reverse order": Schedule(prefill, _of_passes(winner.decode_bits[::-1])),
        "flat mix": Schedule(prefill, _of_passes(evenly_mixed(winner.decode_bits))),
        "random order": _repaired(winner, [runs[int(i)] for i in shuffled]),
    }


def uniform_controls(widths: Iterable[float], max_tokens: int) -> dict[str, Schedule]:
    """One width for everything, each."""
    return {f"uniform {bits:g}": uniform(bits, max_tokens) for bits in sorted(widths, reverse=True)}


def thirds(high: float, widths: Iterable[float], max_tokens: int) -> list[Schedule]:
    """PMPD's static grid (arXiv 2410.13461): prompt and s decode passes at the high width, the others at a
    lower one, s = 0, L/3 or 2 L/3; the first decode pass always runs at the high width.
    """
    found: dict[str, Schedule] = {}
    for low in sorted({bits for bits in widths if bits < high}):
        for third in range(3):
            start = min(max_tokens, max(2, third * max_tokens // 3 + 1))
            rest = ((low, max_tokens - start),) if start < max_tokens else ()
            schedule = Schedule(high, ((high, start), *rest))
            found[schedule.key] = schedule
    return [*found.values()]


def evenly_mixed(bits: Sequence[float]) -> list[float]:
    """The same widths as often, each spread evenly: every place takes the width that is furthest behind its
    share.
    """
    counts = Counter(bits)
    used = dict.fromkeys(counts, 0)
    mixed = []
    for place in range(1, len(bits) + 1):
        due = max(counts, key=lambda width: (counts[width] * place / len(bits) - used[width], width))
        used[due] += 1
        mixed.append(due)
    return mixed


def _of_passes(bits: Sequence[float]) -> tuple[tuple[float, int], ...]:
    """Runs of the widths of decode passes; token 0, which has no decode pass, joins the first."""
    runs = [(width, len([*group])) for width, group in itertools.groupby(bits)]
    return ((runs[0][0], runs[0][1] + 1), *runs[1:]) if runs else ((0.0, 1),)


def _repaired(winner: Schedule, runs: Sequence[tuple[float, int]]) -> Schedule:
    """The runs in this order, with as many decode passes at each width as the winner has.

    Token 0 needs no pass, so the first run loses one; where another run comes first, that pass moves.
    """
    passes = [bits for bits, count in runs for _ in range(count)]
    first = winner.runs[0][0]
    passes.remove(first)
    return Schedule(winner.prefill_bits, _of_passes(passes))
