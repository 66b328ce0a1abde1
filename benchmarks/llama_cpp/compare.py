"""Compare decoding speed with llama.cpp: ours, theirs, ours, theirs, in one run.

Every sample is a fresh process. The two sides alternate and each pair has its own sample of read
bandwidth, so a machine that changes its speed changes both sides of a ratio.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from build import Peer, ensure_peer
from common import BenchmarkError, default_dir, progress, run, run_main
from gguf_models import (
    QUANTIZED_TYPES,
    SHAPES,
    Shape,
    check_types,
    ensure_models,
    file_bytes_per_token,
    optional_package,
    shape_named,
    split_names,
    weights_per_token,
)
from machine import CpuClock, build_reader, governor, processor, read_bandwidth
from report import (
    ROUND_HEADER,
    Pair,
    Sample,
    Side,
    disturbed_line,
    round_json,
    round_line,
    summarize,
    summary_json,
    summary_lines,
)

PLANES = "2-8"
SAMPLE_TIMEOUT_S = 1800
WRITE_TIMEOUT_S = 3600


@dataclass(frozen=True, slots=True)
class Options:
    """What to compare.

    Attributes:
        shape: dimensions of both models.
        bits: our widths.
        against: their quantized types; every width meets every type.
        threads: threads of either side.
        rounds: pairs of each combination.
        generate: tokens that a run decodes.
        directory: cache folder.
        python: interpreter in which our package is installed.
    """

    shape: Shape
    bits: tuple[int, ...]
    against: tuple[str, ...]
    threads: int
    rounds: int
    generate: int
    directory: Path
    python: str


def write_taper(shape: Shape, path: Path, python: str) -> None:
    """Write a .taper file of random weights; it appears complete or not at all."""
    progress(f"writing {path.name}")
    partial = path.with_suffix(".partial")
    generator = [python, "-m", "taper.testing.random_model"]
    run([*generator, "--shape", shape.name, "--out", partial, "--bits", PLANES], timeout_s=WRITE_TIMEOUT_S)
    partial.rename(path)


def ours_command(options: Options, file: Path, bits: int) -> tuple[str, ...]:
    """Return the command line of one of our runs."""
    threads, generate = str(options.threads), str(options.generate)
    counts = ("--threads", threads, "--prompt", "0", "--generate", generate, "--repeat", "1")
    return (options.python, "-m", "taper", "bench", str(file), "--bits", str(bits), *counts, "--json")


def theirs_command(options: Options, peer: Peer, file: Path) -> tuple[str, ...]:
    """Return the command line of one of their runs: llama-bench's defaults but for the counts."""
    counts = ("-t", str(options.threads), "-p", "0", "-n", str(options.generate))
    return (str(peer.program("llama-bench")), "-m", str(file), *counts, "-r", "1", "-o", "json")


def parse_ours(stdout: str, bits: int, generate: int) -> tuple[float, int]:
    """Read tokens per second and bytes per token from the last line of `taper bench --json`."""
    test = f"tg{generate}"
    try:
        rows = json.loads(stdout.splitlines()[-1])["rows"]
        (row,) = (row for row in rows if row["test"] == test and row["bits"] == bits)
        return float(row["tokens_per_s"]), int(row["bytes_per_token"])
    except (IndexError, KeyError, TypeError, ValueError):
        raise BenchmarkError(
            f"the last line of taper bench is not JSON with one row of test {test} and bits {bits}; "
            "use the taper of this checkout"
        ) from None


def parse_theirs(stdout: str, generate: int) -> float:
    """Read tokens per second from the output of `llama-bench -o json`."""
    try:
        (row,) = (row for row in json.loads(stdout) if row["n_gen"] == generate)
        return float(row["avg_ts"])
    except (KeyError, TypeError, ValueError):
        raise BenchmarkError(
            f"llama-bench printed no JSON with one row of n_gen {generate}; delete its folder and build again"
        ) from None


@dataclass(frozen=True, slots=True)
class Runner:
    """One side and how to read its speed from its output."""

    side: Side
    tokens_per_s: Callable[[str], float]

    def sample(self) -> Sample:
        """Run the side once, in a fresh process."""
        clock = CpuClock.now()
        stdout = run(self.side.command, timeout_s=SAMPLE_TIMEOUT_S)
        return Sample(self.side, self.tokens_per_s(stdout), clock.others_frac())


def prepare_ours(options: Options, file: Path, bits: int) -> Runner:
    """Describe one of our widths; an unrecorded run tells its bytes and fills the page cache."""
    command = ours_command(options, file, bits)
    stdout = run(command, timeout_s=SAMPLE_TIMEOUT_S)
    _, num_bytes = parse_ours(stdout, bits, options.generate)
    side = Side(f"{bits} bits", command, file.stat().st_size, num_bytes, weights_per_token(options.shape))
    return Runner(side, lambda text: parse_ours(text, bits, options.generate)[0])


