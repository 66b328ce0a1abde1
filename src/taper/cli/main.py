"""The `taper` command: finds the subcommand, and turns every failure into one line and an exit status."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

from taper import __version__
from taper.errors import TaperError

# What `taper --help` shows. Only the command that is called is imported, and with it what it needs.
COMMANDS = {
    "run": "Continue a prompt, or chat.",
    "quantize": "Turn a Hugging Face checkpoint into a .taper file.",
    "allocate": "Spend bits where they help most.",
    "inspect": "Show what a .taper file holds.",
    "eval": "Measure quality at several widths.",
    "recommend": "Say which bits fit a memory or a loss.",
    "tune": "Find a schedule of bits for a task.",
    "plan": "Measure step times for the planner.",
    "bench": "Measure prefill and decode speed.",
    "serve": "Answer over HTTP, as OpenAI does.",
}

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_DOES_NOT_FIT = 4
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, which Windows does not name


class LazyGroup(click.Group):
    """A group that knows its commands' names and imports `taper.cli.<name>` for the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"taper.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="taper")
def taper_group() -> None:
    """Run language models where memory is scarce.

    One file holds the weights as nested bit planes; how many are read is decided for every token.

    Exit status: 0 done, 2 wrong usage, 3 model not found, 4 does not fit, 5 corrupt file, 130 interrupted.
    TAPER_DEBUG=1 shows the traceback of an error.
    """


def main() -> NoReturn:
    """Entry point of the program: run, report, exit."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(execute(sys.argv[1:]))


def execute(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status; nothing but a status comes out unless TAPER_DEBUG=1."""
    is_debug = os.environ.get("TAPER_DEBUG") == "1"
    try:
        # Not Group.main: it turns a closed pipe into status 1 and Ctrl-C into another exception.
        with taper_group.make_context("taper", list(arguments) or ["--help"]) as context:
            taper_group.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except KeyboardInterrupt:
        _report("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if is_debug:
            raise
        return _status(error)


def _status(error: Exception) -> int:
    """Report an error and say which status it has."""
    if isinstance(error, TaperError):
        _report(str(error), error.hint)
        return error.exit_code
    if isinstance(error, click.ClickException):
        _report(error.format_message().rstrip("."), _usage_hint(error))
        return EXIT_USAGE
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _drop_output()
        _report(f"no room left on the device: {error.filename or 'standard output'}", "free some room")
        return EXIT_DOES_NOT_FIT
    if isinstance(error, MemoryError):
        _report(
            f"out of memory: {error}" if str(error) else "out of memory",
            "use fewer bits or a shorter context",
        )
        return EXIT_DOES_NOT_FIT
    reason = str(error).splitlines()[0] if str(error) else "no message"
    _report(f"{type(error).__name__}: {reason}", "TAPER_DEBUG=1 shows where; please report it")
    return EXIT_FAILURE


def _drop_output() -> None:
    """Nobody takes stdout any more; without this Python complains once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"see {context.command_path} --help" if context is not None else "see taper --help"


def _report(message: str, hint: str = "") -> None:
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)


def _terminate(signal_number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds like an error, so that temporary files are removed."""
    sys.exit(128 + signal_number)
