"""Do widths that follow each step beat the static allocation at equal bits?

    python benchmarks/quality/dynamic_bits.py FILE --calibration TEXT --text TEXT

DP-LLM (arXiv 2508.06041) reads a layer at more bits in the steps in which its error ||dW x|| is large. Here
the cost of a matrix at b planes in step t is taken to be its measured sensitivity times an estimate of
||(W_b - W) x_t||^2 over its mean; every step reads the widths of least cost plus a price per bit, and one
price meets the budget over the text (a threshold on the cost saved per bit, the same for all layers). The
estimate is that of this very step (nobody has it before the step: the best that any estimator can do), of the
step before, of the token that is read (a table from the calibration text), or one factor for all matrices
from the entropy of the last distribution. Text is forced; each choice writes its own KV cache. The last line
of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from taper.errors import TaperError, UsageError
from taper.evaluate import cut
from taper.evaluate.divergence import kl_divergences, log_normalisers
from taper.evaluate.statistics import standard_error
from taper.formats.container import TaperFile
from taper.formats.text import read_text
from taper.kvcache import KvCache
from taper.layers.linear import Linear
from taper.layers.rope import Rope
from taper.models import Decoder
from taper.models.parts import LAYER_MATRICES, planed_parts
from taper.tokenizer import Tokenizer

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]

# Errors are computed up to this width; above it they follow the sensitivity alone. Budgets end well below.
MAX_ERROR_BITS = 5
# Readings that a layer chooses among: those of the static allocation at these budgets.
LAYER_READINGS = (2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 6)
LOW_HIGH = (2, 4)
ENTROPY_BINS = 16
EXTRA_BITS = 0.05  # what a gain is worth, as a second point of the static allocation
SEED = 0
TABLE_PRIOR = 4  # tokens' worth of the mean that a table's entry begins with


@dataclass(frozen=True, slots=True)
class Observed:
    """What one pass at the static allocation says about a block.

    Attributes:
        errors: ||(W_b - W) x||^2, float32 (tokens, matrices, widths).
        kl: of each token against all bits, float64 (tokens,).
        entropy: of each token's distribution in nats, float64 (tokens,).
    """

    errors: F32
    kl: F64
    entropy: F64


class Bench:
    """A model that can be read at any width of any matrix in any step."""

    def __init__(self, file: TaperFile) -> None:
        if file.sensitivity is None:
            raise UsageError(
                "the file has no sensitivity", hint="measure it: taper allocate FILE --text TEXT"
            )
        if file.tokenizer_json is None:
            raise UsageError("the file has no tokenizer", hint="name a file that can read text")
        self.tokenizer = Tokenizer(file.tokenizer_json)
        self.parts = planed_parts(file)
        self.decoder = Decoder.from_taper(file)
        config = file.config
        layers = [f"layers.{index}.{part}" for index in range(config.num_layers) for part in LAYER_MATRICES]
        self.names = [*layers, self.parts.head_name]
        weights = {spec.name: spec.num_weights for spec in file.matrices}
        counts = np.array([weights[name] for name in self.names], np.float64)
        self.share = counts / counts.sum()
        self.widths = np.arange(file.min_bits, file.max_bits + 1)
        losses = file.sensitivity.losses(file.min_bits)
        self.costs = np.array([[losses[name][int(b)] for b in self.widths] for name in self.names])
        self._rope = Rope(config)

    def reading(self, bits: float) -> U8:
        """Widths of the matrices in the static allocation of a budget."""
        widths = self.decoder.widths(bits)
        return np.array([widths[name] for name in self.names], np.uint8)

    def reference(self, tokens: I32) -> F32:
        """Logits at all bits, (tokens, vocab)."""
        out = self.decoder.forward(tokens, self.decoder.new_cache(len(tokens)), self.decoder.max_bits, "all")
        assert out is not None
        return out

    def observe(self, tokens: I32, widths: U8) -> Observed:
        """Run a block at some widths and measure every matrix's error at every width on the same inputs."""
        cache, cos, sin = self._empty(len(tokens))
        errors = np.ones((len(tokens), len(self.names), len(self.widths)), np.float32)

        def product(linear: Linear, name: str, x: F32, residual: F32 | None = None) -> F32:
            index = self.names.index(name)
            full = linear(x, self.decoder.max_bits)
            for at, bits in enumerate(self.widths):
                if bits <= MAX_ERROR_BITS:
                    errors[:, index, at] = np.square(linear(x, int(bits)) - full).sum(axis=1)
                else:
                    errors[:, index, at] = errors[:, index, at - 1]
            return linear(x, int(widths[index]), residual)

        x = self.parts.embedding(tokens)
        for block, kv in zip(self.parts.blocks, cache.layers, strict=True):
            qkv = product(block.qkv, f"{block.name}.qkv", x)
            block.attention.store(qkv, kv, 0, cos, sin)
            x = product(block.o, f"{block.name}.o", block.attention(qkv, kv, 0), x)
            x = product(
                block.down, f"{block.name}.down", product(block.gate_up, f"{block.name}.gate_up", x), x
            )
        logits = product(self.parts.head, self.parts.head_name, x)
        return Observed(errors, divergence(self.reference(tokens), logits), entropies(logits))

    def decode(self, tokens: I32, widths: U8) -> F32:
        """Force a block token by token, each step at its row of widths; logits, (tokens, vocab)."""
        assert self.parts.native is not None
        cache, cos, sin = self._empty(len(tokens))
        rows = []
        for token, row in zip(tokens[:, None], widths, strict=True):
            sequence = (1, cache.num_tokens, cache.native, cos, sin)
            logits, _ = self.parts.native.step(token, [sequence], np.ascontiguousarray(row), "last", None)
            cache.advance(1)
            rows.append(logits[0])
        return np.array(rows)

    def _empty(self, num_tokens: int) -> tuple[KvCache, F32, F32]:
        cache = self.decoder.new_cache(num_tokens)
        return cache, *self._rope.tables(num_tokens, cache.capacity)


