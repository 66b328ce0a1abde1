"""What rounding costs in the Anda format: signal over error on made-up groups of 64.

    python benchmarks/anda/rounding.py

Truncation is the paper's. Nearest is ours: a value that would round up to 2^M becomes 2^M - 1. Raised is
nearest with the exponent one higher in that case, as the engine's activations have it (docs/numerics.md).
Values are Gaussian; in the second half one in a hundred is 20 times as large. Decibels, over all groups
together. A table for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taper.kernels import anda, oracle

MAGNITUDE_BITS = range(3, 9)
OUTLIERS = (0.0, 0.01)
OUTLIER_FACTOR = 20


def draw(seed: int, num_groups: int, outlier_frac: float) -> NDArray[np.float32]:
    """Gaussian groups (num_groups, 64) with outliers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_groups, anda.DEFAULT_GROUP_SIZE))
    x[rng.random(x.shape) < outlier_frac] *= OUTLIER_FACTOR
    return x.astype(np.float32)


def snr_db(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """Energy of x over that of y - x."""
    signal, error = (np.square(v, dtype=np.float64).sum() for v in (x, y - x))
    return float(10 * np.log10(signal / error))


def raised(x: NDArray[np.float32], magnitude_bits: int) -> NDArray[np.float32]:
    """To nearest, the exponent as in the engine."""
    found = oracle.quantize(x, x.shape[1], magnitude_bits)
    return (oracle.integers(found) * found.scale[:, None]).astype(np.float32)


def report(seed: int, num_groups: int) -> dict[str, Any]:
    """All figures."""
    rows = []
    for outlier_frac in OUTLIERS:
        x = draw(seed, num_groups, outlier_frac)
        for bits in MAGNITUDE_BITS:
            row: dict[str, Any] = {"outlier_frac": outlier_frac, "bits": bits}
            for rounding in ("truncate", "nearest"):
                row[rounding] = snr_db(x, anda.dequantize(anda.quantize(x, bits, rounding=rounding)))
            row["raised"] = snr_db(x, raised(x, bits))
            rows.append(row)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"benchmark": "anda_rounding", "date": date, "seed": seed, "groups": num_groups, "rows": rows}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = report(options.seed, options.groups)
    print(f"{'outliers':>8} {'M':>3} {'truncate':>9} {'nearest':>9} {'raised':>9}")
    for r in found["rows"]:
        decibels = " ".join(f"{r[key]:>9.2f}" for key in ("truncate", "nearest", "raised"))
        print(f"{r['outlier_frac']:>8.0%} {r['bits']:>3} {decibels}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
