"""The paper's sweep on a model of ours: perplexity against the bits of activations, and the tuples it finds.

    python benchmarks/anda/sweep.py models/taper-small.taper --text TEXT --text TEXT --json OUT.json

Weights are read at 4 bits and turned into float32; the inputs of a layer's matrices are rotated as in the
file, then taken through the Anda format with groups of 64 or one a row, rounded to nearest or truncated, and
multiplied as floats: a simulation of the format, apart from the engine, which has one exponent a row and
rounds to nearest. The reference is the same model with float activations (the paper's W4A16); loss is
perplexity over the reference's, minus 1, over the same windows. The engine's own search is
`taper tune --activations`.

Swept: all types at one M; one type at M and the rest at 13. Searched: the paper's search at 0.1 % and 1 %
with groups of 64 and either rounding. Timed: prefill of the engine with 7 and with 14 bits, alternating.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from finish import finish
from numpy.typing import NDArray

from taper.evaluate.protocols import cut
from taper.formats.activations import TENSOR_TYPES, ActivationBits
from taper.formats.container import TaperFile
from taper.formats.spec import PlanedMatrix
from taper.formats.text import read_text
from taper.kernels import anda, rotate, unpack_codes
from taper.layers.linear import FloatLinear
from taper.models import Decoder
from taper.models.parts import Parts, planed_parts
from taper.tokenizer import Tokenizer
from taper.tune.activation_spaces import multiplications
from taper.tune.activations import window_losses
from taper.tune.anda_search import bops_saving, search_bits

F32 = NDArray[np.float32]
Combination = tuple[int, ...]

SWEPT = range(3, 11)
REST = 13
LIMITS = (0.001, 0.01)
REDRAWS = 4000
ROUNDINGS = ("nearest", "truncate")
GROUPS: dict[str, int | None] = {"64": 64, "row": None}
# The exponent field 1 of float16, as frexp counts.
LEAST_EXPONENT = -13
TIMED_TOKENS = 512
TIMED_ROUNDS = 7


def dequantized(file: TaperFile, matrix: PlanedMatrix, bits: int) -> tuple[F32, F32 | None]:
    """A matrix at a width in the space of the planes: float32 weights (out_features, in_features), bias."""
    width = matrix.spec.width_at(bits)
    if matrix.tables is not None or matrix.outliers is not None:
        raise SystemExit(f"{matrix.spec.name}: tables and outliers are not simulated")
    codes = unpack_codes(list(matrix.planes[:width]), width, matrix.spec.in_features)
    level = width - file.min_bits
    scales = matrix.scales[min(level, len(matrix.scales) - 1)].astype(np.float32)
    weights = file.codebook.values[width][codes].astype(np.float32)
    weights *= (scales * np.float32(file.codebook.level_scales[width]))[:, None]
    bias = matrix.bias
    if matrix.offsets is not None:
        offsets = matrix.offsets[level].astype(np.float32)
        bias = offsets if bias is None else bias + offsets
    return weights, bias


def through_format(x: F32, magnitude_bits: int, group_size: int | None, rounding: str) -> F32:
    """Rows through the format, as `anda.dequantize(anda.quantize(...))` gives them, three times as fast."""
    size = x.shape[1] if group_size is None else group_size
    if x.shape[1] % size:  # the last group is short
        whole: F32 = anda.dequantize(anda.quantize(x, magnitude_bits, group_size, rounding))
        return whole
    groups = x.reshape(len(x), -1, size)
    exponents = np.maximum(np.frexp(np.abs(groups).max(axis=2, keepdims=True))[1], LEAST_EXPONENT)
    unit = np.ldexp(np.float32(1), exponents - magnitude_bits)
    scaled = groups / unit
    scaled = np.rint(scaled) if rounding == "nearest" else np.trunc(scaled)
    most = np.float32(2**magnitude_bits - 1)
    found: F32 = (np.clip(scaled, -most, most) * unit).reshape(x.shape)
    return found


class Simulation:
    """A model whose activations go through the format.

    Attributes:
        bits: of each tensor type; None: float.
        group_size, rounding: of the format.
    """

    def __init__(self, file: TaperFile, bits: int) -> None:
        self.bits: Combination | None = None
        self.group_size: int | None = 64
        self.rounding = "nearest"
        parts = planed_parts(file)
        config = file.config

        def simulated(name: str, linear: Any) -> FloatLinear:
            matrix = file.matrix(name)
            made = FloatLinear(*dequantized(file, matrix, bits))
            exact: Callable[[F32], F32] = linear.product_input
            kind = TENSOR_TYPES.index(name.rpartition(".")[2])
            made.product_input = lambda x: self._activations(
                rotate(exact(x), matrix.signs, matrix.block), kind
            )
            return made

        blocks = tuple(
            replace(
                block,
                **{part: simulated(f"{block.name}.{part}", getattr(block, part)) for part in TENSOR_TYPES},
            )
            for block in parts.blocks
        )
        self.decoder = Decoder(_without_native(replace(parts, blocks=blocks)))
        self.width, self.context = bits, config.max_position_embeddings

    def _activations(self, x: F32, kind: int) -> F32:
        if self.bits is None:
            return x
        return through_format(x, self.bits[kind], self.group_size, self.rounding)

    def nll(self, windows: NDArray[np.int32]) -> NDArray[np.float64]:
        """Mean negative log-likelihood of the second half of each window."""
        return window_losses(self.decoder, windows, self.width)


def _without_native(parts: Parts) -> Parts:
    return replace(parts, native=None)


class Sweep:
    """Losses of combinations, each measured once."""

    def __init__(self, simulation: Simulation, windows: NDArray[np.int32]) -> None:
        self._simulation, self._windows = simulation, windows
        self._known: dict[tuple[int | None, str, Combination], tuple[float, float]] = {}
        self._reference = simulation.nll(windows)
        self._begin = time.perf_counter()

    def loss(self, group: int | None, rounding: str, bits: Combination) -> tuple[float, float]:
        """Loss and its standard error over windows."""
        key = (group, rounding, bits)
        if key not in self._known:
            simulation = self._simulation
            simulation.group_size, simulation.rounding, simulation.bits = group, rounding, bits
            differences = simulation.nll(self._windows) - self._reference
            error = differences.std(ddof=1) / np.sqrt(len(differences))
            self._known[key] = float(np.expm1(differences.mean())), float(error)
            spent = time.perf_counter() - self._begin
            print(
                f"{spent:5.0f} s  group {group or 'row'}  {rounding:8}  {'-'.join(map(str, bits))}  "
                f"{self._known[key][0]:+.3%}",
                file=sys.stderr,
            )
        return self._known[key]


def bits_at(losses: Sequence[tuple[int, float]], limit: float) -> float | None:
    """M at which a loss falls to a limit, interpolated between whole numbers by the loss's logarithm."""
    for (low, above), (high, below) in itertools.pairwise(losses):
        if above > limit >= below:
            floor = max(below, limit / 100)  # a measured loss may be below zero
            return low + float(np.log(above / limit) / np.log(above / floor)) * (high - low)
    return None


