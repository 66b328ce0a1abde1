"""Attention of one token over a long KV cache: float16 against planes, cold, in turn within one run.

The shape of the 1.1 B model unless told otherwise. A sample goes through all layers once, so that the memory
of a call was last touched a whole cache ago (float16: 184 MB, 7 bits: 93 MB, beyond the last-level cache).
Each cache lies where it is fastest (Zen 4, one thread): planes at a page, as in the engine's pool, 537 us a
call, 601 where NumPy puts arrays, 16 bytes after one; float16 a line after a page, 819 us, at a page 882.
One thread is timed by its processor time, more by the clock. A table on stderr, JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from planes import clock_of, environment, numbers

from taper import kernels

BLOCK_ENTRIES = 64
KEY_BLOCK = 16
EXPONENT_BITS = 5
LINE_BYTES = 64
WINDOW = 128
# Magnitude bits stored of keys, of these in the upper part, the same of values; then what is read of keys and
# values of recent blocks, and of old ones.
FORMATS = {
    "planes 7": ((7, 7, 7, 7), (7, 7, 7, 7)),
    "planes 4": ((4, 4, 4, 4), (4, 4, 4, 4)),
    "planes 7, older 4": ((7, 4, 7, 4), (7, 7, 4, 4)),
}
Call = Callable[[np.ndarray, int], object]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the model, and the entries that the token sees."""

    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    entries: int


@dataclass(frozen=True, slots=True)
class Result:
    """Medians of one format; `of_float16` is that of the ratios to the same round's float16."""

    format: str
    threads: int
    samples: int
    call_us: float
    call_us_best: float
    of_float16: float
    bytes_read: int
    gb_s: float


def placed(array: np.ndarray, bytes_after_page: int) -> np.ndarray:
    """A copy in huge pages that begins so far after a page."""
    memory = mmap.mmap(-1, array.nbytes + bytes_after_page)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    copy = np.frombuffer(memory, np.uint8)[bytes_after_page:].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def float16_cache(shape: Shape, rng: np.random.Generator) -> tuple[Call, int]:
    """A call over one layer, and the bytes that it reads."""
    size = (shape.layers, shape.kv_heads, shape.entries, shape.head_dim)
    keys, values = (rng.standard_normal(size, np.float32).astype(np.float16) for _ in range(2))
    blocks = keys.reshape(*size[:2], -1, KEY_BLOCK, shape.head_dim).swapaxes(3, 4)
    keys, values = placed(blocks, LINE_BYTES), placed(values, LINE_BYTES)
    scale = shape.head_dim**-0.5

    def call(qkv: np.ndarray, layer: int) -> object:
        return kernels.attention(qkv, shape.heads, keys[layer], values[layer], shape.entries - 1, scale)

    return call, keys[0].nbytes + values[0].nbytes


