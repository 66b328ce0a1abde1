"""Speed beside other programs: ours, theirs, ours, theirs, in one run.

Every sample is a fresh process with a sample of the read bandwidth before it. The sides of a group alternate,
every second round backwards, so a machine that changes its speed changes all sides of a ratio.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "llama_cpp"))

import groups as definitions
from build import ensure_peer
from common import BenchmarkError, default_dir, progress, run, run_main
from gguf_models import SHAPES, TYPES, ensure_models, optional_package
from groups import PEERS, Group
from machine import CpuClock, build_reader, governor, processor, read_bandwidth
from report import Sample, as_json, summaries, summary_lines, verdict_lines, verdicts
from sides import Programs, Side

PLANES = "2-8"
SAMPLE_TIMEOUT_S = 1800
WRITE_TIMEOUT_S = 3600
CHUNK_BYTES = 1 << 24
BUSY = "while True: pass"

BUILDERS: Mapping[str, Callable[[Programs, int], Group]] = {
    "decode": definitions.decode,
    "field": definitions.field,
    "progressive": definitions.progressive,
    "prefill": definitions.prefill,
    "depth": definitions.depth,
    "attention": definitions.attention,
    "batch": definitions.batch,
    "verify": definitions.verify,
    "contention": definitions.contention,
    "load": definitions.load,
    "overhead": definitions.overhead,
    "first-token": definitions.first_token,
    "135m-1": lambda programs, threads: definitions.small(shaped(programs, "135m"), 1),
    "135m-2": lambda programs, threads: definitions.small(shaped(programs, "135m"), 2),
    "avx2": definitions.avx2,
    "linear": definitions.linear,
}


@dataclass(frozen=True, slots=True)
class Options:
    """What to compare.

    Attributes:
        names: groups, in the order of `BUILDERS`.
        threads: threads of every side, where a group does not say otherwise.
        rounds: to measure in this run.
        record: file to which samples are added and whose samples count, None to start from none.
        directory: cache folder.
        python: interpreter in which our package is installed.
        ik: llama-bench of ik_llama.cpp, None to leave it out.
        runners: script of `peers/` to the interpreter for it.
    """

    names: tuple[str, ...]
    threads: int
    rounds: int
    record: Path | None
    directory: Path
    python: str
    ik: Path | None
    runners: Mapping[str, str]


def shaped(programs: Programs, name: str) -> Programs:
    """The same programs on models of another shape."""
    return replace(programs, shape=SHAPES[name])


def prepare(options: Options) -> Programs:
    """Build the programs and write the models that are missing."""
    models = options.directory / "models"
    jobs = os.cpu_count() or 1
    llama = ensure_peer(options.directory, jobs=jobs)
    avx2 = ensure_peer(options.directory, jobs=jobs, variant="avx2") if "avx2" in options.names else None
    for name in ("1.1b", "135m"):
        if name == "1.1b" or {"135m-1", "135m-2"} & set(options.names):
            ensure_models(SHAPES[name], TYPES, models, llama)
            write_taper(name, models / f"{name}.taper", options.python)
    peer_models = options.directory / "peers"
    return Programs(
        SHAPES["1.1b"], models, options.python, llama, avx2, options.ik, options.runners, peer_models
    )


def write_taper(shape: str, path: Path, python: str) -> None:
    """Write a .taper file of random weights where it is missing; it appears complete or not at all."""
    if path.exists():
        return
    progress(f"writing {path.name}")
    partial = path.with_suffix(".partial")
    generator = [python, "-m", "taper.testing.random_model"]
    run([*generator, "--shape", shape, "--out", partial, "--bits", PLANES], timeout_s=WRITE_TIMEOUT_S)
    forget(partial)
    partial.rename(path)


def forget(path: Path) -> None:
    """Drop a file from the page cache, as a restart does: what Taper then reads lies in pages of 2 MiB."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    """Keep one core busy meanwhile."""
    if not wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", BUSY]) as process:
        try:
            yield
        finally:
            process.kill()


def take(side: Side, group: Group, number: int, reader: Path) -> list[Sample]:
    """Run one side once."""
    bandwidth = read_bandwidth(reader, group.threads)
    clock = CpuClock.now()
    with busy_process(side.busy_core):
        stdout = run(side.command, timeout_s=SAMPLE_TIMEOUT_S, environment=side.environment)
    others = clock.others_frac()
    return [
        Sample(group.name, number, name, figure.value, figure.bytes_per_token, bandwidth, others)
        for name, figure in side.read(stdout).items()
    ]


def read_through(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb") as file:
        while file.read(CHUNK_BYTES):
            pass


def measure(group: Group, options: Options, first: int) -> Iterator[Sample]:
    """All rounds of a group, numbered from `first` on."""
    reader = build_reader(options.directory)
    for path in {path for side in group.sides for path in side.files}:
        read_through(path)
    for number in range(first, first + options.rounds):
        for side in group.sides if number % 2 else reversed(group.sides):
            for sample in take(side, group, number, reader):
                mark = "  disturbed" if sample.disturbed else ""
                progress(
                    f"{group.name} {number}: {sample.name} {sample.value:.2f} {group.unit}, "
                    f"read {sample.read_bytes_per_s / 1e9:.1f} GB/s{mark}"
                )
                yield sample


def commit() -> str:
    """Return the commit of this checkout, with `+` behind it where files differ from it."""
    git: list[str | Path] = ["git", "-C", Path(__file__).parent]
    try:
        changed = run([*git, "status", "--porcelain", "--untracked-files=no"], timeout_s=60).strip()
        return run([*git, "rev-parse", "--short", "HEAD"], timeout_s=60).strip() + ("+" if changed else "")
    except BenchmarkError:
        return "unknown"


def conditions(options: Options, programs: Programs) -> dict[str, object]:
    """Return what a reader needs to judge or repeat the run."""
    version = "import importlib.metadata as m, platform as p; print(p.python_version(), m.version('taper'))"
    try:
        python_version, taper_version = run([options.python, "-c", version], timeout_s=60).split()
    except BenchmarkError:
        raise BenchmarkError(
            f"taper is not installed in {options.python}; install it there or give another Python by --python"
        ) from None
    peer = programs.llama
    facts: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "governor": governor(),
        "system": platform.platform(),
        "threads": options.threads,
        "shape": asdict(programs.shape),
        "taper": f"{taper_version} ({commit()})",
        "python": python_version,
        "llama.cpp": f"{peer.commit} ({peer.package})",
        "llama.cpp compiler": peer.compiler,
        "llama.cpp options": " ".join(peer.options),
    }
    if programs.llama_avx2 is not None:
        facts["llama.cpp options, AVX2"] = " ".join(programs.llama_avx2.options)
    return facts


def recorded(path: Path | None) -> list[Sample]:
    """The samples of earlier runs."""
    if path is None or not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Sample(**json.loads(line)) for line in lines]
    except (TypeError, ValueError):
        raise BenchmarkError(f"{path} holds other lines than samples; give another --record") from None


def positive(text: str) -> int:
    """Read a positive whole number of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def parse_options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare speeds with other programs in one run.")
    parser.add_argument("--only", default=",".join(BUILDERS), help=f"groups among {', '.join(BUILDERS)}")
    parser.add_argument("--threads", type=positive, default=2, help="threads of every side")
    parser.add_argument("--rounds", type=positive, default=5, help="rounds of each group")
    parser.add_argument("--record", type=Path, help="add to the samples of this file and count them all")
    parser.add_argument("--dir", type=Path, default=default_dir(), help="cache folder")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has taper installed")
    parser.add_argument("--ik", type=Path, metavar="PROGRAM", help="llama-bench of ik_llama.cpp")
    for name in (*PEERS, "linear_half"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, metavar="PYTHON", help=f"interpreter for peers/{name}.py")
    args = parser.parse_args()
    names = [name.strip() for name in args.only.split(",")]
    unknown = [name for name in names if name not in BUILDERS]
    if unknown:
        raise BenchmarkError(f"--only names {unknown[0]!r}; there are {', '.join(BUILDERS)}")
    given = {name: getattr(args, name) for name in (*PEERS, "linear_half")}
    return Options(
        tuple(name for name in BUILDERS if name in names),
        args.threads,
        args.rounds,
        args.record,
        args.dir.expanduser().resolve(),
        args.python,
        args.ik,
        {name: python for name, python in given.items() if python is not None},
    )


def main() -> None:
    """Print conditions, the tables of each group, what was to be shown, and JSON as the last line."""
    options = parse_options()
    optional_package("gguf")  # needed late, so missed early
    programs = prepare(options)
    facts = conditions(options, programs)
    for name, value in facts.items():
        print(f"{name}: {value}")
    samples = recorded(options.record)
    measured = [BUILDERS[name](programs, options.threads) for name in options.names]
    for group in measured:
        first = 1 + max((sample.round for sample in samples if sample.group == group.name), default=0)
        for sample in measure(group, options, first):
            samples.append(sample)
            if options.record is not None:
                with options.record.open("a", encoding="utf-8") as file:
                    print(json.dumps(asdict(sample)), file=file)
        print("", *summary_lines(group, summaries(group.name, samples)), sep="\n", flush=True)
    print("", *verdict_lines([row for group in measured for row in verdicts(group, samples)]), sep="\n")
    print(json.dumps(as_json(facts, measured, samples)))


if __name__ == "__main__":
    run_main(main)
