"""Train the reference models on the CPU or a GPU, to a wall-clock deadline.

The learning rate follows warm-up, stable and decay-to-zero phases. The phase
is a function of training time: time spent in steps so far over that plus the
time left until the deadline, so pauses and noise only shorten the run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import statistics
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import LanguageModel, ModelConfig, TiedLoss
from muon import Muon
from torch import Tensor

BUCKETS = ("stories", "fiction", "expository", "dialogue")
PAUSE_FACTOR = 5.0
# Before the deadline, for the last validation and the checkpoint.
RESERVE_SECONDS = {"cpu": 45.0, "cuda": 12.0}
WARMUP_STEPS = 200
SEED = 20


def fail(message: str) -> None:
    """Prints a one-line error and exits with status 1."""
    sys.exit(f"train: {message}")


class Packs:
    """Endless packed sequences from one bucket; documents are reshuffled each epoch."""

    def __init__(self, path: Path, bucket: int) -> None:
        try:
            self.tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            fail(f"cannot read {path.name}: {error}")
        marks = np.flatnonzero(self.tokens == 0)
        self.spans = list(itertools.pairwise(marks))
        self.bucket, self.epoch, self.cursor, self.drawn = bucket, 0, 0, 0
        self.stream, self.order, self.length = np.zeros(0, np.int64), np.zeros(0, np.int64), 0

    def _shuffle(self, length: int) -> None:
        rng = np.random.default_rng((SEED, self.bucket, self.epoch, length))
        order = rng.permutation(len(self.spans))
        self.stream = np.concatenate([self.tokens[slice(*self.spans[i])] for i in order]).astype(np.int64)
        count = (self.stream.size - 1) // length
        self.order, self.length = rng.permutation(count) * length, length

    def next(self, length: int) -> np.ndarray:
        """Returns length + 1 consecutive tokens."""
        if self.length and self.length != length:
            self.epoch, self.cursor = self.epoch + 1, 0
        if self.length != length:
            self._shuffle(length)
        if self.cursor >= self.order.size:
            self.epoch, self.cursor = self.epoch + 1, 0
            self._shuffle(length)
        start = self.order[self.cursor]
        self.cursor, self.drawn = self.cursor + 1, self.drawn + length
        return self.stream[start : start + length + 1]

    def state(self) -> dict[str, int]:
        """Returns what `restore` needs; `drawn` is in tokens."""
        return {"epoch": self.epoch, "cursor": self.cursor, "drawn": self.drawn}

    def restore(self, state: dict[str, int]) -> None:
        """Continues from a saved state."""
        self.epoch, self.cursor, self.drawn = state["epoch"], state["cursor"], state["drawn"]


class Mixture:
    """Draws batches from the buckets in given proportions."""

    def __init__(self, work: Path) -> None:
        self.packs = [Packs(work / f"train-{name}.npy", i) for i, name in enumerate(BUCKETS)]
        self.debt = np.zeros(len(BUCKETS))

    def batch(self, weights: np.ndarray, tokens: int, length: int) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets of about `tokens` tokens in rows of `length`."""
        rows = []
        for _ in range(max(1, tokens // length)):
            self.debt += weights
            choice = int(self.debt.argmax())
            self.debt[choice] -= 1.0
            rows.append(self.packs[choice].next(length))
        data = torch.from_numpy(np.stack(rows))
        return data[:, :-1].contiguous(), data[:, 1:].contiguous()


@dataclass
class Clock:
    """Training time in seconds; a step counts for at most five median steps."""

    deadline: float
    reserve: float
    active: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=101))

    def add(self, seconds: float) -> None:
        """Counts one step."""
        self.recent.append(seconds)
        self.active += min(seconds, PAUSE_FACTOR * statistics.median(self.recent))

    def progress(self) -> float:
        """Returns the fraction of the planned run that is done, 0 to 1."""
        left = max(0.0, self.deadline - self.reserve - time.time())
        return self.active / (self.active + left) if self.active + left > 0 else 1.0


def parse_finish(text: str) -> float:
    """Turns HH:MM (UTC) into the next such moment, seconds since the epoch."""
    try:
        hours, minutes = (int(part) for part in text.split(":"))
        now = datetime.now(UTC)
        moment = now.replace(hour=hours, minute=minutes, second=0, microsecond=0)
    except ValueError as error:
        fail(f"--finish-at {text!r} is not HH:MM")
        raise AssertionError from error
    return (moment if moment > now else moment + timedelta(days=1)).timestamp()


