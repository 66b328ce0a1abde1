"""What the scripts of this folder share: their error, cache directory and subprocess calls."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

OUTPUT_TAIL_LINES = 12


class BenchmarkError(Exception):
    """A failure the user can act on: one line that says what, which value and what to do."""


def default_dir() -> Path:
    """Return the folder that holds the built peer, the models and the reference program."""
    return Path(os.path.expanduser("~")) / ".cache" / "taper-bench"


def progress(message: str) -> None:
    """Write one line for the person who waits; stdout is left to results."""
    print(message, file=sys.stderr, flush=True)


def run(
    command: Sequence[str | Path], *, timeout_s: float, environment: Mapping[str, str] | None = None
) -> str:
    """Run a program to its end and return its stdout.

    Args:
        command: program and arguments, passed on without a shell.
        timeout_s: seconds after which the program is killed.
        environment: variables that it sees beside those of this process.

    Returns:
        Everything the program wrote to stdout.

    Raises:
        BenchmarkError: the program is absent, ran too long or ended with an error.
    """
    argv = [str(part) for part in command]
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, **(environment or {})},
        )
    except FileNotFoundError:
        raise BenchmarkError(f"program {argv[0]} was not found; install it or put it on PATH") from None
    except subprocess.TimeoutExpired:
        raise BenchmarkError(
            f"{' '.join(argv)} ran longer than its limit of {timeout_s:.0f} s; "
            "free the processor or ask for less work"
        ) from None
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-OUTPUT_TAIL_LINES:])
        progress(tail)
        raise BenchmarkError(
            f"{' '.join(argv)} ended with status {done.returncode} where 0 is needed; "
            "the end of its output stands above"
        )
    return done.stdout


def run_main(main: Callable[[], None]) -> None:
    """Call a script's `main` and turn a `BenchmarkError` into one `error:` line and status 1."""
    try:
        main()
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
