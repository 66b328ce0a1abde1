"""`taper bench`: prefill and decode speed at several widths, in rows like llama-bench's."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from taper import __version__
from taper.cli import bench_serve
from taper.cli.options import (
    CountList,
    WidthList,
    json_option,
    kv_option,
    model_path,
    set_threads,
    threads_option,
)
from taper.cli.terminal import file_size, note, table
from taper.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    from taper.kvcache import AnyCache
    from taper.models import Decoder
    from taper.precision import Bits, PrecisionPolicy

# Arbitrary; the speed does not depend on the tokens, but the same ones make runs comparable.
_SEED = 0
# One verification takes about as long as one token: so many make a repetition that a clock can tell.
_VERIFY_PASSES = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        policies: each gives its own rows.
        prompt: tokens of a prompt, 0 for no such row.
        generate: tokens that each sequence decodes, 0 for no such row.
        depths: tokens that are in the cache before the clock starts.
        batches: sequences that decode together.
        verify: tokens of one pass that returns the logits of all of them.
        repeat: repetitions after a warm-up.
        stages: whether another repetition, not counted, measures what the time goes to.
    """

    policies: tuple[PrecisionPolicy, ...]
    prompt: int
    generate: int
    depths: tuple[int, ...]
    batches: tuple[int, ...]
    verify: tuple[int, ...]
    repeat: int
    stages: bool

    @property
    def max_tokens(self) -> int:
        """Entries of the longest cache."""
        return max(self.depths) + max(self.prompt, self.generate, *self.verify)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    Attributes:
        test: pp512 is a prompt of 512 tokens; tg128 128 tokens generated one by one, `x8` by each of 8
            sequences together; vf5 passes over 5 tokens with the logits of each, as a verification of drafts
            has them. `@ d3072` behind it: after 3072 tokens that are in the cache.
        policy: which bits each pass reads.
        bits: mean over the passes.
        num_tokens: of one repetition, of all sequences together.
        tokens_per_s: median over the repetitions.
        spread_frac: (fastest - slowest) / median.
        bytes_per_token: weights and KV entries read, mean over the tokens.
        gb_per_s: bytes_per_token * tokens_per_s / 1e9.
        seconds: of each repetition.
        stages: share of a repetition's time by stage of the step, `rest` being what comes around the native
            call; empty where it was not asked for.
    """

    test: str
    policy: str
    bits: float
    num_tokens: int
    tokens_per_s: float
    spread_frac: float
    bytes_per_token: float
    gb_per_s: float
    seconds: tuple[float, ...]
    stages: dict[str, float]


@click.command("bench")
@click.argument("model", required=False)
@click.option("--bits", type=WidthList(), help="Widths to measure; default: all in the file, widest first.")
@click.option("--policy", metavar="TEXT", help="Bits by position instead of --bits, as in taper run.")
@click.option(
    "--prompt", type=click.IntRange(0), default=512, show_default=True, help="Prompt tokens; 0: no row."
)
@click.option(
    "--generate", type=click.IntRange(0), default=128, show_default=True, help="Generated tokens; 0: no row."
)
@click.option(
    "--depth", "depths", type=CountList(0), default="0", help="Tokens in the cache before; default: 0."
)
@click.option(
    "--batch", "batches", type=CountList(1), default="1", help="Sequences that generate together; default: 1."
)
@click.option("--verify", type=CountList(1), help="Also time passes over so many drafted tokens.")
@click.option(
    "--repeat", type=click.IntRange(1), default=5, show_default=True, help="Repetitions after a warm-up."
)
@click.option("--stages", is_flag=True, help="Also say what the time of a pass goes to.")
@click.option("--serve", is_flag=True, help="Goodput under load instead: requests with deadlines and floors.")
@click.option("--policies", default="", metavar="LIST", help="With --serve: planner,edf,...; default: all.")
@click.option("--loads", type=WidthList(), help="With --serve: over saturation; default: 0.5,1,1.5,2,3.")
@click.option("--seconds", type=click.FloatRange(0.1, 3600), help="With --serve: of arrivals; default: 20.")
@click.option("--seed", type=click.IntRange(0), help="With --serve: of the trace; default: 0.")
@click.option("--arrivals", type=click.Choice(["poisson", "bursty"]), help="With --serve; default: poisson.")
@click.option(
    "--on", type=click.Choice(["engine", "simulator", "both"]), help="With --serve; default: engine."
)
@click.option("--trace", type=click.Path(path_type=Path), help="With --serve: run the requests of this file.")
@click.option(
    "--save-trace", type=click.Path(path_type=Path), help="With --serve: keep those of the last load."
)
@kv_option
@threads_option
@json_option
def command(
    model: str | None,
    bits: tuple[float, ...] | None,
    policy: str | None,
    verify: tuple[int, ...] | None,
    kv: str | None,
    threads: int | None,
    as_json: bool,
    serve: bool,
    policies: str,
    loads: tuple[float, ...] | None,
    seconds: float | None,
    seed: int | None,
    arrivals: Literal["poisson", "bursty"] | None,
    on: str | None,
    trace: Path | None,
    save_trace: Path | None,
    **counts: Any,
) -> None:
    """Measure MODEL (a .taper file; default: the one in the package) on random tokens.

    --depth, --batch and --verify take lists, as in 0,1024. The median of the repetitions counts. The last
    line is JSON with the key "rows"; --json prints only that.
    """
    from taper.formats.container import TaperFile
    from taper.models import Decoder

    set_threads(threads)
    serving = (policies or None, loads, seconds, seed, arrivals, on, trace, save_trace)
    if serve:
        if bits is not None or policy is not None or verify is not None or counts["stages"]:
            raise UsageError(
                "--serve reads the widths that its policies choose", "leave --bits and --policy out"
            )
        bench_serve.run(
            model_path(model),
            tuple(name for name in policies.split(",") if name),
            loads or bench_serve.LOADS,
            seconds or 20.0,
            seed or 0,
            arrivals or "poisson",
            on or "engine",
            trace,
            save_trace,
            kv or "7",
            as_json,
        )
        return
    if any(one is not None for one in serving):
        raise UsageError("--policies, --loads and their like are of --serve", "give --serve, too")
    file = TaperFile.open(model_path(model))
    note(file.notice())
    decoder = Decoder.from_taper(file, kv=kv)
    plan = Plan(_policies(decoder, bits, policy), verify=verify or (), **counts)
    _check(plan, decoder)
    rows = []
    for row in measure(decoder, plan):
        rows.append(row)
        if not as_json:
            click.echo(f"{row.test} at {row.bits:.3g} bits: {row.tokens_per_s:.1f} tok/s", err=True)
    if not as_json:
        click.echo(_text(rows))
        for row in rows if plan.stages else ():
            click.echo(f"{row.test} at {row.bits:.3g} bits: {_stages_text(row.stages)}")
    click.echo(json.dumps(_report(file.path.name, file.file_bytes, rows)))


def _policies(
    decoder: Decoder, bits: tuple[float, ...] | None, policy: str | None
) -> tuple[PrecisionPolicy, ...]:
    """The policies of --bits or --policy; refuses what the file does not hold before anything runs."""
    from taper.precision import Fixed, parse_policy

    if policy is not None:
        if bits is not None:
            raise UsageError("--bits and --policy both say which bits to read", hint="give one of them")
        if policy.partition(":")[0] in ("exact", "learned"):
            raise UsageError(f"policy {policy!r} hangs on the answer", hint="give --bits or switches")
        return (parse_policy(policy, decoder.min_bits, decoder.max_bits, decoder.has_sensitivity),)
    widths = bits or tuple(range(decoder.max_bits, decoder.min_bits - 1, -1))
    for width in widths:
        decoder.widths(width)
    return tuple(Fixed(width) for width in widths)


def _check(plan: Plan, decoder: Decoder) -> None:
    if not (plan.prompt or plan.generate or plan.verify):
        raise UsageError(
            "--prompt 0 and --generate 0 leave nothing to measure", hint="give one of them tokens"
        )
    if plan.max_tokens > decoder.context_length:
        raise DoesNotFitError(
            f"{plan.max_tokens} tokens are beyond the model's context of {decoder.context_length}",
            hint=f"ask for at most {decoder.context_length}",
        )


def measure(decoder: Decoder, plan: Plan) -> Iterator[Row]:
    """Measure each policy; every test first runs once without a clock."""
    for policy in plan.policies:
        for depth in plan.depths:
            reader = _Reader(decoder, policy, depth)
            if plan.prompt:
                yield _row(f"pp{plan.prompt}", reader, reader.prefill(plan.prompt), plan)
            for batch in plan.batches if plan.generate else ():
                test = f"tg{plan.generate}" + (f" x{batch}" if batch > 1 else "")
                yield _row(test, reader, reader.decode(plan.generate, batch), plan)
            for count in plan.verify:
                yield _row(f"vf{count}", reader, reader.verify(count), plan)


@dataclass(slots=True)
class _Work:
    """What one repetition did.

    Attributes:
        num_tokens: of all sequences together.
        num_bytes: weights and KV entries read.
        bits: of each pass.
    """

    num_tokens: int = 0
    num_bytes: int = 0
    bits: list[float] = field(default_factory=list)


class _Reader:
    """Runs passes of one decoder under one policy, always from `depth` tokens on."""

    def __init__(self, decoder: Decoder, policy: PrecisionPolicy, depth: int) -> None:
        self.decoder, self.policy, self.depth = decoder, policy, depth

    def prefill(self, num_tokens: int) -> Callable[[], _Work]:
        """A prompt in the engine's chunks, logits of the last token only."""
        from taper.engine.engine import PREFILL_CHUNK_TOKENS

        tokens, cache = self._tokens(num_tokens), self._cache(num_tokens)

        def run() -> _Work:
            work = _Work()
            cache.truncate(self.depth)
            for begin in range(0, num_tokens, PREFILL_CHUNK_TOKENS):
                chunk = tokens[begin : begin + PREFILL_CHUNK_TOKENS]
                bits = self._bits(cache, 0, 1)
                self.decoder.forward(
                    chunk, cache, bits, "last" if begin + len(chunk) == num_tokens else "none"
                )
                self._count(work, bits, len(chunk), [cache])
            return work

        return run

    def decode(self, num_tokens: int, batch: int) -> Callable[[], _Work]:
        """One pass a token of each sequence; no sampling, as in llama-bench."""
        tokens = self._tokens(num_tokens * batch).reshape(num_tokens, batch)
        caches = [self._cache(num_tokens) for _ in range(batch)]

        def run() -> _Work:
            work = _Work()
            for cache in caches:
                cache.truncate(self.depth)
            for index in range(num_tokens):
                bits = self._bits(caches[0], index + 1, num_tokens)
                self.decoder.decode_batch(tokens[index], caches, bits)
                self._count(work, bits, batch, caches)
            return work

        return run

    def verify(self, num_tokens: int) -> Callable[[], _Work]:
        """Passes over the same tokens that take back what they wrote."""
        tokens, cache = self._tokens(num_tokens), self._cache(num_tokens)

        def run() -> _Work:
            work = _Work()
            for _ in range(_VERIFY_PASSES):
                cache.truncate(self.depth)
                bits = self._bits(cache, 1, 1)
                self.decoder.forward(tokens, cache, bits, "all")
                self._count(work, bits, num_tokens, [cache])
            return work

        return run

    def _bits(self, cache: AnyCache, num_generated: int, max_tokens: int) -> Bits:
        from taper.precision import StepContext

        decoder = self.decoder
        return self.policy.bits(
            StepContext(
                phase="decode" if num_generated else "prefill",
                position=cache.num_tokens,
                num_generated=num_generated,
                max_tokens=max_tokens,
                min_bits=decoder.min_bits,
                max_bits=decoder.max_bits,
                allows_fractions=decoder.has_sensitivity,
            )
        )

    def _count(self, work: _Work, bits: Bits, num_tokens: int, caches: Sequence[AnyCache]) -> None:
        work.bits.append(bits if isinstance(bits, int | float) else self.decoder.bits_per_weight(bits))
        work.num_tokens += num_tokens
        work.num_bytes += self.decoder.bytes_per_pass(bits)
        work.num_bytes += sum(cache.bytes_read(cache.num_tokens) for cache in caches)

    def _cache(self, room: int) -> AnyCache:
        """A cache with room behind `depth` random entries, over which attention takes as long as over real
        ones.
        """
        from taper.kvcache import fill_with_random_entries

        cache = self.decoder.new_cache(self.depth + room)
        fill_with_random_entries(cache, self.decoder.config, self.depth, _SEED)
        return cache

    def _tokens(self, num_tokens: int) -> Any:
        import numpy as np

        vocab_size = self.decoder.config.vocab_size
        return np.random.default_rng(_SEED).integers(0, vocab_size, num_tokens, dtype=np.int32)


