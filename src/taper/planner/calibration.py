"""Measuring passes of a model on this machine, and keeping what was found."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taper.errors import CorruptFileError, UsageError
from taper.formats.container import TaperFile
from taper.kernels import num_threads
from taper.kvcache import AnyCache, fill_with_random_entries
from taper.models import Decoder
from taper.planner.step_time import FittedStepTime, Measurement, fit, relative_errors

FORMAT = "taper-step-times-1"
MAX_MAPE = 0.10

# (decoded tokens, prompt tokens, entries before each of them). The model is judged on passes that it was not
# fitted to, which lie between those that it was.
_FITTED = (
    *((b, 0, 16) for b in (1, 2, 4, 8, 12, 16, 20, 24, 32, 48)),
    *((b, 0, 512) for b in (1, 4, 8, 24)),
    *((b, 0, 1024) for b in (1, 8)),
    *((0, p, 0) for p in (4, 8, 16, 24, 32, 64, 128, 256)),
    *((0, p, 512) for p in (16, 64, 128)),
    *((b, p, 128) for b, p in ((4, 16), (8, 32), (8, 64), (24, 64), (32, 128))),
)
_HELD_OUT = (
    *((b, 0, 64) for b in (1, 3, 6, 10, 14, 22, 28, 40)),
    *((b, 0, 256) for b in (2, 8, 16, 24)),
    *((0, p, 0) for p in (12, 48, 96, 192)),
    *((0, p, 256) for p in (32, 64)),
    *((b, p, 64) for b, p in ((2, 8), (6, 48), (16, 64), (28, 96))),
)
# What a server measures itself where nobody has calibrated: about a second of a small model.
_QUICK = (
    *((b, 0, 64) for b in (1, 4, 8, 16, 24, 32)),
    *((b, 0, 512) for b in (1, 8)),
    *((0, p, 0) for p in (16, 64, 128)),
    *((b, p, 64) for b, p in ((8, 32), (24, 64))),
)
_ROUNDS, _QUICK_ROUNDS = 16, 3
_MAX_SECONDS = 40.0  # after which a large model gets fewer rounds, at least 2
_MAX_ENTRIES = 1152
_MAX_CACHE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Calibration:
    """Step times of one model on one machine.

    Attributes:
        key: of model, threads and CPU, see `calibration_key`.
        step_time: fitted to all passes.
        mape: mean of |predicted / measured - 1| over held-out passes, by a fit that did not see them.
        worst: the largest of these.
        measurements: everything that was measured.
    """

    key: str
    step_time: FittedStepTime
    mape: float
    worst: float
    measurements: tuple[Measurement, ...]


def calibrate(
    decoder: Decoder, key: str, bits: Sequence[float], progress: Callable[[int, int], None]
) -> Calibration:
    """Measure passes at each width and fit them.

    Args:
        decoder: over planes.
        key: from `calibration_key`.
        bits: widths to measure.
        progress: called with the rounds that are done and those in all.
    """
    fitted, held_out = _kinds(decoder, _FITTED), _kinds(decoder, _HELD_OUT)
    seconds = _best_seconds(_Bench(decoder), (*fitted, *held_out), bits, progress, _ROUNDS)
    found = [
        [one for kind in kinds for one in _measurements(kind, bits, seconds)] for kinds in (fitted, held_out)
    ]
    errors = relative_errors(fit(found[0]), found[1])
    everything = (*found[0], *found[1])
    return Calibration(key, fit(everything), float(errors.mean()), float(errors.max()), everything)


def quick_step_time(decoder: Decoder, bits: Sequence[float]) -> FittedStepTime:
    """Step times from a few passes at each width, for a model that was not calibrated on this machine."""
    kinds = _kinds(decoder, _QUICK)
    seconds = _best_seconds(_Bench(decoder), kinds, bits, lambda done, total: None, _QUICK_ROUNDS)
    return fit([one for kind in kinds for one in _measurements(kind, bits, seconds)])


def step_time_of(file: TaperFile, decoder: Decoder) -> FittedStepTime:
    """The calibration of this model on this machine where `taper plan --calibrate` has left one at the widths
    that it has; otherwise measured now, quickly."""
    widths = tuple(float(bits) for bits in range(decoder.min_bits, decoder.max_bits + 1))
    key = calibration_key(file)
    path = calibration_path(key)
    if path.exists():
        found = load_calibration(path, key).step_time
        if tuple(found.coefficients) == widths:
            return found
    return quick_step_time(decoder, widths)


def calibration_key(file: TaperFile) -> str:
    """SHA-256 over the file's header and size, the threads, and the CPU."""
    with file.path.open("rb") as stream:
        head = stream.read(1 << 20)
    digest = hashlib.sha256(head)
    digest.update(f"{file.file_bytes}|{num_threads()}|{_cpu()}|{FORMAT}".encode())
    return digest.hexdigest()


