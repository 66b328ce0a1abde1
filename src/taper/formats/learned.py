"""The learned scheduler of a file: a small predictor for each pair of neighbouring widths, as the header
stores it (docs/format.md, `learned`)."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from taper.config import ModelConfig

F32 = npt.NDArray[np.float32]

# PMPD has three segments, four classes; 64 segments are finer than any label can tell apart.
MAX_SEGMENTS = 64
MAX_HIDDEN = 256
# Of all pairs together: 2 MiB of float16, 2.8 MB in the header. One pair of a model with 32 KV heads of 128
# has 131,072 for the query and 262,144 in the hidden layer.
MAX_WEIGHTS = 1 << 20
# float16, little-endian: the header's text is the same on every machine.
_STORED = np.dtype("<f2")


def hidden_size(features: int) -> int:
    """Width of the hidden layer: the paper's, as many as `features`, up to 256 and to 2^18 weights."""
    return max(1, min(features, MAX_HIDDEN, (1 << 18) // features))


@dataclass(frozen=True, slots=True, eq=False)
class PredictorWeights:
    """One predictor (PMPD, arXiv 2410.13461, appendix; specified in docs/learned.md).

    Attributes:
        query: float32 (kv_heads, kv_heads, head_dim), learned queries.
        norm_gain, norm_bias: float32 (features,), features = kv_heads * head_dim.
        hidden_weight, hidden_bias: float32 (hidden, features), (hidden,).
        class_weight, class_bias: float32 (classes, hidden), (classes,).
    """

    query: F32
    norm_gain: F32
    norm_bias: F32
    hidden_weight: F32
    hidden_bias: F32
    class_weight: F32
    class_bias: F32

    @property
    def arrays(self) -> dict[str, F32]:
        """Every array by name, in the order of the file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def shapes(cls, kv_heads: int, head_dim: int, hidden: int, classes: int) -> dict[str, tuple[int, ...]]:
        """Name to shape, in the order of the file."""
        features = kv_heads * head_dim
        sizes: tuple[tuple[int, ...], ...] = (
            (kv_heads, kv_heads, head_dim), (features,), (features,),
            (hidden, features), (hidden,), (classes, hidden), (classes,),
        )  # fmt: skip
        return dict(zip([field.name for field in fields(cls)], sizes, strict=True))

    def to_text(self) -> str:
        """Base64 of all values as float16, one array after another."""
        flat = np.concatenate([array.reshape(-1) for array in self.arrays.values()])
        return base64.b64encode(flat.astype(_STORED).tobytes()).decode("ascii")

    @classmethod
    def from_text(cls, text: Any, shapes: Mapping[str, tuple[int, ...]]) -> PredictorWeights:
        """What `to_text` wrote.

        Raises:
            TypeError, ValueError: no text of exactly these arrays, or a value that is not finite.
        """
        sizes = [math.prod(shape) for shape in shapes.values()]
        num_bytes = sum(sizes) * _STORED.itemsize
        if not isinstance(text, str) or len(text) != 4 * -(-num_bytes // 3):
            raise ValueError(f"learned weights are not the base64 text of {sum(sizes):,} float16 values")
        raw = base64.b64decode(text, validate=True)
        if len(raw) != num_bytes:
            raise ValueError(f"learned weights have {len(raw):,} bytes, expected {num_bytes:,}")
        flat = np.frombuffer(raw, dtype=_STORED).astype(np.float32)
        if not np.isfinite(flat).all():
            raise ValueError("learned weights hold a value that is not finite")
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        arrays = [part.reshape(shape) for part, shape in zip(parts, shapes.values(), strict=True)]
        return cls(*arrays)


@dataclass(frozen=True, slots=True, eq=False)
class LearnedScheduler:
    """Widths of an answer and what decides when one gives way to the next.

    Attributes:
        widths: bits, falling; two at least. A fraction is a budget in bits per weight.
        prefill_bits: of the prompt, at least the first width; the predictors were trained on KV entries that
            it wrote.
        num_segments: equal parts of the token limit; a switch is at the beginning of one of them, or never.
        predictors: one for each pair of neighbouring widths, each with `num_segments + 1` classes.
        record: what it was trained on and how well it does, for people.
    """

    widths: tuple[float, ...]
    prefill_bits: float
    num_segments: int
    predictors: tuple[PredictorWeights, ...]
    record: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As in the `learned` metadata."""
        return {
            "widths": list(self.widths),
            "prefill_bits": self.prefill_bits,
            "segments": self.num_segments,
            "hidden": len(self.predictors[0].hidden_bias),
            "weights": [predictor.to_text() for predictor in self.predictors],
            "record": self.record,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], config: ModelConfig) -> LearnedScheduler:
        """Read the metadata of a file with this configuration; sizes are checked before anything is decoded.

        Raises:
            KeyError: an entry is missing.
            TypeError, ValueError: an entry of another type or outside its range.
        """
        widths, prefill = _widths(raw["widths"]), _number("learned prefill_bits", raw["prefill_bits"])
        if prefill < widths[0]:
            raise ValueError(f"learned prefill_bits {prefill:g} are below the first width {widths[0]:g}")
        segments = _count("learned segments", raw["segments"], MAX_SEGMENTS)
        hidden = _count("learned hidden", raw["hidden"], MAX_HIDDEN)
        shapes = PredictorWeights.shapes(config.num_kv_heads, config.head_dim, hidden, segments + 1)
        texts, record, pairs = raw["weights"], raw["record"], len(widths) - 1
        num_weights = pairs * sum(math.prod(shape) for shape in shapes.values())
        if num_weights > MAX_WEIGHTS:
            raise ValueError(f"learned predictors of {num_weights:,} weights; the most is {MAX_WEIGHTS:,}")
        if not isinstance(texts, list) or len(texts) != pairs:
            raise ValueError(f"learned weights are not those of {pairs} pairs of widths")
        if not isinstance(record, dict):
            raise TypeError("learned record is not a JSON object")
        predictors = tuple(PredictorWeights.from_text(text, shapes) for text in texts)
        return cls(widths, prefill, segments, predictors, record)


def _widths(raw: Any) -> tuple[float, ...]:
    if not isinstance(raw, list) or not 2 <= len(raw) <= 8:
        raise ValueError(f"learned widths {raw!r} are not a list of 2 to 8 widths")
    widths = tuple(_number("learned width", width) for width in raw)
    if any(next_width >= width for width, next_width in itertools.pairwise(widths)):
        raise ValueError(f"learned widths {raw!r} do not fall")
    return widths


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} {value!r} is not a number")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} {value!r} is not a finite number above 0")
    return value


def _count(name: str, value: Any, most: int) -> int:
    if type(value) is not int:
        raise TypeError(f"{name} {value!r} is not an integer")
    if not 1 <= value <= most:
        raise ValueError(f"{name} {value} is outside 1..{most}")
    return value
