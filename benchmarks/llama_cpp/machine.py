"""What is known of the machine: its processor, its read bandwidth, and who else uses it."""

import os
import platform
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from common import BenchmarkError, run

READ_BYTES = 1 << 30
SAMPLE_TIMEOUT_S = 300


def processor() -> str:
    """Return the processor's name as the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named.group(1) if named else platform.processor() or platform.machine()


def governor() -> str:
    """Return the frequency governor of the first core, `unknown` where the system hides it."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return "unknown"


def build_reader(directory: Path) -> Path:
    """Compile `bandwidth.c` into `directory` where that has not been done since it last changed."""
    source = Path(__file__).with_name("bandwidth.c")
    program = directory / "bandwidth"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        directory.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC", "cc")
        flags = ["-O3", "-march=native", "-fopenmp"]
        run([compiler, *flags, source, "-o", program], timeout_s=SAMPLE_TIMEOUT_S)
    return program


def read_bandwidth(program: Path, threads: int) -> float:
    """Return the bytes per second that `threads` threads read of a buffer of 1 GiB."""
    words = run([program, str(threads), str(READ_BYTES)], timeout_s=SAMPLE_TIMEOUT_S).split()
    if len(words) != 2:
        raise BenchmarkError(
            f"{program} printed {len(words)} words where 2 are expected; delete it and retry"
        )
    return float(words[0])


@dataclass(frozen=True, slots=True)
class CpuClock:
    """Processor time spent so far, to tell our own work from everyone else's.

    Attributes:
        wall_s: monotonic time.
        busy_s: time all cores spent on anything, summed; None where the system does not tell.
        own_s: time spent by finished child processes of this one.
    """

    wall_s: float
    busy_s: float | None
    own_s: float

    @classmethod
    def now(cls) -> "CpuClock":
        """Read the clocks."""
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(time.monotonic(), _busy_s(), own.ru_utime + own.ru_stime)

    def others_frac(self) -> float | None:
        """Return the share of all cores that other work took since this clock was read, 0 to 1."""
        end = CpuClock.now()
        if self.busy_s is None or end.busy_s is None:
            return None
        others_s = (end.busy_s - self.busy_s) - (end.own_s - self.own_s)
        capacity_s = (end.wall_s - self.wall_s) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, others_s / capacity_s)) if capacity_s > 0 else None


def _busy_s() -> float | None:
    """Return the seconds that all cores together were not idle, None off Linux."""
    try:
        first = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()
    except (OSError, IndexError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in first[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