def planes_cache(name: str, shape: Shape, rng: np.random.Generator) -> tuple[Call, int]:
    """The same over planes: random bits, exponents about those of standard normal values."""
    stored, read = FORMATS[name]
    layout = kernels.PlanesLayout(shape.kv_heads, shape.head_dim, [stored] * shape.layers)
    count = shape.entries // BLOCK_ENTRIES
    upper = placed(rng.integers(0, 256, (count, layout.upper_bytes), np.uint8), 0)
    plane = shape.kv_heads * shape.head_dim * BLOCK_ENTRIES // 8
    first = shape.layers * plane * (2 + stored[1] + stored[3])  # exponents follow the planes of all layers
    for block in upper:
        # Exponents 14 and 15: words of bits 8, 4 and 2 set, 16 clear, 1 random.
        words = block[first : first + (len(block) - first) // 40 * 40].reshape(-1, EXPONENT_BITS, 8)
        words[:, 0] = 0
        words[:, 1:4] = 255
    lower = None
    table = np.tile(np.arange(count, dtype=np.int32), (2, 1))
    old = np.arange(count) * BLOCK_ENTRIES + BLOCK_ENTRIES - 1 <= shape.entries - 1 - WINDOW
    if layout.lower_bytes:
        lower = placed(rng.integers(0, 256, (int((~old).sum()), layout.lower_bytes), np.uint8), 0)
        table[1] = np.where(old, -1, np.cumsum(~old) - 1)
    bits = np.array([read] * shape.layers, np.uint8)
    blocks = kernels.PlanesBlocks(layout, upper, lower, table, bits, WINDOW)
    planes = sum(2 + sum(read[2:] if is_old else read[:2]) for is_old in old) * plane
    groups = 2 * shape.kv_heads * (shape.head_dim // min(64, shape.head_dim & -shape.head_dim))
    scale = shape.head_dim**-0.5

    def call(qkv: np.ndarray, layer: int) -> object:
        return kernels.planes_attention(qkv, shape.heads, blocks, layer, shape.entries - 1, scale)

    return call, planes + count * groups * EXPONENT_BITS * BLOCK_ENTRIES // 8


def seconds(call: Call, qkv: np.ndarray, layers: int, clock: Callable[[], float]) -> float:
    """Of one call, over all layers."""
    start_s = clock()
    for layer in range(layers):
        call(qkv, layer)
    return (clock() - start_s) / layers


def measure(
    shape: Shape, threads: int, num_samples: int, caches: dict[str, tuple[Call, int]]
) -> list[Result]:
    """All formats in turn, so that a change of the machine's pace meets each of them."""
    kernels.set_num_threads(threads)
    clock = clock_of(threads)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    qkv = np.random.default_rng(1).standard_normal((1, width), np.float32)
    for call, _ in caches.values():
        if not np.isfinite(call(qkv, 0)).all():
            raise RuntimeError("attention over the made-up cache is not finite")
        seconds(call, qkv, shape.layers, clock)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(num_samples):
        for name, (call, _) in caches.items():
            times[name].append(seconds(call, qkv, shape.layers, clock))
    results = []
    for name, (_, read) in caches.items():
        median_s = statistics.median(times[name])
        ratio = statistics.median(t / f for t, f in zip(times[name], times["float16"], strict=True))
        results.append(
            Result(
                name,
                threads,
                num_samples,
                call_us=median_s * 1e6,
                call_us_best=min(times[name]) * 1e6,
                of_float16=ratio,
                bytes_read=read,
                gb_s=read / median_s / 1e9,
            )
        )
    return results


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--entries", type=int, default=8192, help="a multiple of 64")
    parser.add_argument("--threads", type=numbers, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--isa", default=kernels.isa(), choices=kernels.available_isas())
    parser.add_argument("--samples", type=int, default=15)
    args = parser.parse_args()
    if args.entries < BLOCK_ENTRIES or args.entries % BLOCK_ENTRIES:
        parser.error(f"--entries is {args.entries}, expected a multiple of {BLOCK_ENTRIES}")
    return args


def main() -> None:
    """Run every combination of the options."""
    args = parse_arguments()
    shape = Shape(args.heads, args.kv_heads, args.head_dim, args.layers, args.entries)
    rng = np.random.default_rng(0)
    caches = {"float16": float16_cache(shape, rng)}
    caches |= {name: planes_cache(name, shape, rng) for name in FORMATS}
    start_s, results = time.monotonic(), []
    with kernels.use_isa(args.isa):
        for threads in args.threads:
            for result in measure(shape, threads, args.samples, caches):
                results.append(result)
                print(
                    f"{args.isa:9} {result.threads} thr {result.format:18} {result.call_us:8.1f} us "
                    f"(best {result.call_us_best:8.1f}) {result.of_float16:5.2f} of float16 "
                    f"{result.bytes_read / 1e6:5.2f} MB {result.gb_s:5.1f} GB/s",
                    file=sys.stderr,
                    flush=True,
                )
    print(
        json.dumps(
            {
                "environment": environment(),
                "isa": args.isa,
                "shape": asdict(shape),
                "seconds": time.monotonic() - start_s,
                "results": [asdict(result) for result in results],
            }
        )
    )


if __name__ == "__main__":
    main()