def prepare_theirs(options: Options, peer: Peer, file: Path, name: str) -> Runner:
    """Describe one of their types; an unrecorded run fills the page cache."""
    command = theirs_command(options, peer, file)
    run(command, timeout_s=SAMPLE_TIMEOUT_S)
    num_bytes = file_bytes_per_token(file)
    side = Side(name, command, file.stat().st_size, num_bytes, weights_per_token(options.shape))
    return Runner(side, lambda text: parse_theirs(text, options.generate))


def measure(options: Options, peer: Peer) -> Iterator[Pair]:
    """Write what is missing, then yield the pairs in the order in which they are run."""
    models = options.directory / "models"
    reader = build_reader(options.directory)
    files = ensure_models(options.shape, options.against, models, peer)
    file = models / f"{options.shape.name}.taper"
    if not file.exists():
        write_taper(options.shape, file, options.python)
    progress("running every side once, unrecorded")
    ours = [prepare_ours(options, file, bits) for bits in options.bits]
    theirs = [
        prepare_theirs(options, peer, path, name) for path, name in zip(files, options.against, strict=True)
    ]
    for number in range(1, options.rounds + 1):
        for their in theirs:
            for our in ours:
                bandwidth = read_bandwidth(reader, options.threads)
                yield Pair(number, bandwidth, our.sample(), their.sample())


def commit() -> str:
    """Return the commit of this checkout, with `+` behind it where files differ from it."""
    git: list[str | Path] = ["git", "-C", Path(__file__).parent]
    try:
        changed = run([*git, "status", "--porcelain", "--untracked-files=no"], timeout_s=60).strip()
        return run([*git, "rev-parse", "--short", "HEAD"], timeout_s=60).strip() + ("+" if changed else "")
    except BenchmarkError:
        return "unknown"


def conditions(options: Options, peer: Peer) -> dict[str, object]:
    """Return what a reader needs to judge or repeat the run."""
    version = "import importlib.metadata as m, platform as p; print(p.python_version(), m.version('taper'))"
    try:
        python_version, taper_version = run([options.python, "-c", version], timeout_s=60).split()
    except BenchmarkError:
        raise BenchmarkError(
            f"taper is not installed in {options.python}; install it there or give another Python by --python"
        ) from None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "governor": governor(),
        "system": platform.platform(),
        "threads": options.threads,
        "rounds": options.rounds,
        "generate_tokens": options.generate,
        "shape": asdict(options.shape),
        "taper": f"{taper_version} ({commit()})",
        "python": python_version,
        "llama.cpp": f"{peer.commit} ({peer.package})",
        "llama.cpp_compiler": peer.compiler,
        "llama.cpp_options": " ".join(peer.options),
    }


def positive(text: str) -> int:
    """Read a positive whole number of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def parse_options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare decoding speed with llama.cpp in one run.")
    parser.add_argument("--shape", default="1.1b", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--bits", default="4,3,2", help="our widths, comma-separated")
    parser.add_argument("--against", default="Q4_0", help=f"their types among {', '.join(QUANTIZED_TYPES)}")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="threads of either side")
    parser.add_argument("--rounds", type=positive, default=5, help="pairs of each combination")
    parser.add_argument("--generate", type=positive, default=64, help="tokens decoded in one run")
    parser.add_argument("--dir", type=Path, default=default_dir(), help="cache folder")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has taper installed")
    args = parser.parse_args()
    try:
        bits = tuple(positive(name) for name in split_names(args.bits))
    except argparse.ArgumentTypeError as error:
        raise BenchmarkError(f"--bits {args.bits}: {error}; write it like 4,3,2") from None
    against = tuple(split_names(args.against))
    if not bits or not against:
        raise BenchmarkError("--bits or --against is empty; give at least one name to each")
    check_types(against)
    return Options(
        shape_named(args.shape),
        bits,
        against,
        args.threads,
        args.rounds,
        args.generate,
        args.dir.expanduser().resolve(),
        args.python,
    )


def main() -> None:
    """Print conditions, a row per pair as it is measured, medians, and JSON as the last line."""
    options = parse_options()
    optional_package("gguf")  # needed late, so missed early
    peer = ensure_peer(options.directory, jobs=os.cpu_count() or 1)
    facts = conditions(options, peer)
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(f"\n{ROUND_HEADER}")
    pairs = []
    for pair in measure(options, peer):
        print(round_line(pair), flush=True)
        pairs.append(pair)
    summaries = summarize(pairs)
    print("", *summary_lines(summaries), sep="\n")
    print(disturbed_line(pairs))
    result = {
        "conditions": facts,
        "summary": [summary_json(row) for row in summaries],
        "rounds": [round_json(pair) for pair in pairs],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
