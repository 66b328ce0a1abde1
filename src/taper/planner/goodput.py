"""Goodput of schedulers under load, on the engine and on the simulator of the same machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Literal

from taper.engine import LLM
from taper.engine.batch import BLOCK_TOKENS, BatchSizes
from taper.engine.schedule import Scheduler, StepTime
from taper.errors import UsageError
from taper.planner.baselines import baselines
from taper.planner.planner import Planner
from taper.planner.replay import Recording, WithHost, replay, with_host
from taper.planner.simulator import Machine, SimulationResult, simulate
from taper.planner.traces import MAX_TOKENS, Arrivals, TracedRequest, mixed_trace

PLANNER = "planner"
_SATURATION_REQUESTS = 300
_NOISE = 0.1  # of the simulator's passes


@dataclass(frozen=True, slots=True)
class Row:
    """One policy at one load.

    Attributes:
        policy: name.
        load: arrivals over saturation.
        where: engine or simulator.
        arrivals: requests a second that came, a bound on every goodput.
        goodput: requests a second that met deadline and floor.
        met, admitted, refused: requests.
        violations_frac: of those that ran, the share that was late or cut.
        floor_violations, late_starts: requests with a pass below their floor; begun after their deadline.
        mean_bits: of the tokens.
        planner_frac: seconds of the scheduler over those of the passes.
        passes: that were run.
    """

    policy: str
    load: float
    where: str
    arrivals: float
    goodput: float
    met: int
    admitted: int
    refused: int
    violations_frac: float
    floor_violations: int
    late_starts: int
    mean_bits: float
    planner_frac: float
    passes: int


def named(names: Sequence[str], widths: tuple[float, ...]) -> dict[str, Callable[[], Scheduler]]:
    """Makers by name. Raises UsageError for a name that there is not."""
    known: dict[str, Callable[[], Scheduler]] = {PLANNER: Planner, **baselines(widths)}
    for name in names:
        if name not in known:
            raise UsageError(f"there is no policy {name!r}", f"choose of {', '.join(known)}")
    return {name: known[name] for name in names or known}


class Stand:
    """A model on this machine, with its saturation measured.

    Args:
        llm: with a KV cache of planes.
        step_time: of the model's passes alone.
        sizes: of the engine.

    Attributes:
        times: step times with what the engine does around a pass.
        saturation: requests a second that FCFS serves at the least width when all wait at once.

    Raises:
        UsageError: the model's context is too short for the load.
    """

    def __init__(self, llm: LLM, step_time: StepTime, sizes: BatchSizes) -> None:
        self.llm, self.sizes = llm, sizes
        if llm.engine.model.context_length < MAX_TOKENS:
            raise UsageError(
                f"the load has requests of up to {MAX_TOKENS} tokens; the model's context is "
                f"{llm.engine.model.context_length}",
                "measure with a model of a longer context",
            )
        self.widths = tuple(float(bits) for bits in range(llm.min_bits, llm.max_bits + 1))
        self.times = self._with_host(step_time)
        trace = mixed_trace(step_time, self.widths, inf, _SATURATION_REQUESTS, 99, has_terms=False)
        result = self.run(baselines(self.widths)[f"fcfs:{self.widths[0]:g}"](), trace, "engine")
        self.saturation = len(trace) / result.seconds

    def _with_host(self, step_time: StepTime) -> WithHost:
        """From runs at the least and the largest width, at loads that fill the batch and do not."""
        passes = []
        for bits in (self.widths[0], self.widths[-1]):
            for count, chunk in ((6, 1), (60, 1)):
                trace = mixed_trace(step_time, self.widths, inf, count, 98, has_terms=False)
                recording = Recording(baselines(self.widths)[f"fcfs:{bits:g}"]())
                replay(self.llm, recording, step_time, trace[::chunk], self.sizes)
                passes += recording.passes
        return with_host(step_time, passes)

    def run(
        self, scheduler: Scheduler, trace: Sequence[TracedRequest], where: Literal["engine", "simulator"]
    ) -> SimulationResult:
        """One run of a trace."""
        if where == "engine":
            return replay(self.llm, scheduler, self.times, trace, self.sizes)
        whole = -(-self.llm.engine.model.context_length // BLOCK_TOKENS)
        machine = Machine(
            self.times,
            self.widths,
            kv_blocks=self.sizes.kv_blocks or self.sizes.max_batch * whole,
            block_tokens=BLOCK_TOKENS,
            max_batch=self.sizes.max_batch,
            max_step_tokens=self.sizes.max_step_tokens,
            noise=_NOISE,
        )
        return simulate(scheduler, trace, machine)

    def trace(self, load: float, seconds: float, seed: int, arrivals: Arrivals) -> list[TracedRequest]:
        """Requests of about so many seconds at `load` times saturation; deadlines are reckoned with this
        machine's times."""
        rate = load * self.saturation
        return mixed_trace(self.times, self.widths, rate, max(2, round(rate * seconds)), seed, arrivals)

    def rows(
        self,
        policies: dict[str, Callable[[], Scheduler]],
        traces: dict[float, list[TracedRequest]],
        where: Literal["engine", "simulator"],
    ) -> Iterator[Row]:
        """Each policy on each trace by its load; the policies of a load run one after the other, so that they
        meet the machine in the same state."""
        for load, trace in traces.items():
            for name, make in policies.items():
                yield _row(name, load, where, self.run(make(), trace, where))


