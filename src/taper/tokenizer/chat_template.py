"""The model's chat template, rendered where it can do no harm."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taper.errors import UsageError

WORKER = Path(__file__).with_name("template_worker.py")
TIME_LIMIT_S = 5.0  # real templates take milliseconds; the first render also starts the worker (0.1 to 0.3 s)
MEMORY_LIMIT_BYTES = 1 << 30  # of address space; an idle worker uses about 50 MB
MAX_CHARS = 16 << 20

Message = Mapping[str, Any]


class ChatTemplate:
    """A Jinja template that turns messages into a prompt.

    Rendering happens in a child process that is killed after `time_limit_s`, so no template can hang or fill
    this process. The child is started at the first render, kept for the next ones, and ends with this object.

    Args:
        source: the template's text.
        variables: passed to every render, such as `bos_token`.
        time_limit_s: for one render.
    """

    def __init__(
        self, source: str, variables: Mapping[str, Any] | None = None, time_limit_s: float = TIME_LIMIT_S
    ) -> None:
        self._source = source
        self._variables = dict(variables or {})
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Render the messages.

        Args:
            messages: each a mapping with `role` and `content`, both text; other keys are passed on.
            add_generation_prompt: end with the start of the assistant's answer.
            tools: functions that the model may call, as the template's `tools`.

        Raises:
            UsageError: no messages, a message without role or content, a template that refuses the messages,
                is wrong, or passes its limits.
        """
        check_messages(messages)
        variables = {
            **self._variables,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            **({} if tools is None else {"tools": [dict(tool) for tool in tools]}),
        }
        try:
            line = json.dumps(variables)
        except (TypeError, ValueError) as error:
            raise UsageError(f"a message cannot be written as JSON: {error}") from error
        with self._lock:
            reply = self._ask(line)
        if "error" in reply:
            raise UsageError(f"the model's chat template failed: {' '.join(reply['error'].split())}")
        return reply["text"]

    @property
    def knows_tools(self) -> bool:
        """Whether the template's text mentions tools; one that does not would leave them out in silence."""
        return "tools" in self._source

    def close(self) -> None:
        """End the child process; the next render starts another."""
        with self._lock:
            self._stop()

    def _ask(self, line: str) -> dict[str, str]:
        """One request and reply; a worker that does not answer in time is killed."""
        if self._worker is not None and self._worker.poll() is not None:
            self._stop()
        worker = self._worker or self._start()
        timer = threading.Timer(self._time_limit_s, worker.kill)
        timer.start()
        try:
            reply = self._exchange(worker, line)
        except BaseException:  # an interrupt: the reply that is still to come must not answer the next render
            self._stop()
            raise
        finally:
            timer.cancel()
        if not reply.endswith("\n"):
            self._stop()
            raise UsageError(
                f"the model's chat template passed its limit of {self._time_limit_s:g} s"
                f" or {MEMORY_LIMIT_BYTES >> 20} MiB, and was stopped",
                "give the prompt as text, or a model with a sound template",
            )
        parsed: dict[str, str] = json.loads(reply)
        return parsed

    def _exchange(self, worker: subprocess.Popen[str], line: str) -> str:
        assert worker.stdin is not None
        assert worker.stdout is not None
        with contextlib.suppress(OSError):  # it has ended: what it said last is still to be read
            worker.stdin.write(line + "\n")
            worker.stdin.flush()
        return worker.stdout.readline()

    def _start(self) -> subprocess.Popen[str]:
        """Start the child: isolated, silent, and outside the terminal's group, so Ctrl-C is the parent's."""
        worker = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,
        )
        self._worker = worker
        self._finalizer = weakref.finalize(self, _end, worker)
        setup = {
            "path": sys.path,
            "max_bytes": MEMORY_LIMIT_BYTES,
            "max_chars": MAX_CHARS,
            "template": self._source,
        }
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(setup) + "\n")
        return worker

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker = None
            self._finalizer()


def check_messages(messages: Sequence[Message]) -> None:
    """Raise UsageError unless every message has a role and a content, both text, and there is one."""
    if not messages:
        raise UsageError("the chat has no messages", 'give at least {"role": "user", "content": "..."}')
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise UsageError(
                    f"message {index} has no {key} that is text",
                    'write messages as {"role": "user", "content": "..."}',
                )


def _end(worker: subprocess.Popen[str]) -> None:
    """Kill and reap the child, and close the pipes to it."""
    worker.kill()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # unsent bytes to a process that has ended
                pipe.close()
    worker.wait()
