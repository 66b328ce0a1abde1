"""One replica: a model, its loop and the whole HTTP application of `taper serve`, called without HTTP."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from math import inf
from pathlib import Path
from typing import Any

from starlette.types import Message

from taper.kernels import set_num_threads
from taper.ray.ledger import Asked, Slack
from taper.server.app import make_app
from taper.server.start import ServeOptions, keep_pauses_short, open_models

HEARTBEAT_S = 1.0
HOST = "localhost"
# What a reply is made of on its way to the front: its beginning, pieces of the body (empty while there is
# nothing to say), and None at its end, without which it is not whole.
Item = dict[str, Any] | bytes | None


class EngineReplica:
    """What Ray Serve runs, once a replica.

    Args:
        name: of the model.
        path: of its file, the same on every node.
        options: of the command; `memory_bytes` is this model's share.
        threads: of the kernels.

    Raises:
        TaperError: what `taper.load` raises.
    """

    def __init__(self, name: str, path: str, options: ServeOptions, threads: int) -> None:
        set_num_threads(threads)
        models = open_models({name: Path(path)}, options)
        keep_pauses_short()
        self._app = make_app(models, hosts={HOST})
        self._served = models[name]
        self._slack = Slack()

    def describe(self) -> dict[str, Any]:
        """The entry in /v1/models, and what the loader had to say."""
        return {"model": self._served.description(), "notice": self._served.llm.notice}

    async def ask(self, path: str, body: bytes, asked: tuple[float, int, int, str]) -> AsyncIterator[Item]:
        """Answer a POST, a piece at a time; at least every second something comes.

        Args:
            path: of the route.
            body: JSON.
            asked: seconds to the deadline, priority, tokens, number of the call; for router and scaling.
        """
        left_s, priority, tokens, _ = asked
        number = self._slack.begin(Asked(time.monotonic() + left_s, priority, tokens))
        status = 0
        try:
            async for item in _answer(self._app, path, body):
                if isinstance(item, dict):
                    status = item["status"]
                yield item
        finally:
            self._slack.end(number, is_refused=status == 429 and left_s < inf)

    def state(self) -> dict[str, Any]:
        """Snapshot, metrics as text, and the process."""
        metrics = self._app.state.server.metrics.text().decode()
        return {"pid": os.getpid(), "snapshot": dict(self._served.loop.snapshot()), "metrics": metrics}

    def record_routing_stats(self) -> dict[str, float]:
        """For `DeadlineRouter`; called by Serve."""
        return {"step_s": self._step_s()}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `queue_and_slack`; called by Serve."""
        running = self._served.loop.snapshot()["num_running"]
        return {"pressure": self._slack.pressure(self._step_s(), running, time.monotonic())}

    def _step_s(self) -> float:
        return float(self._served.loop.snapshot()["step_ms"] or 0) / 1e3

    def check_health(self) -> None:
        """Called by Serve; a loop that no longer answers makes it time out."""
        self._served.loop.snapshot()


async def _answer(app: Any, path: str, body: bytes) -> AsyncIterator[Item]:
    """Call an ASGI application; when the caller goes, so does the application's client."""
    items: asyncio.Queue[Message | None] = asyncio.Queue()
    is_gone = asyncio.Event()
    bodies = [body]

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await is_gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        items.put_nowait(message)

    async def run() -> None:
        try:
            await app(_scope(path), receive, send)
        finally:
            items.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        async for item in _collected(items):
            yield item
        await task  # raises what the application raised; then the reply is not whole
        yield None
    finally:
        is_gone.set()
        task.cancel()


async def _collected(items: asyncio.Queue[Message | None]) -> AsyncIterator[dict[str, Any] | bytes]:
    """The messages until None: the pieces of the body that are there together as one."""
    while True:
        try:
            messages = [await asyncio.wait_for(items.get(), HEARTBEAT_S)]
        except TimeoutError:
            yield b""
            continue
        while not items.empty():
            messages.append(items.get_nowait())
        for message in messages:
            if message is not None and message["type"] == "http.response.start":
                headers = [
                    (name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]
                ]
                yield {"status": message["status"], "headers": headers}
        body = b"".join(message.get("body", b"") for message in messages if message is not None)
        if body:
            yield body
        if messages[-1] is None:
            return


def _scope(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", HOST.encode()), (b"content-type", b"application/json")],
        "client": None,
        "server": (HOST, 0),
    }
