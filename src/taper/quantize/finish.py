"""The last steps of a quantisation: measure the finished planes, keep what the budget asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from taper.formats.container import TaperFile
from taper.formats.spec import FINAL_NORM
from taper.formats.writer import write_taper
from taper.quantize.sensitivity import cut_passages, default_plan, measure_sensitivity
from taper.quantize.shards import ShardFolder
from taper.quantize.shrink import Budget, Shrinker

Int32 = NDArray[np.int32]


def finish(
    whole: Path,
    out: Path,
    tokens: Int32,
    text: str,
    budget: Budget | None,
    shards: ShardFolder,
    progress: Callable[[str, float, float | None], None],
) -> None:
    """Measure the sensitivity of a file with all planes and write the file that was asked for.

    Figures are kept in the shard folder after each matrix, so a stopped run goes on from there.

    Args:
        whole: the file with all planes.
        out: the file to write.
        tokens: int32 (sequences, tokens), of the calibration.
        text: name of the calibration text.
        budget: None keeps all planes.
        shards: of this quantisation.
        progress: called as progress(matrix, done fraction, seconds left).
    """
    file = TaperFile.open(whole)
    plan = default_plan(file)
    sensitivity = measure_sensitivity(
        file,
        cut_passages(tokens, plan.num_tokens),
        plan.bits,
        text,
        found=shards.sensitivity(),
        on_matrix=shards.save_sensitivity,
        progress=progress,
    )
    if budget is not None:
        shrinker = Shrinker(file, budget, sensitivity)
        shrinker.write(out, shrinker.fit().widths)
        return
    write_taper(
        out,
        replace(file.header, sensitivity=sensitivity),
        lambda: (file.matrix(spec.name) for spec in file.matrices),
        {FINAL_NORM: file.tensor(FINAL_NORM)},
    )