def calibration_path(key: str) -> Path:
    """Where the step times of a key are kept: in TAPER_CACHE_DIR or the user's cache directory."""
    base = os.environ.get("TAPER_CACHE_DIR")
    if base:
        return Path(base) / f"step-times-{key[:16]}.json"
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or str(Path.home() / ".cache")
    return Path(home) / "taper" / f"step-times-{key[:16]}.json"


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write it as JSON, whole or not at all."""
    report = {
        "format": FORMAT,
        "key": calibration.key,
        "mape": calibration.mape,
        "worst": calibration.worst,
        "measurements": [asdict(one) for one in calibration.measurements],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_text(json.dumps(report, indent=1), encoding="utf-8")
    partial.replace(path)


def load_calibration(path: Path, key: str | None = None) -> Calibration:
    """Read what `save_calibration` wrote and fit it again.

    Args:
        path: of the JSON.
        key: that it must have; None takes any.

    Raises:
        CorruptFileError: when it is not such a file.
        UsageError: when it is of another model, machine or number of threads.
    """
    try:
        report = json.loads(path.read_bytes())
        if report["format"] != FORMAT:
            raise ValueError(f"format {report['format']!r}")
        measurements = tuple(_measurement(one) for one in report["measurements"])
        mape, worst = _number(report["mape"]), _number(report["worst"])
        found = str(report["key"])
        step_time = fit(measurements)
    except (OSError, ValueError, KeyError, TypeError, UsageError, RecursionError) as error:
        raise CorruptFileError(
            f"{path.name} holds no step times ({error})", hint="measure them with taper plan --calibrate"
        ) from error
    if key is not None and found != key:
        raise UsageError(
            f"{path.name} was measured with another model, CPU or number of threads",
            hint="measure again with taper plan --calibrate",
        )
    return Calibration(found, step_time, mape, worst, measurements)


def _measurement(one: Any) -> Measurement:
    counts = [one[name] for name in ("decode_tokens", "prefill_tokens", "context_tokens")]
    if not all(type(count) is int and 0 <= count < 1 << 40 for count in counts):
        raise ValueError(f"counts {counts}")
    bits, seconds = _number(one["bits"]), _number(one["seconds"])
    if not (1 <= bits <= 32 and 0 < seconds < 1e5):
        raise ValueError(f"{bits} bits in {seconds} seconds")
    decode, prefill, context = counts
    return Measurement(bits, decode, prefill, context, seconds)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


_Kind = tuple[int, int, int]


def _kinds(decoder: Decoder, kinds: Sequence[_Kind]) -> list[_Kind]:
    """Those that fit the model's context and the memory that measuring may take."""
    token_bytes = decoder.new_cache(1).bytes_at(1)
    return [
        (b, p, depth)
        for b, p, depth in kinds
        if depth + max(p, 1) <= decoder.context_length
        and (b * (depth + 1) + p + depth) * token_bytes <= _MAX_CACHE_BYTES
    ]


def _best_seconds(
    bench: _Bench,
    kinds: Sequence[_Kind],
    bits: Sequence[float],
    progress: Callable[[int, int], None],
    rounds: int,
) -> dict[tuple[_Kind, float], float]:
    """The least time of each pass over rounds through all of them.

    On a machine with other work a pass takes up to twice its time, for seconds on end: repetitions in a row
    would all be slow, and their median with them (error of 47 % where the least of rounds has 7.5 %). What
    other work costs is for `Residuals` to learn.
    """
    best: dict[tuple[_Kind, float], float] = {}
    end = time.perf_counter() + _MAX_SECONDS
    for round_number in range(rounds + 1):
        for kind in kinds:
            for width in bits:
                elapsed = bench.seconds(kind, width)
                best[kind, width] = (
                    min(elapsed, best.get((kind, width), math.inf)) if round_number else math.inf
                )
        progress(round_number, rounds)
        if round_number > 1 and time.perf_counter() > end:
            progress(rounds, rounds)
            break
    return best


def _measurements(
    kind: _Kind, bits: Sequence[float], seconds: dict[tuple[_Kind, float], float]
) -> Iterator[Measurement]:
    decode, prefill, depth = kind
    context = decode * (depth + 1) + prefill * depth + prefill * (prefill + 1) // 2
    for width in bits:
        yield Measurement(width, decode, prefill, context, seconds[kind, width])


class _Bench:
    """Runs passes on caches filled with random entries."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._generator = np.random.default_rng(0)
        self._caches: list[AnyCache] = []
        self._filled: list[int] = []

    def seconds(self, kind: _Kind, width: float) -> float:
        """Of one pass."""
        decode, prefill, depth = kind
        counts = [1] * decode + ([prefill] if prefill else [])
        sequences = [(count, self._cache(index, depth)) for index, count in enumerate(counts)]
        vocab_size = self._decoder.config.vocab_size
        tokens = self._generator.integers(0, vocab_size, decode + prefill, dtype=np.int32)
        begin = time.perf_counter()
        self._decoder.forward_batch(tokens, sequences, width)
        return time.perf_counter() - begin

    def _cache(self, index: int, depth: int) -> AnyCache:
        """The cache of a number, with `depth` entries; its memory is resident as far as it was filled."""
        if index == len(self._caches):
            self._caches.append(self._decoder.new_cache(min(_MAX_ENTRIES, self._decoder.context_length)))
            self._filled.append(0)
        cache = self._caches[index]
        if depth > self._filled[index]:
            cache.truncate(0)
            fill_with_random_entries(cache, self._decoder.config, depth)
            self._filled[index] = depth
        cache.truncate(0)
        cache.advance(depth)
        return cache