def _row(test: str, reader: _Reader, run: Callable[[], _Work], plan: Plan) -> Row:
    work = run()
    seconds = []
    for _ in range(plan.repeat):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds)
    return Row(
        test=test + (f" @ d{reader.depth}" if reader.depth else ""),
        policy=reader.policy.name,
        bits=statistics.mean(work.bits),
        num_tokens=work.num_tokens,
        tokens_per_s=work.num_tokens / median,
        spread_frac=(1 / min(seconds) - 1 / max(seconds)) * median,
        bytes_per_token=work.num_bytes / work.num_tokens,
        gb_per_s=work.num_bytes / median / 1e9,
        seconds=tuple(seconds),
        stages=_stages(reader.decoder, run) if plan.stages else {},
    )


def _stages(decoder: Decoder, run: Callable[[], _Work]) -> dict[str, float]:
    """Shares of one repetition's time, by stage, largest first."""
    decoder.times = {}
    begin = time.perf_counter_ns()
    run()
    total = time.perf_counter_ns() - begin
    times, decoder.times = decoder.times, None
    times["rest"] = total - sum(times.values())
    return {name: ns / total for name, ns in sorted(times.items(), key=lambda item: -item[1])}


def _stages_text(stages: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in stages.items())


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
            f"{row.bits:.3g}",
            f"{row.tokens_per_s:.1f}",
            f"{row.spread_frac:.1%}",
            file_size(row.bytes_per_token),
            f"{row.gb_per_s:.2f}",
        )
        for row in rows
    ]
    return table(header, cells)
