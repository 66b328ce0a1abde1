"""Answering while the client may go: server-sent events, and work that ends with the connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import anyio
import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from taper.server import limits
from taper.server.errors import ApiError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed the connection before the reply was whole."""


def event(content: Any, name: str | None = None) -> bytes:
    """One server-sent event with JSON."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + msgspec.json.encode(content) + b"\n\n"


class EventStream(Response):
    """A reply of server-sent events that ends as soon as the client goes, even while nothing is sent.

    Args:
        events: encoded ones; closed in any case, so that its `finally` can cancel what makes them.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        # Proxies must not collect the events.
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client goes."""

        async def run() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(receive, run)
        except (ClientGone, OSError):
            pass
        finally:
            with anyio.CancelScope(shield=True):
                close = getattr(self._events, "aclose", None)
                if close is not None:
                    await close()


async def unless_gone(receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
    """Do the work; it is cancelled when the client goes. Raises ClientGone then."""
    result: list[T] = []
    failure: list[Exception] = []
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async def run() -> None:
            # Not out of the group as it is: that would come wrapped as an exception group.
            try:
                result.append(await work())
            except Exception as error:
                failure.append(error)
            group.cancel_scope.cancel()

        group.start_soon(watch)
        group.start_soon(run)
    if failure:
        raise failure[0]
    if not result:
        raise ClientGone
    return result[0]


async def read_body(request: HttpRequest) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 for a body above the limit, 408 for one that does not come in time, 415 for another type
            than JSON: a form of a page in a browser is no request.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the Content-Type is {kind[:100]!r}; it must be application/json")
    length = request.headers.get("content-length", "")
    if length.isdigit() and len(length) < 20 and int(length) > limits.MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        with anyio.fail_after(limits.BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {limits.BODY_TIMEOUT_S:g} s") from None
    return bytes(body)


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {limits.MAX_BODY_BYTES} bytes", code="body_too_large")
