"""What `taper quantize` takes: time by stage, processor time and memory, on a random checkpoint of a shape.

    python benchmarks/quality/quantize_cost.py --shape 1.1b --calibration TEXT --dir FOLDER

Writes a bf16 checkpoint once, then runs the command with its defaults. `--limit` stops a run that takes too
long and reports as far as it came. `--kill` stops it with SIGKILL at random moments, goes on, and compares
the SHA-256 of the result with that of an undisturbed run; with `--kill-layers` only so many layers are made
again, and every tensor that is kept of their matrices is compared with that of the undisturbed file. A table
for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from random_checkpoint import write_checkpoint
from safetensors.numpy import load_file

from taper.formats.container import TaperFile
from taper.formats.text import read_text
from taper.testing.random_model import SHAPES

# As the progress bar names them; each word stays until the next one shows.
STAGES = ("start", "generate", "calibrate", "solve", "write", "sensitivity", "card")
STAGE = re.compile(rb"quantize: (generate|calibrate|solve|write|sensitivity|card)[ ,]+(\S+)")
POLL_S = 0.05
KILLED = -signal.SIGKILL
# A line of the bar must never break, or a name would be cut in two.
COLUMNS = "200"


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of all tensors of a checkpoint that `write_checkpoint` wrote."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return int(index["metadata"]["total_size"])


@dataclass(slots=True)
class StageClock:
    """Seconds, processor time and memory by stage, from what the progress bar shows.

    Attributes:
        seconds: wall time of each stage.
        cpu_s: processor time of each stage.
        peak_bytes: most resident memory seen in each stage.
        matrices: seconds that each name showed.
        name: what shows now.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    matrices: dict[str, float] = field(default_factory=dict)
    name: str = "start"
    _stage: str = "start"
    _rest: bytes = b""

    def see(self, shown: bytes) -> None:
        """Read what the bar printed."""
        self._rest += shown
        found = None
        for found in STAGE.finditer(self._rest):
            self._stage = found[1].decode()
            self.name = f"{self._stage} {found[2].decode(errors='replace')}"
        self._rest = self._rest[found.end() :] if found else self._rest[-4096:]

    def count(self, wall_s: float, cpu_s: float, rss_bytes: int) -> None:
        """Book time that has passed to the stage that shows."""
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + wall_s
        self.cpu_s[self._stage] = self.cpu_s.get(self._stage, 0.0) + cpu_s
        self.peak_bytes[self._stage] = max(self.peak_bytes.get(self._stage, 0), rss_bytes)
        self.matrices[self.name] = self.matrices.get(self.name, 0.0) + wall_s


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the command.

    Attributes:
        status: as os.waitstatus_to_exitcode gives it; -9 where it was killed.
        wall_s: until it ended.
        cpu_s: user and system time.
        others_frac: share of all cores that other work took meanwhile; None where the system does not tell.
        peak_bytes: most resident memory, mapped files included.
        clock: by stage.
    """

    status: int
    wall_s: float
    cpu_s: float
    others_frac: float | None
    peak_bytes: int
    clock: StageClock


def run_quantize(
    arguments: list[str], log: Path, kill_after_s: float = float("inf"), kill_at: str = ""
) -> Run:
    """Run `taper quantize` on a terminal of its own, watch it, and kill it so long after its work began or as
    soon as it shows a name.
    """
    parent, child = os.openpty()
    command = [sys.executable, "-m", "taper", "quantize", *arguments]
    environment = {**os.environ, "COLUMNS": COLUMNS, "TERM": "xterm", "SOURCE_DATE_EPOCH": "0"}
    begin, busy = time.monotonic(), busy_s()
    with log.open("wb") as output:
        actions = [(os.POSIX_SPAWN_DUP2, output.fileno(), 1), (os.POSIX_SPAWN_DUP2, child, 2)]
        pid = os.posix_spawn(sys.executable, command, environment, file_actions=actions)
        os.close(child)
        os.set_blocking(parent, False)
        clock = StageClock()
        status, usage = _watch(pid, parent, output.write, clock, kill_after_s, kill_at)
    os.close(parent)
    wall_s, cpu_s = time.monotonic() - begin, usage.ru_utime + usage.ru_stime
    end = busy_s()
    others = None if busy is None or end is None else (end - busy - cpu_s) / (wall_s * (os.cpu_count() or 1))
    peak = usage.ru_maxrss * 1024
    return Run(os.waitstatus_to_exitcode(status), wall_s, cpu_s, others and max(0.0, others), peak, clock)


def _watch(
    pid: int,
    terminal: int,
    keep: Callable[[bytes], object],
    clock: StageClock,
    kill_after_s: float,
    kill_at: str,
) -> tuple[int, Any]:
    """Until the process ends: status and usage."""
    last, cpu_s, worked_s = time.monotonic(), 0.0, 0.0
    while True:
        shown = _read_all(terminal)
        keep(shown)
        now, (used_s, rss_bytes) = time.monotonic(), process_state(pid)
        clock.count(now - last, max(0.0, used_s - cpu_s), rss_bytes)
        clock.see(shown)
        worked_s += 0.0 if clock.name == "start" else now - last
        last, cpu_s = now, max(cpu_s, used_s)
        if worked_s > kill_after_s or clock.name == kill_at:
            os.kill(pid, signal.SIGKILL)
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            keep(_read_all(terminal))
            return status, usage
        time.sleep(POLL_S)


def _read_all(terminal: int) -> bytes:
    found = b""
    try:
        while part := os.read(terminal, 1 << 16):
            found += part
    except (BlockingIOError, OSError):  # nothing now; or, once the child is gone, never again
        pass
    return found


def process_state(pid: int) -> tuple[float, int]:
    """Processor seconds and resident bytes of a running process; zeros once it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0
    ticks = os.sysconf("SC_CLK_TCK")
    return (int(stat[11]) + int(stat[12])) / ticks, int(stat[21]) * os.sysconf("SC_PAGE_SIZE")