def _row(name: str, load: float, where: str, result: SimulationResult) -> Row:
    tokens = sum(result.bits.values())
    return Row(
        policy=name,
        load=load,
        where=where,
        arrivals=len(result.outcomes) / max(result.span_s or result.seconds, 1e-9),
        goodput=result.goodput,
        met=result.met,
        admitted=result.admitted,
        refused=result.refused,
        violations_frac=result.violations / max(1, result.admitted),
        floor_violations=result.floor_violations,
        late_starts=sum(outcome.late_start for outcome in result.outcomes),
        mean_bits=sum(bits * count for bits, count in result.bits.items()) / max(1, tokens),
        planner_frac=result.planner_s / result.busy_s if result.busy_s else 0.0,
        passes=result.passes,
    )


def verdict(rows: Sequence[Row], where: str) -> dict[str, dict[str, float | str]]:
    """The planner against the others at each load; empty without it."""
    found: dict[str, dict[str, float | str]] = {}
    for load in sorted({row.load for row in rows}):
        here = {row.policy: row for row in rows if row.load == load and row.where == where}
        own = here.pop(PLANNER, None)
        if own is None or not here:
            continue
        best = max(here.values(), key=lambda row: row.goodput)
        one: dict[str, float | str] = {"arrivals": own.arrivals, "goodput": own.goodput}
        one["best_other"] = best.policy
        one["over_best"] = own.goodput / best.goodput if best.goodput else inf
        fcfs = max((row.goodput for row in here.values() if row.policy.startswith("fcfs")), default=0.0)
        one |= {"over_best_fcfs": own.goodput / fcfs} if fcfs else {}
        one |= {"over_edf": own.goodput / here["edf"].goodput} if "edf" in here and here["edf"].met else {}
        one |= {"violations_frac": own.violations_frac, "planner_frac": own.planner_frac}
        found[f"{load:g}"] = one
    return found


def report(stand: Stand, rows: Sequence[Row]) -> dict[str, object]:
    """Everything, for JSON."""
    times = stand.times
    return {
        "saturation": stand.saturation,
        "host": {"factor": times.factor, "pass_s": times.pass_s, "row_s": times.row_s},
        "rows": [asdict(row) for row in rows],
        "verdict": {where: verdict(rows, where) for where in sorted({row.where for row in rows})},
    }
