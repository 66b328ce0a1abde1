"""All policies on the simulator at several loads: goodput, broken promises, bits, planner time.

    python benchmarks/serving/simulate.py --out DIR [--calibration FILE] [--requests 600] [--seeds 3]

The machine is the embedded model's measured step times: run `taper plan --calibrate -` first. Saturation is
what FCFS serves a second at the least width when all wait at once without a deadline. Requests:
- prompts and limits log-normal (median 55; 8 to 400, 8 to 256 tokens), answers of 30 to 100 % of the limit;
- deadlines 4, 8, 20 or 60 times what one takes alone at the largest width (20, 30, 30, 20 % of them);
- floors of none, 3, 4 or the largest width (30, 25, 25, 20 %);
- Poisson arrivals; passes vary by 10 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from policies import Greedy, policies

from taper.engine import embedded_model
from taper.engine.schedule import Scheduler, StepTime, Terms
from taper.formats.container import TaperFile
from taper.planner.calibration import calibration_key, calibration_path, load_calibration
from taper.planner.planner import Planner
from taper.planner.simulator import Machine, SimulatedRequest, simulate

LOADS = (0.5, 1.0, 1.5, 2.0, 3.0)
NOISE = 0.1
Shape = tuple[int, int, int, Terms]


def shapes(times: StepTime, widths: Sequence[float], count: int, seed: int) -> list[Shape]:
    """Prompt, output and limit in tokens, and terms."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt = int(np.clip(generator.lognormal(4, 0.7), 8, 400))
        limit = int(np.clip(generator.lognormal(4, 0.7), 8, 256))
        output = max(1, int(limit * min(1, generator.uniform(0.3, 1.3))))
        alone = times.seconds(widths[-1], 0, prompt, prompt * prompt // 2)
        alone += limit * times.seconds(widths[-1], 1, 0, prompt)
        slack = generator.choice([4, 8, 20, 60], p=[0.2, 0.3, 0.3, 0.2])
        floor = float(generator.choice([0, 3, 4, widths[-1]], p=[0.3, 0.25, 0.25, 0.2]))
        found.append((prompt, output, limit, Terms(deadline_s=float(alone * slack), min_bits=floor)))
    return found


def saturation(machine: Machine) -> float:
    """Requests a second that FCFS serves at the least width when all wait at once."""
    waiting = [
        SimulatedRequest(0.0, prompt, output, limit, Terms())
        for prompt, output, limit, _ in shapes(machine.step_time, machine.widths, 600, 99)
    ]
    first = Greedy(lambda now, state, view: view.arrival_s, bits=machine.widths[0])
    return len(waiting) / simulate(first, waiting, machine).seconds


def trace(machine: Machine, rate: float, count: int, seed: int) -> list[SimulatedRequest]:
    """Poisson arrivals of a rate."""
    arrivals = np.cumsum(np.random.default_rng(seed + 1000).exponential(1 / rate, count))
    described = shapes(machine.step_time, machine.widths, count, seed)
    return [SimulatedRequest(float(at), *one) for at, one in zip(arrivals, described, strict=True)]


def measure(
    make: Callable[[], Scheduler], machine: Machine, rate: float, count: int, seeds: int
) -> dict[str, object]:
    """One policy at one rate, all seeds together."""
    total: Counter[str] = Counter()
    bits: Counter[float] = Counter()
    goodputs = []
    for seed in range(seeds):
        result = simulate(make(), trace(machine, rate, count, seed), machine, seed)
        goodputs.append(result.goodput)
        bits += result.bits
        total.update(
            admitted=result.admitted,
            refused=result.refused,
            violations=result.violations,
            floor_violations=result.floor_violations,
            late_starts=sum(outcome.late_start for outcome in result.outcomes),
            passes=result.passes,
        )
        total["busy_us"] += round(result.busy_s * 1e6)
        total["planner_us"] += round(result.planner_s * 1e6)
    return {
        "goodput": float(np.mean(goodputs)),
        "goodput_by_seed": goodputs,
        "violations_frac": total["violations"] / max(1, total["admitted"]),
        "planner_frac": total["planner_us"] / max(1, total["busy_us"]),
        "planner_us_per_pass": total["planner_us"] / max(1, total["passes"]),
        "bits": {f"{width:g}": count for width, count in sorted(bits.items())},
        **{name: total[name] for name in ("admitted", "refused", "floor_violations", "late_starts")},
    }


def summary(rows: dict[str, dict[float, dict[str, object]]]) -> dict[str, object]:
    """The planner against the others."""
    ours = rows["planner"]
    others = {name: row for name, row in rows.items() if name != "planner"}
    verdict = {}
    for load, own in ours.items():
        best = max(others, key=lambda name: others[name][load]["goodput"])
        fcfs = max((n for n in others if n.startswith("fcfs")), key=lambda n: others[n][load]["goodput"])
        verdict[f"{load:g}"] = {
            "goodput": own["goodput"],
            "best_other": best,
            "over_best": own["goodput"] / others[best][load]["goodput"],
            "over_best_fcfs": own["goodput"] / others[fcfs][load]["goodput"],
            "over_edf": own["goodput"] / others["edf"][load]["goodput"],
            "violations_frac": own["violations_frac"],
            "planner_frac": own["planner_frac"],
        }
    return verdict


def plot(rows: dict[str, dict[float, dict[str, object]]], path: Path) -> None:
    """Goodput over load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, row in rows.items():
        style = {"color": "black", "linewidth": 2.5} if name == "planner" else {"linewidth": 1.2}
        axes.plot(list(row), [one["goodput"] for one in row.values()], marker="o", label=name, **style)
    axes.set(
        xlabel="load / saturation", ylabel="requests a second that met deadline and floor", ylim=(0, None)
    )
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run everything, print a table, write JSON and a plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    path = options.calibration or calibration_path(calibration_key(TaperFile.open(embedded_model())))
    found = load_calibration(path)
    times = found.step_time
    machine = Machine(times, tuple(times.coefficients), noise=NOISE)
    rate = saturation(machine)
    print(f"saturation: {rate:.1f} requests a second; step times off by {found.mape:.1%} on average")
    print(
        "goodput, requests/s (broken promises; planner's share of the passes' time) at",
        *LOADS,
        "x saturation",
    )
    rows: dict[str, dict[float, dict[str, object]]] = {}
    for name, make in {"planner": Planner, **policies(machine.widths)}.items():
        rows[name] = {
            load: measure(make, machine, load * rate, options.requests, options.seeds) for load in LOADS
        }
        cells = [
            f"{one['goodput']:6.1f} ({one['violations_frac']:5.1%}; {one['planner_frac']:5.1%})"
            for one in rows[name].values()
        ]
        print(f"{name:26s}", "  ".join(cells), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"saturation": rate, "mape": found.mape, "noise": NOISE, "policies": rows}
    (options.out / "simulation.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    try:
        plot(rows, options.out / "simulation.png")
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    print(json.dumps({"saturation": rate, "planner": summary(rows)}))


if __name__ == "__main__":
    main()