def busy_s() -> float | None:
    """Seconds that all cores together were not idle, None off Linux."""
    try:
        first = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()
    except (OSError, IndexError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(word) for word in first[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_output(out: Path) -> None:
    """Nothing of an earlier run is taken up."""
    out.unlink(missing_ok=True)
    shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)


def killed_runs(
    arguments: list[str], out: Path, log: Path, kills: int, work_s: float, seed: int
) -> dict[str, Any]:
    """Kill the command `kills` times, at moments spread over the work, then let it end."""
    remove_output(out)
    draws = random.Random(seed)
    moments = []
    for _ in range(kills):
        # What was unfinished begins anew, so twice an equal share brings the last kill near the end.
        run = run_quantize(arguments, log, draws.uniform(0.0, 2.0 * work_s / kills))
        moments.append({"killed": run.status == KILLED, "wall_s": run.wall_s, "at": run.clock.name})
    last = run_quantize(arguments, log)
    if last.status != 0:
        raise SystemExit(f"the resumed run ended with {last.status}; see {log}")
    return {"kills": moments, "last_wall_s": last.wall_s, "sha256": sha256(out)}


def killed_layers(
    arguments: list[str], out: Path, log: Path, kills: int, layers: int, work_s: float, seed: int
) -> dict[str, Any]:
    """Make the first layers again beside the undisturbed file, killed `kills` times on the way and once when
    they are done, and compare what is kept of them with the file.
    """
    draws = random.Random(seed)
    moments = []
    for _ in range(kills):
        run = run_quantize(
            arguments, log, draws.uniform(0.0, 2.0 * work_s / kills), f"calibrate layers.{layers}"
        )
        moments.append({"killed": run.status == KILLED, "wall_s": run.wall_s, "at": run.clock.name})
    last = run_quantize(arguments, log, kill_at=f"calibrate layers.{layers}")
    if last.status != KILLED:
        raise SystemExit(f"the run ended with {last.status} before layer {layers} was seen; see {log}")
    kept = out.with_name(f"{out.name}.partial")
    same, different = compare_shards(kept, out)
    shutil.rmtree(kept)
    return {"kills": moments, "last_wall_s": last.wall_s, "same_tensors": same, "different": different}


def compare_shards(folder: Path, out: Path) -> tuple[int, list[str]]:
    """Tensors of finished matrices that have the bytes of those in the file, and the names of the others."""
    file = TaperFile.open(out)
    same, different = 0, []
    for path in sorted(folder.glob("*.safetensors")):
        for part, array in load_file(path).items():
            if part == "errors":  # stored in the header
                equal = array.tolist() == file.header.relative_errors[path.stem]
            else:
                equal = array.tobytes() == file.tensor(f"{path.stem}.{part}").tobytes()
            same += equal
            different += [] if equal else [f"{path.stem}.{part}"]
    return same, different


def report(run: Run, bf16_bytes: int) -> dict[str, Any]:
    """The figures of a run."""
    return {
        "status": run.status,
        "wall_s": run.wall_s,
        "cpu_s": run.cpu_s,
        "others_frac": run.others_frac,
        "peak_bytes": run.peak_bytes,
        "bf16_bytes": bf16_bytes,
        "peak_over_bf16": run.peak_bytes / bf16_bytes,
        "stages": {
            stage: {
                "wall_s": run.clock.seconds[stage],
                "cpu_s": run.clock.cpu_s[stage],
                "peak_bytes": run.clock.peak_bytes[stage],
            }
            for stage in STAGES
            if stage in run.clock.seconds
        },
        "matrices": run.clock.matrices,
    }


def print_table(figures: dict[str, Any]) -> None:
    """The figures for people."""
    print(f"{'stage':>12} {'wall s':>8} {'CPU s':>8} {'peak MB':>9}")
    for stage, row in figures["stages"].items():
        print(f"{stage:>12} {row['wall_s']:>8.1f} {row['cpu_s']:>8.1f} {row['peak_bytes'] / 1e6:>9.1f}")
    print(
        f"{'all':>12} {figures['wall_s']:>8.1f} {figures['cpu_s']:>8.1f} {figures['peak_bytes'] / 1e6:>9.1f}"
    )
    others = figures["others_frac"]
    print(f"{figures['peak_over_bf16']:.2f} times the {figures['bf16_bytes']:,} bytes of bf16 weights")
    print("others took an unknown share" if others is None else f"others took {others:.0%} of the cores")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.1b")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape's")
    parser.add_argument("--calibration", type=Path, required=True, help="text, .txt or .txt.xz")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
    parser.add_argument("--dir", type=Path, required=True, help="folder for the checkpoint and the file")
    parser.add_argument(
        "--kill", type=int, default=0, metavar="N", help="kill it N times, compare the result"
    )
    parser.add_argument(
        "--kill-layers", type=int, metavar="L", help="make only the first L layers and the embedding again"
    )
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which it is stopped")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the kills")
    return parser.parse_args()


