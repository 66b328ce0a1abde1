"""A server in a process of its own, and a client small enough not to be what is measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taper.testing.tiny import tiny_taper


@dataclass(frozen=True)
class Server:
    """A running `taper serve` at a loopback port."""

    port: int
    process: subprocess.Popen[str]

    def anonymous_bytes(self) -> int:
        """Memory of the process's own (RssAnon and VmSwap); plain RSS would hide a leak behind the file."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        found = re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB", status, re.MULTILINE)
        return 1024 * sum(int(number) for number in found)


@contextlib.contextmanager
def serving(*options: str, model: str | None = None) -> Iterator[Server]:
    """Start `taper serve`; a tiny random model called `tiny` where none is given."""
    with tempfile.TemporaryDirectory() as folder:
        path = model or str(tiny_taper(Path(folder) / "tiny.taper", chat=True))
        command = [sys.executable, "-m", "taper", "serve", f"tiny={path}", "--port", "0", *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            assert found, line + process.stderr.read()
            # A full pipe would stop the server.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            server = Server(int(found[1]), process)
            try:
                asyncio.run(_until_up(server))
                yield server
            finally:
                process.terminate()
                process.wait(30)


async def _until_up(server: Server) -> None:
    for _ in range(1000):
        with contextlib.suppress(OSError):
            if (await exchange(server, "GET", "/ready")).status == 200:
                return
        await asyncio.sleep(0.01)
    raise TimeoutError("the server did not come up")


@dataclass(frozen=True)
class Reply:
    """What came back; status 0 for a client that left, or a connection that broke."""

    status: int
    seconds: float
    body: bytes
    headers: bytes = b""

    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


async def exchange(
    server: Server, method: str, path: str, body: bytes = b"", leave_after_s: float | None = None
) -> Reply:
    """One request on a connection of its own; the client may leave in the middle."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        if method == "POST":
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + body)
        try:
            raw = await asyncio.wait_for(reader.read(-1), leave_after_s or 120)
        except (TimeoutError, ConnectionError):
            return Reply(0, time.perf_counter() - began, b"")
    finally:
        writer.close()
    seconds = time.perf_counter() - began
    headers, _, content = raw.partition(b"\r\n\r\n")
    status = int(headers[9:12]) if headers.startswith(b"HTTP/1.1 ") else 0
    return Reply(status, seconds, content, headers)


async def monitor(server: Server) -> dict[str, Any]:
    """The model's state."""
    state = (await exchange(server, "GET", "/monitor")).json()["models"]["tiny"]
    assert isinstance(state, dict)
    return state


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the values do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
