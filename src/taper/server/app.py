"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from taper.server.body import decode
from taper.server.chat import ChatTask
from taper.server.completions import CompletionTask
from taper.server.errors import ApiError
from taper.server.fields import ChatRequest, Common, CompletionRequest, ResponseRequest
from taper.server.guard import Guard
from taper.server.metrics import CountedLoop, Metrics
from taper.server.openapi import description
from taper.server.responses import ResponseTask
from taper.server.serving import Loop, Served
from taper.server.streaming import ClientGone, EventStream, event, read_body, unless_gone

LOG = logging.getLogger("taper.server")
MONITOR_EVERY_S = 0.5
MAX_MONITORS = 16
# Nothing from elsewhere, no script or style in the page itself, no frame around it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SAFE = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
_PAGE = {
    "page.html": "text/html; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
}


class Task(Protocol):
    """A checked request of any route."""

    async def reply(self) -> dict[str, Any]:
        """The whole reply."""
        ...

    def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events."""
        ...


Preparing = Callable[[Served, Any, float], Awaitable[Task]]


async def _prepare_completion(served: Served, ask: CompletionRequest, arrived_s: float) -> Task:
    return CompletionTask(served, ask, arrived_s)


POSTS: dict[str, tuple[type[Common], Preparing]] = {
    "/v1/chat/completions": (ChatRequest, ChatTask.prepare),
    "/v1/completions": (CompletionRequest, _prepare_completion),
    "/v1/responses": (ResponseRequest, ResponseTask.prepare),
}


class Server:
    """What the routes share.

    Args:
        models: by the names that requests give.
    """

    def __init__(self, models: Mapping[str, Served]) -> None:
        self.models = dict(models)
        self.metrics = Metrics()
        self.metrics.watch(self._loops)
        self.metrics.up.set(1)
        self.is_ready = True
        self._num_monitors = 0
        for served in self.models.values():
            served.loop = CountedLoop(served.loop, served.name, self.metrics)

    def _loops(self) -> dict[str, Loop]:
        return {name: served.loop for name, served in self.models.items()}

    def drain(self) -> None:
        """Say at /ready that no more requests are wanted, and end the monitors; what runs goes on."""
        self.is_ready = False
        self.metrics.up.set(0)

    def stop(self) -> None:
        """End the loops."""
        self.drain()
        for served in self.models.values():
            served.loop.close()
            served.llm.close()

    async def post(self, path: str, request: Request) -> Response:
        """Check a body, run it, and answer whole or as a stream."""
        arrived_s = time.monotonic()
        kind, prepare = POSTS[path]
        ask = decode(await read_body(request), kind)
        served = self._model(ask.model)

        async def work() -> Response:
            task = await prepare(served, ask, arrived_s)
            if not ask.stream:
                return json_response(await task.reply())
            events = task.stream()
            # What is refused in the queue gets a status, so nothing is sent before the first token.
            first = await anext(events)
            return EventStream(_whole(first, events))

        return await unless_gone(request.receive, work)

    def _model(self, name: str) -> Served:
        served = self.models.get(name)
        if served is None:
            raise unknown_model(name, self.models)
        return served

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        return json_response(
            {"object": "list", "data": [served.description() for served in self.models.values()]}
        )

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        return json_response(self._model(request.path_params["name"]).description())

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready."""
        if not self.is_ready:
            raise ApiError(503, "the server is stopping", kind="server_error", code="not_ready")
        return json_response({"status": "ready"})

    async def metrics_text(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def state(self) -> dict[str, Any]:
        """What the page shows."""
        return {
            "time": time.time(),
            "models": {n: dict(loop.snapshot()) for n, loop in self._loops().items()},
        }

    async def monitor(self, request: Request) -> Response:
        """GET /monitor: once as JSON, or with `?stream=1` for as long as the client reads."""
        if request.query_params.get("stream") != "1":
            return json_response(await self.state())
        if self._num_monitors >= MAX_MONITORS:
            raise ApiError(
                429, f"{MAX_MONITORS} monitors are open", code="too_many_monitors", retry_after_s=5
            )
        return EventStream(self._states())

    async def _states(self) -> AsyncIterator[bytes]:
        self._num_monitors += 1
        try:
            while self.is_ready:
                yield event(await self.state())
                await asyncio.sleep(MONITOR_EVERY_S)
        finally:
            self._num_monitors -= 1


def make_app(models: Mapping[str, Served], *, hosts: Iterable[str], key: str | None = None) -> Starlette:
    """The ASGI application; it ends the models' loops when it stops.

    Args:
        models: by name.
        hosts: that the Host header may name.
        key: that requests must send; None asks for none.
    """
    return app_of(Server(models), hosts=hosts, key=key)


def app_of(server: Server, *, hosts: Iterable[str], key: str | None = None) -> Starlette:
    """The ASGI application of a server, which stops with it; `hosts` and `key` as in `make_app`."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(server.stop)

    def counted(path: str, handler: Callable[[Request], Awaitable[Response]]) -> Any:
        async def route(request: Request) -> Response:
            try:
                response = await handler(request)
            except ClientGone:
                response = Response(status_code=499)  # nobody reads it; nginx's number for it in the metrics
            except ApiError as error:
                response = _error(error)
            except Exception:
                LOG.exception("%s failed", path)
                response = _error(ApiError(500, "the server failed; its log says why", kind="server_error"))
            server.metrics.http.labels(path, str(response.status_code)).inc()
            return response

        return route

    gets: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/v1/models": server.list_models,
        "/v1/models/{name}": server.one_model,
        "/health": server.health,
        "/ready": server.ready,
        "/metrics": server.metrics_text,
        "/monitor": server.monitor,
        "/openapi.json": _openapi,
        "/": partial(_page, "page.html"),
        "/page.js": partial(_page, "page.js"),
        "/page.css": partial(_page, "page.css"),
    }
    routes = [Route(path, counted(path, handler), methods=["GET"]) for path, handler in gets.items()]
    routes += [Route(path, counted(path, partial(server.post, path)), methods=["POST"]) for path in POSTS]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Guard, hosts=hosts, key=key)],
        exception_handlers={HTTPException: _http_error},
    )
    app.state.server = server
    return app


def unknown_model(name: str, models: Iterable[str]) -> ApiError:
    """404 for a name that is none of the models'."""
    return ApiError(
        404,
        f"model: {name[:100]!r} is not served; there are {', '.join(models)}",
        param="model",
        code="model_not_found",
    )


async def _whole(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream with its first event; an error in the middle is its last event."""
    try:
        yield first
        async for item in events:
            yield item
    except ApiError as error:
        yield event(error.body)
    finally:
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()


async def _openapi(request: Request) -> Response:
    return json_response(description())


async def _page(name: str, request: Request) -> Response:
    content = (importlib.resources.files("taper.server") / name).read_bytes()
    headers = {**_SAFE, "content-security-policy": PAGE_POLICY, "cache-control": "no-cache"}
    return Response(content, headers=headers, media_type=_PAGE[name])


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}"))


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON that no browser takes for something else."""
    return Response(
        msgspec.json.encode(content), status, {**_SAFE, **(headers or {})}, media_type="application/json"
    )


def _error(error: ApiError) -> Response:
    return json_response(error.body, error.status, error.headers)