def resumed(
    options: argparse.Namespace, arguments: list[str], out: Path, log: Path, run: Run, digest: str
) -> dict[str, Any]:
    """Kill and go on as the options say; the figures."""
    kills, layers = options.kill, options.kill_layers
    if layers:
        work_s = sum(wall_s for name, wall_s in run.clock.matrices.items() if made_by(name, layers))
        found = killed_layers(arguments, out, log, kills, layers, work_s, options.seed)
        print(
            f"killed {kills} times in {layers} layers: {found['same_tensors']} tensors are the same, others:"
        )
        print(found["different"] or "none")
        return found
    work_s = run.wall_s - run.clock.seconds["start"]
    found = killed_runs(arguments, out, log, kills, work_s, options.seed)
    found["same_bytes"] = found["sha256"] == digest
    print(f"killed {kills} times, same bytes: {found['same_bytes']}")
    return found


def made_by(name: str, layers: int) -> bool:
    """Whether the bar shows this name before layer `layers` begins."""
    stage, _, matrix = name.partition(" ")
    if stage not in ("calibrate", "solve"):
        return False
    return matrix == "embed" or (matrix.startswith("layers.") and int(matrix.split(".")[1]) < layers)


def main() -> None:
    """Print the table and the JSON line."""
    options = parse_arguments()
    config = SHAPES[options.shape]
    config = dataclasses.replace(config, num_layers=options.layers or config.num_layers)
    folder = options.dir / f"{options.shape}-{config.num_layers}-layers-seed-{options.seed}"
    if not folder.is_dir():
        write_checkpoint(folder, config, read_text(options.calibration), options.seed)
    out, log = options.dir / f"{folder.name}.taper", options.dir / f"{folder.name}.log"
    arguments = [str(folder), "-o", str(out), "--calibration", str(options.calibration)]
    arguments += ["--calibration-tokens", str(options.tokens)]
    remove_output(out)
    run = run_quantize(arguments, log, options.limit)
    figures = report(run, checkpoint_bytes(folder))
    print_table(figures)
    if run.status not in (0, KILLED):
        raise SystemExit(f"taper quantize ended with {run.status}; see {log}")
    if run.status == 0:
        figures |= {"file_bytes": out.stat().st_size, "sha256": sha256(out)}
    if options.kill and run.status == 0:
        figures["resumed"] = resumed(options, arguments, out, log, run, figures["sha256"])
    setup = {
        "shape": options.shape,
        "layers": config.num_layers,
        "tokens": options.tokens,
        "seed": options.seed,
    }
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = {
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps({"benchmark": "quantize_cost", "date": date, **setup, **machine, **figures}))


if __name__ == "__main__":
    main()
