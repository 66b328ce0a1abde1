"""Make tests/goldens/*.npz again from torch and transformers: python tests/parity/make_goldens.py."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from reference import transformers_run

from taper.testing.parity_cases import GOLDEN_CASES, golden_positions

GOLDENS = Path(__file__).parent.parent / "goldens"


def main() -> None:
    """Keep each case's rotary frequencies and the logits of a few positions; all stay below 64 KiB."""
    logits, ropes = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in GOLDEN_CASES:
            rows, ropes[case.name] = transformers_run(case, Path(scratch) / case.name)
            logits[case.name] = rows[golden_positions(case)]
    for name, arrays in (("logits", logits), ("rope", ropes)):
        path = GOLDENS / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {len(arrays)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