def divergence(reference: F32, logits: F32) -> F64:
    """KL(reference || logits) of each token in nats."""
    return kl_divergences(reference, log_normalisers(reference), logits, log_normalisers(logits))


def entropies(logits: F32) -> F64:
    """Of each token's distribution in nats."""
    logprobs = logits.astype(np.float64) - log_normalisers(logits)[:, None]
    entropy: F64 = -(np.exp(logprobs) * logprobs).sum(axis=1)
    return entropy


def choose(costs: F64, bits: F64, budget: float) -> npt.NDArray[np.intp]:
    """The choice of each unit in each step whose mean bits meet a budget at the least cost.

    One price per bit for all steps, found by bisection: the mean never exceeds the budget.

    Args:
        costs: (steps, units, choices).
        bits: (units, choices), of the model's bits per weight.
        budget: mean over the steps of the sum over the units.
    """
    low, high = 1e-12, 1e6
    for _ in range(80):
        price = (low * high) ** 0.5
        picked = (costs + price * bits).argmin(axis=-1)
        if _mean_bits(bits, picked) > budget:
            low = price
        else:
            high = price
    picked = (costs + high * bits).argmin(axis=-1)
    return picked


def _mean_bits(bits: F64, picked: npt.NDArray[np.intp]) -> float:
    return float(bits[np.arange(len(bits)), picked].sum(axis=-1).mean())


def by_matrix(bench: Bench, estimate: F64, budget: float) -> U8:
    """Widths, (steps, matrices): each matrix chooses its own."""
    picked = choose(bench.costs * estimate, bench.share[:, None] * bench.widths, budget)
    return bench.widths[picked].astype(np.uint8)


