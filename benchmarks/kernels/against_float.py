"""Linear layers over planes beside the same layers of PyTorch in bfloat16 and float16, weights cold.

Every layer shape of the 1.1 B model, one token. A round times each side in turn over a pool of weights
larger than any cache; a ratio is that of one round, against the faster of PyTorch's two types. Both sides
get their activations ready-made. A table on stderr for people, JSON on the last line of stdout.

python -m pip install torch==2.13.0
python benchmarks/kernels/against_float.py --bits 2 --threads 2 --samples 7
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from planes import Case, Pool, Shape, activations, environment

from taper import kernels

FLOAT_BYTES = 800_000_000  # weights of each type: many times the largest cache
NUM_LAYERS = 22
LAYERS: dict[str, tuple[Shape, int]] = {  # of the 1.1 B model: (out, in), how often a step has it
    "qkv": ((2560, 2048), NUM_LAYERS),
    "o": ((2048, 2048), NUM_LAYERS),
    "gate_up": ((11264, 2048), NUM_LAYERS),
    "down": ((2048, 5632), NUM_LAYERS),
    "head": ((32000, 2048), 1),
}
TYPES = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Row:
    """A layer's medians in microseconds a call, and PyTorch's faster type over ours."""

    layer: str
    planes_us: float
    float_us: dict[str, float]
    ratio: float
    ratio_least: float
    ratio_most: float


def time_of(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds a call."""
    start_s = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start_s) / len(calls)


def float_calls(torch: Any, shape: Shape, name: str) -> list[Callable[[], object]]:
    """One call for each matrix of a cold pool."""
    dtype = getattr(torch, name)
    count = max(1, FLOAT_BYTES // (2 * shape[0] * shape[1]))
    weights = torch.randn(count, *shape).to(dtype)
    x = torch.randn(1, shape[1]).to(dtype)
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]


def rounds(torch: Any, pool: Pool, case: Case, num_samples: int) -> dict[str, list[float]]:
    """Seconds a call of each side, round by round."""
    shape = (case.out_features, case.in_features)
    x = activations(case)
    sides: dict[str, list[Callable[[], object]]] = {
        "planes": [lambda m=m: m.matmul(x, case.bits) for m in pool.matrices(case)],
        **{name: float_calls(torch, shape, name) for name in TYPES},
    }
    for calls in sides.values():
        time_of(calls[:3])
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_samples):
        for name, calls in sides.items():
            taken[name].append(time_of(calls))
    return taken


def row_of(layer: str, taken: dict[str, list[float]]) -> Row:
    """Medians of a layer's rounds, or of the sums over all layers."""
    ratios = [min(floats) / ours for ours, *floats in zip(*taken.values(), strict=True)]
    medians = {name: 1e6 * statistics.median(times) for name, times in taken.items()}
    return Row(
        layer,
        medians.pop("planes"),
        medians,
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )


def print_row(row: Row) -> None:
    """One line of the table."""
    floats = " ".join(f"{name} {us:9.1f} us" for name, us in row.float_us.items())
    print(
        f"{row.layer:8} planes {row.planes_us:8.1f} us {floats} ratio {row.ratio:5.2f} "
        f"({row.ratio_least:.2f}-{row.ratio_most:.2f})",
        file=sys.stderr,
        flush=True,
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--threads", type=int, default=kernels.num_threads())
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    return parser.parse_args()


def main() -> None:
    """Time the layers, then add them up to a step."""
    args = parse_arguments()
    try:
        import torch
    except ImportError as error:
        sys.exit(f"error: torch cannot be imported: {error}\nhint: pip install torch==2.13.0")
    torch.set_num_threads(args.threads)
    kernels.set_num_threads(args.threads)
    pool, result = Pool(), []
    step: dict[str, list[float]] = {}
    for layer in args.layers:
        shape, count = LAYERS[layer]
        case = Case(kernels.isa(), *shape, args.bits, 1, args.threads, cold=True, wide=False)
        taken = rounds(torch, pool, case, args.samples)
        for name, times in taken.items():
            sums = step.setdefault(name, [0.0] * args.samples)
            step[name] = [total + count * t for total, t in zip(sums, times, strict=True)]
        result.append(row_of(layer, taken))
        print_row(result[-1])
    result.append(row_of("step", step))
    print_row(result[-1])
    facts = environment() | {"torch": torch.__version__, "isa": kernels.isa(), "threads": args.threads}
    print(json.dumps({"environment": facts, "bits": args.bits, "results": [asdict(row) for row in result]}))


if __name__ == "__main__":
    main()
