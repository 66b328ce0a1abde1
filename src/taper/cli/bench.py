"""`taper bench`: prefill and decode speed at several widths, in rows like llama-bench's."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from taper import __version__
from taper.cli.options import WidthList, json_option, model_path, set_threads, threads_option
from taper.cli.terminal import file_size, note, table
from taper.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    from taper.models import Decoder

# Arbitrary; the speed does not depend on the tokens, but the same ones make runs comparable.
_SEED = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    Attributes:
        test: pp512 is a prompt of 512 tokens, tg128 128 tokens generated from an empty cache.
        bits: width of every pass.
        num_tokens: of one repetition.
        tokens_per_s: median over the repetitions.
        spread_frac: (fastest - slowest) / median.
        bytes_per_token: weights and KV entries read, mean over the tokens.
        gb_per_s: bytes_per_token * tokens_per_s / 1e9.
        seconds: of each repetition.
    """

    test: str
    bits: float
    num_tokens: int
    tokens_per_s: float
    spread_frac: float
    bytes_per_token: float
    gb_per_s: float
    seconds: tuple[float, ...]


@click.command("bench")
@click.argument("model", required=False)
@click.option("--bits", type=WidthList(), help="Widths to measure; default: all in the file, widest first.")
@click.option(
    "--prompt", type=click.IntRange(0), default=512, show_default=True, help="Prompt tokens; 0: no row."
)
@click.option(
    "--generate", type=click.IntRange(0), default=128, show_default=True, help="Generated tokens; 0: no row."
)
@click.option(
    "--repeat", type=click.IntRange(1), default=5, show_default=True, help="Repetitions after a warm-up."
)
@threads_option
@json_option
def command(
    model: str | None,
    bits: tuple[float, ...] | None,
    prompt: int,
    generate: int,
    repeat: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure MODEL (a .taper file; default: the one in the package) on random tokens.

    The median of the repetitions counts. The last line is JSON with the key "rows"; --json prints only that.
    """
    from taper.formats.container import TaperFile
    from taper.models import Decoder

    set_threads(threads)
    if not prompt and not generate:
        raise UsageError(
            "--prompt 0 and --generate 0 leave nothing to measure", hint="give one of them tokens"
        )
    file = TaperFile.open(model_path(model))
    note(file.notice())
    decoder = Decoder.from_taper(file)
    widths = bits or tuple(range(decoder.max_bits, decoder.min_bits - 1, -1))
    for width in widths:
        decoder.widths(width)  # refuses what the file does not hold before anything runs
    if max(prompt, generate) > decoder.context_length:
        raise DoesNotFitError(
            f"{max(prompt, generate)} tokens are beyond the model's context of {decoder.context_length}",
            hint=f"ask for at most {decoder.context_length}",
        )
    rows = []
    for row in measure(decoder, widths, prompt, generate, repeat):
        rows.append(row)
        if not as_json:
            click.echo(f"{row.test} at {row.bits:g} bits: {row.tokens_per_s:.1f} tok/s", err=True)
    if not as_json:
        click.echo(_text(rows))
    click.echo(json.dumps(_report(file.path.name, file.file_bytes, rows)))


def measure(
    decoder: Decoder, widths: tuple[float, ...], prompt: int, generate: int, repeat: int
) -> Iterator[Row]:
    """Measure each width; every test first runs once without a clock."""
    for bits in widths:
        if prompt:
            yield _row(f"pp{prompt}", bits, prompt, _prefill(decoder, bits, prompt), repeat)
        if generate:
            yield _row(f"tg{generate}", bits, generate, _decode(decoder, bits, generate), repeat)


def _row(test: str, bits: float, num_tokens: int, run: Callable[[], int], repeat: int) -> Row:
    """`run` does the work once and returns the bytes that it read."""
    num_bytes = run()
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds)
    return Row(
        test=test,
        bits=bits,
        num_tokens=num_tokens,
        tokens_per_s=num_tokens / median,
        spread_frac=(num_tokens / min(seconds) - num_tokens / max(seconds)) / (num_tokens / median),
        bytes_per_token=num_bytes / num_tokens,
        gb_per_s=num_bytes / median / 1e9,
        seconds=tuple(seconds),
    )


def _prefill(decoder: Decoder, bits: float, num_tokens: int) -> Callable[[], int]:
    """A prompt in the engine's chunks, logits of the last token only."""
    from taper.engine.engine import PREFILL_CHUNK_TOKENS

    tokens = _random_tokens(decoder, num_tokens)

    def run() -> int:
        cache = decoder.new_cache(num_tokens)
        num_bytes = 0
        for begin in range(0, num_tokens, PREFILL_CHUNK_TOKENS):
            chunk = tokens[begin : begin + PREFILL_CHUNK_TOKENS]
            decoder.forward(chunk, cache, bits, "last" if begin + len(chunk) == num_tokens else "none")
            num_bytes += decoder.bytes_per_pass(bits) + cache.bytes_read(cache.num_tokens)
        return num_bytes

    return run


def _decode(decoder: Decoder, bits: float, num_tokens: int) -> Callable[[], int]:
    """One pass a token, from an empty cache; no sampling, as in llama-bench."""
    tokens = _random_tokens(decoder, num_tokens)

    def run() -> int:
        cache = decoder.new_cache(num_tokens)
        num_bytes = 0
        for index in range(num_tokens):
            decoder.forward(tokens[index : index + 1], cache, bits, "last")
            num_bytes += decoder.bytes_per_pass(bits) + cache.bytes_read(cache.num_tokens)
        return num_bytes

    return run


def _random_tokens(decoder: Decoder, num_tokens: int) -> Any:
    import numpy as np

    return np.random.default_rng(_SEED).integers(0, decoder.config.vocab_size, num_tokens, dtype=np.int32)


def _report(name: str, file_bytes: int, rows: list[Row]) -> dict[str, Any]:
    import platform

    from taper.engine import peak_memory_bytes
    from taper.kernels import isa, num_threads

    return {
        "model": name,
        "file_bytes": file_bytes,
        "version": __version__,
        "machine": platform.machine(),
        "isa": isa(),
        "threads": num_threads(),
        "peak_memory_bytes": peak_memory_bytes(),
        "rows": [asdict(row) for row in rows],
    }


def _text(rows: list[Row]) -> str:
    header = ("test", "bits", "tok/s", "spread", "read per token", "GB/s")
    cells = [
        (
            row.test,
            f"{row.bits:g}",
            f"{row.tokens_per_s:.1f}",
            f"{row.spread_frac:.1%}",
            file_size(row.bytes_per_token),
            f"{row.gb_per_s:.2f}",
        )
        for row in rows
    ]
    return table(header, cells)
