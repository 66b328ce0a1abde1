"""The HTTP server before the replicas: the routes of `taper serve`, each request forwarded to a replica."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from taper.ray.forwarding import Call, Lost, Reading
from taper.ray.merging import merged_metrics, merged_state
from taper.server.app import Server, json_response, unknown_model
from taper.server.errors import ApiError
from taper.server.streaming import EventStream, event, read_body, unless_gone

LOG = logging.getLogger("taper.ray")
TRIES = 3  # a second loss is bad luck, a third one is not
STATE_S = 2.0  # for the replicas' state; one that does not say it in time is left out
RETRY_AFTER_S = 2  # a replica with a model of a few GB is back in about this time


@dataclass(frozen=True, slots=True)
class Engine:
    """A model on the cluster.

    Attributes:
        handle: of its deployment.
        description: its entry in /v1/models.
    """

    handle: DeploymentHandle
    description: dict[str, Any]


class Front(Server):
    """What the routes share; see `Server`.

    Args:
        engines: by the names that requests give.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        super().__init__({})
        self._engines = dict(engines)
        registry = self.metrics.registry
        self._lost = Counter(
            "taper:replicas_lost", "Replies broken off by a replica", ["model_name"], registry=registry
        )
        self._retried = Counter(
            "taper:retries", "Requests sent to another replica", ["model_name"], registry=registry
        )

    async def post(self, path: str, request: Request) -> Response:
        """Forward a body to a replica, and its reply to the client."""
        arrived_s = time.monotonic()
        call = Call.read(path, await read_body(request), arrived_s)
        engine = self._engine(call.model)
        return await unless_gone(request.receive, lambda: self._answer(engine, call))

    async def _answer(self, engine: Engine, call: Call) -> Response:
        """The reply of the first replica that gives one; nothing of it has been sent before.

        Raises:
            ApiError: 503 where every try was lost; what `Reading.item` raises.
        """
        for tries in range(1, TRIES + 1):
            if tries > 1:
                self._retried.labels(call.model).inc()
            reading = Reading(engine.handle, call)
            try:
                return await self._reply(reading, call.model)
            except Lost as lost:
                self._note(call.model, lost, tries)
            except BaseException:
                reading.close()
                raise
            reading.close()
        raise _unavailable(f"{TRIES} replicas were lost; nothing was sent, so ask again")

    async def _reply(self, reading: Reading, model: str) -> Response:
        """A whole reply, or a stream from its first event on."""
        start = await reading.item()
        assert isinstance(start, dict)
        headers = {name: value for name, value in start["headers"] if name != "content-length"}
        if start["status"] == 503:
            raise Lost("the replica is stopping")
        if headers.get("content-type", "").startswith("text/event-stream"):
            first = await reading.item()
            assert isinstance(first, bytes)
            return EventStream(self._stream(first, reading, model))
        body = b"".join([piece async for piece in reading.rest()])
        return Response(body, start["status"], headers)

    async def _stream(self, first: bytes, reading: Reading, model: str) -> AsyncIterator[bytes]:
        """A stream that ends with an error where its replica is lost: what was sent cannot be taken back."""
        try:
            yield first
            async for piece in reading.rest():
                yield piece
        except Lost as lost:
            self._note(model, lost, TRIES)
            yield event(_unavailable("the replica was lost in the middle of the answer; ask again").body)
        except ApiError as error:
            yield event(error.body)
        finally:
            reading.close()

    def _note(self, model: str, lost: Lost, tries: int) -> None:
        self._lost.labels(model).inc()
        LOG.warning("%s: a replica was lost (%s), try %d of %d", model, lost, tries, TRIES)

    def _engine(self, name: str) -> Engine:
        engine = self._engines.get(name)
        if engine is None:
            raise unknown_model(name, self._engines)
        return engine

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        data = [engine.description for engine in self._engines.values()]
        return json_response({"object": "list", "data": data})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        return json_response(self._engine(request.path_params["name"]).description)

    async def ready(self, request: Request) -> Response:
        """GET /ready: 200 while every model has a replica."""
        states = await self._states_of_all()
        without = [name for name, replicas in states.items() if not replicas]
        if without:
            raise _unavailable(f"no replica of {', '.join(without)} answers")
        return await super().ready(request)

    async def metrics_text(self, request: Request) -> Response:
        """GET /metrics: the front's own, and those of each replica with its process as a label."""
        states = await self._states_of_all()
        texts = {str(s["pid"]): s["metrics"] for replicas in states.values() for s in replicas}
        text = merged_metrics(self.metrics.text().decode(), texts)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def state(self) -> dict[str, Any]:
        """What the page shows: of each model the sum over its replicas, and each of them."""
        states = await self._states_of_all()
        return {"time": time.time(), "models": {n: merged_state(replicas) for n, replicas in states.items()}}

    async def _states_of_all(self) -> dict[str, list[dict[str, Any]]]:
        names = list(self._engines)
        states = await asyncio.gather(*(_states(self._engines[name].handle) for name in names))
        return dict(zip(names, states, strict=True))


async def _states(handle: DeploymentHandle) -> list[dict[str, Any]]:
    """Of the replicas that say theirs in time."""
    try:
        answers = await asyncio.wait_for(
            handle.broadcast("state").results_async(timeout_s=STATE_S, return_exceptions=True), 2 * STATE_S
        )
    except (TimeoutError, RayError, RayServeException):
        return []
    return [answer for answer in answers if isinstance(answer, dict)]


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, kind="server_error", code="replica_lost", retry_after_s=RETRY_AFTER_S)