def rate(progress: float, step: int, decay: float) -> float:
    """Returns the learning-rate factor: warm-up, stable, then linear to zero."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, max(0.0, (1.0 - progress) / decay))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `write_checkpoint` or grow.py wrote."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError) as error:
        fail(f"cannot read {path.name}: {error}")
    return state


def sizes(options: argparse.Namespace) -> ModelConfig:
    """Returns the sizes of a new model: heads of 64, half as many of keys, a feed-forward of 3 hidden."""
    return ModelConfig(
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
    )


def write_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Writes a checkpoint so that a crash leaves the old or the new one whole."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


class Trainer:
    """Owns the model, the optimisers, the data and the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        torch.manual_seed(SEED)
        torch.set_num_threads(1)
        self.device = torch.device(options.device)
        # One single-threaded pass per core: cheaper than splitting every operator over the cores. A GPU takes
        # one pass after the other.
        workers = options.workers if options.device == "cpu" else 1
        self.workers = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        source = options.work / "checkpoint.pt" if options.resume else options.initial
        initial = None if source is None else read_checkpoint(source)
        self.config = sizes(options) if initial is None else ModelConfig(**initial["config"])
        self.model = LanguageModel(self.config)
        if initial is not None:
            self.model.load_state_dict(initial["model"])
        self.model.to(self.device)
        self.backbone = (
            torch.compile(self.model.model, dynamic=False) if options.compile else self.model.model
        )
        matrices = [w for n, w in self.model.named_parameters() if w.ndim == 2 and "embed" not in n]
        others = [w for n, w in self.model.named_parameters() if w.ndim < 2 or "embed" in n]
        self.muon = Muon(
            matrices,
            lr=options.muon_lr,
            momentum=0.95,
            weight_decay=options.weight_decay,
            workers=self.workers,
        )
        self.adam = torch.optim.AdamW(
            others, lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.data = Mixture(options.work)
        finish = parse_finish(options.finish_at) if options.finish_at else time.time() + options.seconds
        self.clock = Clock(finish, RESERVE_SECONDS[options.device])
        self.step, self.tokens, self.history = 0, 0, []
        self.stopping, self.shapes = False, set()

    def load(self, path: Path) -> None:
        """Continues from a checkpoint."""
        state = read_checkpoint(path)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        for packs, saved in zip(self.data.packs, state["packs"], strict=True):
            packs.restore(saved)
        self.step, self.tokens, self.history = state["step"], state["tokens"], state["history"]
        self.clock.active = state["active_seconds"]
        print(f"resumed at step {self.step}, {self.tokens / 1e6:.1f} M tokens", flush=True)

    def save(self) -> None:
        """Writes the checkpoint."""
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "packs": [packs.state() for packs in self.data.packs],
            "step": self.step,
            "tokens": self.tokens,
            "history": self.history,
            "active_seconds": self.clock.active,
        }
        write_checkpoint(self.options.work / "checkpoint.pt", state)

    def plan(self) -> tuple[float, np.ndarray, int]:
        """Returns the learning-rate factor, the mixture and the sequence length (tokens)."""
        options, progress = self.options, self.clock.progress()
        decaying = progress >= 1.0 - options.decay
        weights = np.asarray(options.decay_mix if decaying else options.mix, dtype=np.float64)
        length = 2048 if progress >= 1.0 - options.long else 512 if progress >= options.short else 256
        return rate(progress, self.step, options.decay), weights / weights.sum(), length

    def train_step(self) -> tuple[float, float]:
        """Runs one optimiser step; returns the loss (nats) and the gradient norm."""
        factor, weights, length = self.plan()
        inputs, targets = (
            part.to(self.device) for part in self.data.batch(weights, self.options.batch, length)
        )
        loss = self.accumulate(inputs, targets)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser, base in ((self.muon, self.options.muon_lr), (self.adam, self.options.adam_lr)):
            optimiser.param_groups[0]["lr"] = base * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step, self.tokens = self.step + 1, self.tokens + targets.numel()
        return loss, float(norm)

    def accumulate(self, inputs: Tensor, targets: Tensor) -> float:
        """Adds up gradients over cache-sized parts of a batch; returns the mean loss (nats)."""
        rows = max(1, self.options.part // inputs.shape[1])
        parts = list(zip(inputs.split(rows), targets.split(rows), strict=True))
        share, total = 1.0 / len(parts), 0.0
        if parts[0][0].shape not in self.shapes:
            # The first pass of a shape may compile: let it do so alone.
            self.shapes.add(parts[0][0].shape)
            total = self.backward(*parts.pop(0), share)
        return total + sum(self.workers.map(lambda part: self.backward(*part, share), parts))

    def backward(self, inputs: Tensor, targets: Tensor, share: float) -> float:
        """Adds the gradients of one part; returns its share of the mean loss (nats)."""
        loss = self.loss(self.backbone, inputs, targets) * share
        loss.backward()
        return float(loss.detach())

    def loss(self, backbone: torch.nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean next-token loss in nats."""
        hidden = backbone(inputs, torch.bfloat16)
        return TiedLoss.apply(hidden.flatten(0, 1), self.model.model.embed_tokens.weight, targets.flatten())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Returns the loss (nats per token) on a little of each validation set."""
        results = {}
        for name in ("stories-valid", "valid"):
            tokens = torch.from_numpy(
                np.load(self.options.work / f"heldout-{name}.npy")[: 32 * 512 + 1].astype(np.int64)
            ).to(self.device)
            results[name] = float(
                self.loss(self.model.model, tokens[:-1].view(32, 512), tokens[1:].view(32, 512))
            )
        return {name: round(value, 4) for name, value in results.items()}

    def report(self, loss: float, norm: float, speed: float) -> None:
        """Prints one progress line."""
        factor, _, length = self.plan()
        left = max(0.0, self.clock.deadline - time.time()) / 60
        print(
            f"{datetime.now(UTC):%H:%M:%S} step {self.step} loss {loss:.4f} grad {norm:.3f} "
            f"lr x{factor:.3f} len {length} {self.tokens / 1e6:.2f} M tok {speed:.0f} tok/s "
            f"{self.clock.progress():.1%} eta {left:.1f} min",
            flush=True,
        )

    def checkpoint(self) -> None:
        """Evaluates, records and saves."""
        record = {
            "step": self.step,
            "tokens": self.tokens,
            "active_seconds": round(self.clock.active, 1),
            **self.evaluate(),
        }
        self.history.append(record)
        print(
            f"validation {json.dumps(record)} drawn {[packs.drawn for packs in self.data.packs]}", flush=True
        )
        self.save()

    def run(self) -> None:
        """Trains until the deadline or SIGTERM."""
        losses, last_save, mark = [], time.time() - 150.0, (time.time(), self.tokens)
        while not self.stopping and self.clock.progress() < 1.0 and self.step < self.options.max_steps:
            start = time.time()
            loss, norm = self.train_step()
            self.clock.add(time.time() - start)
            if not math.isfinite(loss):
                fail(f"loss is {loss} at step {self.step}")
            losses.append(loss)
            if self.step % self.options.every == 0 or self.step == 10:
                speed = (self.tokens - mark[1]) / (time.time() - mark[0])
                self.report(sum(losses) / len(losses), norm, speed)
                losses, mark = [], (time.time(), self.tokens)
            if time.time() - last_save > 240.0:
                self.checkpoint()
                last_save = time.time()
        self.checkpoint()
        print("stopped" if self.stopping else "finished", flush=True)

    def stop(self, *_: object) -> None:
        """Asks the run to write a checkpoint and end after this step."""
        self.stopping = True


def weights_of(text: str) -> list[float]:
    """Parses one weight per bucket, separated by commas."""
    values = [float(part) for part in text.split(",")]
    if len(values) != len(BUCKETS) or min(values) < 0 or sum(values) <= 0:
        raise argparse.ArgumentTypeError(f"need {len(BUCKETS)} weights: {','.join(BUCKETS)}")
    return values


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="directory written by prepare.py")
    finish = parser.add_mutually_exclusive_group(required=True)
    finish.add_argument("--finish-at", metavar="HH:MM", help="UTC time by which all is written")
    finish.add_argument("--seconds", type=float, help="from now, by which all is written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 256")
    parser.add_argument(
        "--initial", type=Path, help="start from the weights and sizes of this checkpoint (grow.py)"
    )
    parser.add_argument("--batch", type=int, default=4096, help="tokens per step")
    parser.add_argument("--workers", type=int, default=2, help="passes at the same time, one core each")
    parser.add_argument("--part", type=int, default=2048, help="tokens per forward and backward pass")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument(
        "--weight-decay", type=float, default=0.1, help="of the hidden matrices, times the rate"
    )
    parser.add_argument("--decay", type=float, default=0.3, help="fraction of the run in the decay phase")
    parser.add_argument("--long", type=float, default=0.12, help="fraction of the run at 2048 tokens")
    parser.add_argument(
        "--short", type=float, default=0.5, help="fraction of the run at 256 tokens; 512 in between"
    )
    parser.add_argument(
        "--mix", type=weights_of, default=weights_of("0.42,0.37,0.15,0.06"), help=",".join(BUCKETS)
    )
    parser.add_argument("--decay-mix", type=weights_of, default=weights_of("0.52,0.34,0.10,0.04"))
    parser.add_argument("--every", type=int, default=50, help="steps between progress lines")
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--resume", action="store_true", help="continue from checkpoint.pt in the work directory"
    )
    return parser.parse_args()


def main() -> None:
    """Trains the model."""
    options = parse()
    trainer = Trainer(options)
    if options.resume:
        trainer.load(options.work / "checkpoint.pt")
    signal.signal(signal.SIGTERM, trainer.stop)
    count = sum(weight.numel() for weight in trainer.model.parameters())
    print(f"{count} parameters, vocabulary included once", flush=True)
    trainer.run()


if __name__ == "__main__":
    main()