def by_layer(bench: Bench, estimate: F64, budget: float, readings: Sequence[float] = LAYER_READINGS) -> U8:
    """Widths, (steps, matrices): each layer, and the head, chooses a reading of the static allocation."""
    offered = np.array([bench.reading(bits) for bits in readings])  # (readings, matrices)
    groups = np.arange(len(bench.names)) // len(LAYER_MATRICES)
    costs = np.zeros((len(estimate), groups[-1] + 1, len(readings)))
    bits = np.zeros(costs.shape[1:])
    at = offered - bench.widths[0]
    for index, group in enumerate(groups):
        costs[:, group] += (bench.costs[index] * estimate[:, index])[:, at[:, index]]
        bits[group] += bench.share[index] * offered[:, index]
    picked = choose(costs, bits, budget)
    return offered[picked[:, groups], np.arange(len(bench.names))]


class Estimates:
    """Errors that each way of looking expects in a step, over their mean: (steps, matrices, widths).

    Args:
        calibration: blocks of tokens and what was seen of them.
        text: the same of the text that is measured.
        vocab_size: of the model.
    """

    def __init__(
        self,
        calibration: Sequence[tuple[I32, Observed]],
        text: Sequence[tuple[I32, Observed]],
        vocab_size: int,
    ) -> None:
        self._calibration, self._text, self._vocab_size = calibration, text, vocab_size
        self._mean = np.concatenate([seen.errors for _, seen in calibration]).mean(axis=0, dtype=np.float64)
        self._mean += 1e-30  # all planes have no error

    def this_step(self) -> F64:
        """The errors themselves."""
        return np.concatenate([seen.errors for _, seen in self._text]) / self._mean

    def last_step(self) -> F64:
        """Those of the step before; the mean for a block's first."""
        first = np.ones((1, *self._mean.shape))
        return np.concatenate(
            [np.concatenate([first, seen.errors[:-1] / self._mean]) for _, seen in self._text]
        )

    def token(self) -> F64:
        """The mean over the calibration text of the token that the step reads."""
        total = np.full((self._vocab_size, *self._mean.shape), float(TABLE_PRIOR), np.float32)
        count = np.full(self._vocab_size, float(TABLE_PRIOR))
        for tokens, seen in self._calibration:
            np.add.at(total, tokens, (seen.errors / self._mean).astype(np.float32))
            np.add.at(count, tokens, 1.0)
        tokens = np.concatenate([tokens for tokens, _ in self._text])
        return total[tokens] / count[tokens, None, None]

    def entropy(self) -> F64:
        """One factor a step: the mean KL of the calibration tokens whose last entropy was about as large."""
        before = np.concatenate([seen.entropy[:-1] for _, seen in self._calibration])
        kl = np.concatenate([seen.kl[1:] for _, seen in self._calibration])
        edges = np.quantile(before, np.linspace(0, 1, ENTROPY_BINS + 1)[1:-1])
        bins = np.digitize(before, edges)
        factors = np.array([kl[bins == index].mean() for index in range(ENTROPY_BINS)]) / kl.mean()
        rows = [
            np.concatenate([[1.0], factors[np.digitize(seen.entropy[:-1], edges)]]) for _, seen in self._text
        ]
        return np.concatenate(rows)[:, None, None] * np.ones(self._mean.shape)


def choices(bench: Bench, estimates: Estimates, budget: float) -> dict[str, Callable[[], U8]]:
    """Every way to spend a budget, by name; the first is what the others are set against."""
    static, more = bench.reading(budget), bench.reading(budget + EXTRA_BITS)
    # The static allocation leaves part of a plane of its smallest matrix unused; nobody gets that part.
    budget = float((static * bench.share).sum())
    num_steps = len(estimates.this_step())
    return {
        "static": lambda: np.tile(static, (num_steps, 1)),
        f"static, {EXTRA_BITS} bits more": lambda: np.tile(more, (num_steps, 1)),
        "this step's error, by matrix": lambda: by_matrix(bench, estimates.this_step(), budget),
        "this step's error, by layer": lambda: by_layer(bench, estimates.this_step(), budget),
        "this step's error, layers at 2 or 4": lambda: by_layer(
            bench, estimates.this_step(), budget, LOW_HIGH
        ),
        "last step's error, by layer": lambda: by_layer(bench, estimates.last_step(), budget),
        "token's mean error, by layer": lambda: by_layer(bench, estimates.token(), budget),
        # The same widths in an order that means nothing: what mixing widths alone does.
        "the same, steps shuffled": lambda: np.random.default_rng(SEED).permutation(
            by_layer(bench, estimates.token(), budget)
        ),
        "last entropy, by layer": lambda: by_layer(bench, estimates.entropy(), budget),
    }


