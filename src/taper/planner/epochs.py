"""The DFTSP paper's simulation: epochs of uplink, computation and downlink, and the batchings it compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from taper.errors import UsageError
from taper.planner.dftsp import Problem, dftsp, exhaustive, greedy
from taper.planner.edge import EdgeCell, EdgeRequest

# Numbers of the candidates, which are in order of arrival, that make up the batch.
Batching = Callable[[Problem], Sequence[int]]

# Recalled; the paper's users are drawn from these and from uniform bounds.
_LENGTHS = (128, 256, 512)
_LEAST_LATENCY_S = 0.5
# Assumed: users of a cell of 250 m, uniform over its area.
_NEAREST_M, _FARTHEST_M = 10.0, 250.0
# Nodes of a search; past it DFTSP answers with a greedy batch. benchmarks/dftsp/nodes.py: 200,000 in 360 ms.
_MAX_NODES = 20_000
_MAX_REQUESTS = 1_000_000


def draw_requests(rate: float, max_latency_s: float, duration_s: float, seed: int) -> list[EdgeRequest]:
    """Poisson arrivals; lengths of 128, 256 or 512; latency bounds from 0.5 s and accuracies, both uniform.

    Args:
        rate: requests a second.
        max_latency_s: upper end of the latency bounds.
        duration_s: seconds in which they come.
        seed: of the draw.

    Raises:
        UsageError: for a rate or a duration that is not positive, bounds below 0.5 s, or above a million
            requests.
    """
    for name, value, least in (
        ("rate", rate, 0.0),
        ("duration", duration_s, 0.0),
        ("greatest latency bound", max_latency_s, _LEAST_LATENCY_S),
    ):
        if not least < value < float("inf"):
            raise UsageError(f"the {name} is {value:g}", hint=f"give a finite number above {least:g}")
    if rate * duration_s > _MAX_REQUESTS:
        raise UsageError(
            f"{rate:g} requests a second for {duration_s:g} s are more than {_MAX_REQUESTS:,}",
            hint="lower one of them",
        )
    generator = np.random.default_rng(seed)
    count = int(generator.poisson(rate * duration_s))
    arrivals = np.sort(generator.uniform(0, duration_s, count))
    prompts, outputs = generator.choice(_LENGTHS, (2, count))
    latencies = generator.uniform(_LEAST_LATENCY_S, max_latency_s, count)
    accuracies = generator.uniform(0, 1, count)
    distances = np.sqrt(generator.uniform(_NEAREST_M**2, _FARTHEST_M**2, count))
    columns = (arrivals, prompts, outputs, latencies, accuracies, distances)
    return [EdgeRequest(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


@dataclass(slots=True)
class EpochsResult:
    """Of a run.

    Attributes:
        requests: that came.
        admitted: for which the precision is accurate enough.
        met: that were served within their latency.
        late: that were served too late.
        seconds: from 0 to the last arrival or the end of the last epoch.
        batches: sizes, one for each epoch that had a batch.
        problems: what each epoch had to choose from.
    """

    requests: int
    admitted: int
    met: int = 0
    late: int = 0
    seconds: float = 0.0
    batches: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Requests a second that were served within their latency."""
        return self.met / self.seconds if self.seconds else 0.0


def run_epochs(
    batching: Batching, cell: EdgeCell, requests: Sequence[EdgeRequest], seed: int = 0
) -> EpochsResult:
    """Serve requests in epochs until none is left.

    An epoch is T_U, the computation of its batch, and T_D; the next begins when it ends. Channels are drawn
    anew for each (Rayleigh fading). A request leaves when it could not be in time even alone. An epoch
    without a batch lasts T_U.

    Args:
        batching: chooses the members.
        cell: model, precision, node.
        requests: in order of arrival.
        seed: of the fading.
    """
    able = [request for request in requests if cell.admits(request)]
    result = EpochsResult(len(requests), len(able))
    generator = np.random.default_rng(seed)
    now, arrived = 0.0, 0
    waiting: list[EdgeRequest] = []
    while waiting or arrived < len(able):
        if not waiting:
            now = max(now, able[arrived].arrival_s)
        while arrived < len(able) and able[arrived].arrival_s <= now:
            waiting.append(able[arrived])
            arrived += 1
        waiting = [one for one in waiting if cell.compute_ns(one) <= cell.slack_ns(one, now)]
        if waiting:
            now += _epoch(batching, cell, waiting, now, generator, result)
    result.seconds = max(now, requests[-1].arrival_s) if requests else 0.0
    return result


def _epoch(
    batching: Batching,
    cell: EdgeCell,
    waiting: list[EdgeRequest],
    now: float,
    generator: np.random.Generator,
    result: EpochsResult,
) -> float:
    """Serve one batch, which leaves `waiting`; seconds that it took."""
    problem = cell.problem(waiting, now, generator.exponential(size=len(waiting)).tolist())
    chosen = sorted(batching(problem), reverse=True)
    result.problems.append(problem)
    if not chosen:
        return cell.node.uplink_s
    compute = sum(problem.candidates[number].compute_ns for number in chosen)
    met = sum(compute <= problem.candidates[number].slack_ns for number in chosen)
    result.met += met
    result.late += len(chosen) - met
    result.batches.append(len(chosen))
    for number in chosen:
        del waiting[number]
    return cell.node.uplink_s + compute / 1e9 + cell.node.downlink_s


def optimal_batching(problem: Problem) -> Sequence[int]:
    """DFTSP with a budget of 20,000 nodes."""
    return dftsp(problem, max_nodes=_MAX_NODES).chosen


def brute_force_batching(problem: Problem) -> Sequence[int]:
    """All subsets; UsageError where more than 20 wait."""
    return exhaustive(problem).chosen


def greedy_batching(problem: Problem) -> Sequence[int]:
    """Not in the paper: the quick answer that DFTSP falls back to."""
    return greedy(problem)


def no_batching(problem: Problem) -> Sequence[int]:
    """NoB: the first to come of those that can be served."""
    return next(([number] for number in range(len(problem.candidates)) if problem.fits([number])), [])


def checked_batching(problem: Problem) -> Sequence[int]:
    """Not in the paper: the first to come, each that leaves all of the batch in time."""
    chosen: list[int] = []
    for number in range(len(problem.candidates)):
        if problem.fits([*chosen, number]):
            chosen.append(number)
    return chosen


def static_batching(size: int) -> Batching:
    """StB: the first to come, up to a fixed number, as far as band and memory go; their slack is not looked
    at, so some are late. Fewer are served when no more wait.

    Args:
        size: of a full batch, at least 1.
    """
    if size < 1:
        raise UsageError(f"a batch of {size}", hint="give at least 1")

    def batching(problem: Problem) -> Sequence[int]:
        chosen: list[int] = []
        left = problem.budgets
        for number, one in enumerate(problem.candidates):
            after = tuple(budget - use for budget, use in zip(left, one.uses, strict=True))
            if len(chosen) < size and min(after) >= 0:
                chosen.append(number)
                left = after
        return chosen

    return batching


# By name: what the simulation compares. All subsets are not among them: their number forbids it.
BATCHINGS: dict[str, Batching] = {
    "dftsp": optimal_batching,
    "greedy": greedy_batching,
    "fcfs": checked_batching,
    "nob": no_batching,
    **{f"stb-{size}": static_batching(size) for size in (2, 4, 8, 16)},
}
