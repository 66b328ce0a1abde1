"""What a tuned schedule is held against: uniform widths, other orders of its own widths, and PMPD's grid."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from taper.tune.schedule import Schedule, uniform

# The order is drawn until it is another one; a schedule of one width has no other.
_RANDOM_SEEDS = range(16)


def order_controls(winner: Schedule) -> dict[str, Schedule]:
    """Schedules with the winner's decode passes in another order and the same prompt bits."""
    prefill = winner.prefill_bits
    reverse = Schedule(prefill, _of_passes(winner.decode_bits[::-1]))
    shuffled = (_shuffled(winner, seed) for seed in _RANDOM_SEEDS)
    others = (schedule for schedule in shuffled if schedule.key not in (winner.key, reverse.key))
    return {
        "reverse order": reverse,
        "flat mix": Schedule(prefill, _of_passes(evenly_mixed(winner.decode_bits))),
        "random order": next(others, winner),
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


def _shuffled(winner: Schedule, seed: int) -> Schedule:
    """The winner's segments in random order, with as many decode passes at each width.

    Token 0 needs no pass, so the first run has one less; where another run comes first, that pass moves.
    """
    order = np.random.default_rng(seed).permutation(len(winner.runs))
    passes = [bits for place in order for bits, count in [winner.runs[int(place)]] for _ in range(count)]
    passes.remove(winner.runs[0][0])
    return Schedule(winner.prefill_bits, _of_passes(passes))