def measure(bench: Bench, budget: float, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each choice: KL with its error, and the difference from the static allocation, paired."""
    # A fraction, so that a whole budget is spent by the allocation, too.
    budget = budget + 1e-6 if budget == int(budget) else budget
    static = bench.reading(budget)
    text, calibration = (
        [(block, bench.observe(block, static)) for block in blocks(bench, path, count)]
        for path, count in (
            (arguments.text, arguments.blocks),
            (arguments.calibration, arguments.calibration_blocks),
        )
    )
    estimates = Estimates(calibration, text, bench.decoder.config.vocab_size)
    references = [bench.reference(block) for block, _ in text]
    uniform = np.full((len(np.concatenate(references)), len(bench.names)), int(budget), np.uint8)
    ways = choices(bench, estimates, budget)
    if budget - int(budget) < 1e-3:
        ways[f"{int(budget)} in every matrix"] = lambda: uniform
    rows: list[dict[str, object]] = []
    base = np.zeros(0)
    for name, way in ways.items():
        widths = way()
        parts = np.split(widths, np.cumsum([len(block) for block, _ in text])[:-1])
        kl = np.array(
            [
                divergence(reference, bench.decode(block, part)).mean()
                for reference, (block, _), part in zip(references, text, parts, strict=True)
            ]
        )
        base = kl if name == "static" else base
        rows.append(_row(name, float((widths * bench.share).sum(axis=1).mean()), kl, base))
        print(_text(rows[-1]), flush=True)
    return rows


def blocks(bench: Bench, path: str, count: int) -> list[I32]:
    """Windows of 512 tokens, evenly spaced: the first ones would be one document."""
    cut_text = cut(read_text(path), bench.tokenizer, bench.decoder.context_length, "llama.cpp").tokens
    chosen = np.linspace(0, len(cut_text) - 1, min(count, len(cut_text))).astype(int)
    return list(cut_text[chosen])


def _row(name: str, bits: float, kl: F64, base: F64) -> dict[str, object]:
    change = (kl - base) / base.mean()
    return {
        "choice": name,
        "bits_per_weight": bits,
        "kl_mean": float(kl.mean()),
        "kl_mean_se": standard_error(kl),
        "change_frac": float(change.mean()),
        "change_frac_se": standard_error(change),
    }


def _text(row: dict[str, object]) -> str:
    return (
        f"| {row['choice']} | {row['bits_per_weight']:.3f} | {row['kl_mean']:.5f} | "
        f"{row['change_frac']:+.1%} +- {row['change_frac_se'] or 0:.1%} |"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Set widths that follow each step against the static ones.")
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--calibration", required=True, metavar="TEXT")
    parser.add_argument("--text", required=True, metavar="TEXT")
    parser.add_argument("--budgets", type=float, nargs="+", default=(3.0, 2.5), metavar="B")
    parser.add_argument("--blocks", type=int, default=16, help="windows of 512 tokens to measure on")
    parser.add_argument("--calibration-blocks", type=int, default=16)
    return parser.parse_args()


def main() -> int:
    """Command line. Returns the exit status."""
    arguments = _arguments()
    began = time.monotonic()
    tables = {}
    try:
        bench = Bench(TaperFile.open(arguments.file))
        for budget in arguments.budgets:
            print(
                f"\n{budget:g} bits per weight\n\n| choice | bits | KL (nats) | change |\n|---|---|---|---|"
            )
            tables[f"{budget:g}"] = measure(bench, budget, arguments)
    except TaperError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": arguments.file.name,
        "text": Path(arguments.text).name,
        "calibration": Path(arguments.calibration).name,
        "blocks": arguments.blocks,
        "calibration_blocks": arguments.calibration_blocks,
        "seconds": round(time.monotonic() - began),
        "budgets": tables,
    }
    print("\n" + json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