def report(model: Path, texts: Sequence[Path], bits: int, num_windows: int) -> dict[str, Any]:
    """All figures."""
    file = TaperFile.open(model)
    assert file.tokenizer_json is not None
    tokenizer = Tokenizer(file.tokenizer_json)
    context = file.config.max_position_embeddings
    windows = np.concatenate(
        [cut(read_text(text), tokenizer, context, "llama.cpp", num_windows).tokens for text in texts]
    )
    sweep = Sweep(Simulation(file, bits), windows)
    macs = multiplications(file.config)
    uniform, by_type, searches = [], [], []
    for name, group in GROUPS.items():
        for rounding in ROUNDINGS:
            found = {m: sweep.loss(group, rounding, (m,) * 4) for m in SWEPT}
            uniform.append({"group": name, "rounding": rounding, "loss": found})
    for kind, tensor_type in enumerate(TENSOR_TYPES):
        for rounding in ROUNDINGS:
            row = {
                m: sweep.loss(64, rounding, tuple(m if k == kind else REST for k in range(4))) for m in SWEPT
            }
            by_type.append({"type": tensor_type, "rounding": rounding, "loss": row})
    for rounding in ROUNDINGS:
        for limit in LIMITS:
            result = search_bits(macs, lambda b, r=rounding: sweep.loss(64, r, b)[0], limit)
            path = [{"bits": e.bits, "loss": e.loss, "is_best": e.is_best} for e in result.evaluations]
            best = None if result.best is None else result.best.bits
            saving = None if best is None else bops_saving(macs, best)
            searches.append(
                {"rounding": rounding, "limit": limit, "bits": best, "saving": saving,
                 "mean_bits": None if saving is None else 16 / saving, "path": path,
                 "finished": result.is_finished}
            )  # fmt: skip
    return {
        "benchmark": "anda_sweep",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": model.name,
        "texts": [text.name for text in texts],
        "weight_bits": bits,
        "scored_tokens": len(windows) * (windows.shape[1] // 2 - 1),
        "uniform": uniform,
        "by_type": by_type,
        "searches": searches,
        "gained_bits": gained(uniform),
        "prefill_tokens_per_s": timed(file, bits),
    }


def gained(uniform: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bits that rounding to nearest saves at equal loss, by group and limit, from the uniform curves."""
    found = []
    for group in GROUPS:
        for limit in LIMITS:
            at = {}
            for row in uniform:
                if row["group"] == group:
                    losses = [(m, loss) for m, (loss, _) in row["loss"].items()]
                    at[row["rounding"]] = bits_at(losses, limit)
            nearest, truncated = at["nearest"], at["truncate"]
            gain = None if nearest is None or truncated is None else truncated - nearest
            range_ = gain_range([row for row in uniform if row["group"] == group], limit)
            found.append({"group": group, "limit": limit, **at, "gain": gain, "gain_95": range_})
    return found


def gain_range(rows: Sequence[dict[str, Any]], limit: float) -> tuple[float, float] | None:
    """The middle 95 % of the gain when every loss is redrawn by its standard error; None where more than a
    tenth of the redraws do not cross the limit."""
    generator, gains = np.random.default_rng(0), []
    for _ in range(REDRAWS):
        at = {}
        for row in rows:
            drawn = [
                (m, loss + error * generator.standard_normal()) for m, (loss, error) in row["loss"].items()
            ]
            at[row["rounding"]] = bits_at(drawn, limit)
        if at["nearest"] is not None and at["truncate"] is not None:
            gains.append(at["truncate"] - at["nearest"])
    if len(gains) < 0.9 * REDRAWS:
        return None
    low, high = np.percentile(gains, [2.5, 97.5])
    return float(low), float(high)


def timed(file: TaperFile, bits: int) -> dict[str, float]:
    """Prefill of the engine with one and with two int8 products, alternating; medians."""
    seconds: dict[int, list[float]] = {7: [], 14: []}
    decoders = {
        m: Decoder.from_taper(file, activations=ActivationBits(dict.fromkeys(TENSOR_TYPES, m)))
        for m in seconds
    }
    length = min(TIMED_TOKENS, file.config.max_position_embeddings)
    tokens = np.arange(length, dtype=np.int32) % file.config.vocab_size
    for round_ in range(TIMED_ROUNDS + 1):
        for m, decoder in decoders.items():
            cache = decoder.new_cache(length)
            begin = time.perf_counter()
            decoder.forward(tokens, cache, bits)
            if round_:
                seconds[m].append(time.perf_counter() - begin)
    return {str(m): length / statistics.median(times) for m, times in seconds.items()}


def show(found: dict[str, Any]) -> None:
    """Tables for people."""
    print(
        f"{found['model']}, weights at {found['weight_bits']} bits, {found['scored_tokens']:,} scored tokens"
    )
    print("\nall types at M, loss: " + " ".join(f"{m:>8}" for m in SWEPT))
    for row in found["uniform"]:
        name = f"group {row['group']}, {row['rounding']}"
        print(f"{name:22}" + " ".join(f"{loss:+.2%} ({error:.2%})" for loss, error in row["loss"].values()))
    print("\none type at M, the rest at 13 (group 64):")
    for row in found["by_type"]:
        name = f"{row['type']}, {row['rounding']}"
        print(f"{name:22}" + " ".join(f"{loss:+.2%} ({error:.2%})" for loss, error in row["loss"].values()))
    print()
    for row in found["searches"]:
        bits = "none" if row["bits"] is None else "-".join(map(str, row["bits"]))
        saving = "" if row["saving"] is None else f", {row['saving']:.2f} x, mean M {row['mean_bits']:.2f}"
        print(f"{row['rounding']:9} {row['limit']:.1%}: {bits}{saving}, {len(row['path'])} evaluations")
    for row in found["gained_bits"]:
        gain = "beyond the sweep" if row["gain"] is None else f"{row['gain']:.2f} bits"
        gain += "" if row["gain_95"] is None else " (95 %: {:.2f} to {:.2f})".format(*row["gain_95"])
        print(f"group {row['group']}, loss {row['limit']:.1%}: nearest saves {gain}")
    speed = found["prefill_tokens_per_s"]
    print(f"prefill, engine: {speed['7']:.0f} tok/s with 7 bits, {speed['14']:.0f} with 14")


def main() -> None:
    """Measure, print, and end with a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True, help="repeatable")
    parser.add_argument("--bits", type=int, default=4, help="of the weights")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, from each text")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = report(options.model, options.text, options.bits, options.windows)
    show(found)
    finish(found, options.json)


if __name__ == "__main__":
    main()
