"""The 54 BOPs savings that Anda prints, computed from its printed tuples.

    python benchmarks/anda/bops.py

BOPs are multiplications times the bits of both factors: M magnitude bits times 4 for an activation in the
format, 16 times 4 for float16. Each tensor type counts by its matrices' multiplications, from the model's
dimensions. The last column runs the search of `taper.tune` on a made-up surface that holds the loss exactly
where no type has fewer bits than the printed tuple: it must end at the tuple, and says after how many
evaluations. A table for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from typing import Any

from published import CHOSEN, DATASETS, LOSSES, Chosen, geometric_mean

from taper.tune.anda_search import bops_saving, search_bits

TOLERANCE = 0.01


def mean_bits(macs: Sequence[int], bits: Sequence[int]) -> float:
    """Magnitude bits of an activation, weighted by the multiplications that it enters."""
    return sum(count * b for count, b in zip(macs, bits, strict=True)) / sum(macs)


def searched(chosen: Chosen) -> tuple[tuple[int, ...] | None, int]:
    """What the search ends at where the loss holds from the tuple upwards, and after how many evaluations."""

    def loss(bits: tuple[int, ...]) -> float:
        return float(any(b < least for b, least in zip(bits, chosen.bits, strict=True)))

    result = search_bits(chosen.model.macs, loss, 0.0)
    return result.best.bits if result.best else None, len(result.evaluations)


def row(chosen: Chosen) -> dict[str, Any]:
    """Computed and printed of one tuple."""
    saving = bops_saving(chosen.model.macs, chosen.bits)
    end, evaluations = searched(chosen)
    return {
        "model": chosen.model.name,
        "dataset": chosen.dataset,
        "loss": chosen.loss,
        "bits": chosen.bits,
        "mean_bits": mean_bits(chosen.model.macs, chosen.bits),
        "saving": saving,
        "printed": chosen.saving,
        "difference": saving - chosen.saving,
        "search_ends_there": end == chosen.bits,
        "evaluations": evaluations,
    }


def report() -> dict[str, Any]:
    """All tuples, and geometric means of their savings by dataset and loss."""
    rows = [row(chosen) for chosen in CHOSEN]
    means = []
    for dataset in DATASETS:
        for loss in LOSSES:
            column = [r for r in rows if (r["dataset"], r["loss"]) == (dataset, loss)]
            found, printed = (geometric_mean([r[key] for r in column]) for key in ("saving", "printed"))
            means.append({"dataset": dataset, "loss": loss, "saving": found, "of_printed": printed})
    return {
        "benchmark": "anda_bops",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "largest_difference": max(abs(r["difference"]) for r in rows),
        "within_tolerance": sum(abs(r["difference"]) <= TOLERANCE for r in rows),
        "reached_by_search": sum(r["search_ends_there"] for r in rows),
        "most_evaluations": max(r["evaluations"] for r in rows),
        "means": means,
        "rows": rows,
    }


def print_table(found: dict[str, Any]) -> None:
    """The figures for people."""
    names = f"{'model':<11} {'dataset':<9} {'loss':>5} {'q-o-u-d':>10} {'mean M':>7}"
    print(f"{names} {'saving':>7} {'printed':>7} {'differ':>7} {'found in':>8}")
    for r in found["rows"]:
        bits = "-".join(map(str, r["bits"]))
        evaluations = r["evaluations"] if r["search_ends_there"] else "not"
        name = f"{r['model']:<11} {r['dataset']:<9} {r['loss']:>5} {bits:>10} {r['mean_bits']:>7.3f}"
        print(f"{name} {r['saving']:>7.3f} {r['printed']:>7.2f} {r['difference']:>+7.3f} {evaluations:>8}")
    for mean in found["means"]:
        print(f"geometric mean, {mean['dataset']}, {mean['loss']}: {mean['saving']:.3f}")
    print(
        f"{found['within_tolerance']} of {len(found['rows'])} within {TOLERANCE}, "
        f"largest difference {found['largest_difference']:.4f}; the search ends at "
        f"{found['reached_by_search']}, after at most {found['most_evaluations']} evaluations"
    )


def main() -> None:
    """Run the command."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    found = report()
    print_table(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
