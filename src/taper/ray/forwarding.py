"""A request on its way to a replica: what is read of its body, and its reply with every wait bounded."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from math import inf
from typing import Any

import msgspec
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from taper.ray.ledger import SILENT_CALLS
from taper.ray.replica import Item
from taper.server.body import read_object
from taper.server.errors import ApiError, invalid

SILENCE_S = 10.0  # ten heartbeats of a replica: it is gone, stopped, or cut off
ASSUMED_TOKENS = 256  # of a request that does not say how many it may take
MIN_LEFT_MS = 1e-3
MAX_NUMBER = 1e12
_CALLS = itertools.count()


class Lost(Exception):
    """The replica will say no more; the reply is not whole."""


@dataclass(frozen=True, slots=True)
class Call:
    """A POST to be forwarded.

    Attributes:
        path: of the route.
        model: as the request says it.
        body: JSON.
        deadline_s: on the monotonic clock; infinite without one.
        priority: larger is served first.
        tokens: most that may be generated.
    """

    path: str
    model: str
    body: bytes
    deadline_s: float
    priority: int
    tokens: int

    @classmethod
    def read(cls, path: str, body: bytes, arrived_s: float) -> Call:
        """Read what forwarding needs; the replica checks the fields. Raises ApiError 400."""
        content = read_object(body)
        if "model" not in content:
            raise ApiError(400, "model: it is required", param="model", code="missing_required_parameter")
        model = content["model"]
        if not isinstance(model, str):
            raise invalid("model", "it must name a model")
        deadline_ms = _number(content, "deadline_ms", inf)
        return cls(
            path,
            model,
            body,
            arrived_s + deadline_ms / 1e3 if deadline_ms > 0 else inf,
            int(_number(content, "priority", 0)),
            _tokens(content),
        )

    def for_replica(self) -> bytes:
        """The body for a replica, whose clock starts anew: with the time that is left to the deadline."""
        if self.deadline_s == inf:
            return self.body
        fields = msgspec.json.decode(self.body, type=dict[str, msgspec.Raw])  # each as it was written
        left_ms = max(1e3 * self.left_s, MIN_LEFT_MS)
        return msgspec.json.encode({**fields, "deadline_ms": left_ms})

    @property
    def left_s(self) -> float:
        """Seconds to the deadline; negative after it."""
        return self.deadline_s - time.monotonic()


def _number(content: dict[str, Any], name: str, default: float) -> float:
    value = content.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return default
    return max(-MAX_NUMBER, min(value, MAX_NUMBER))  # JSON's whole numbers have no bound


def _tokens(content: dict[str, Any]) -> int:
    """Most tokens of all the choices, for estimates."""
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    most = next((n for n in (_number(content, name, 0) for name in names) if n > 0), ASSUMED_TOKENS)
    prompt = content.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return int(most * max(1, _number(content, "n", 1)) * prompts)


class Reading:
    """One try of a call at one replica, chosen by Serve.

    Args:
        handle: of the model's deployment.
        call: is forwarded at once.
    """

    def __init__(self, handle: DeploymentHandle, call: Call) -> None:
        self._call = str(next(_CALLS))
        asked = (call.left_s, call.priority, call.tokens, self._call)
        self._response = handle.options(stream=True).ask.remote(call.path, call.for_replica(), asked=asked)
        self._is_open = True

    async def item(self) -> Item:
        """The next item that is no heartbeat.

        Raises:
            Lost: the replica has died, or has said nothing for 10 s.
            ApiError: 429 where too many wait for a replica, 500 for a replica that failed but lives.
        """
        item: Item = b""
        while item == b"":
            try:
                item = await asyncio.wait_for(anext(self._response), SILENCE_S)
            except BackPressureError as error:
                raise _queue_full() from error
            except RayTaskError as error:
                raise ApiError(500, "the replica failed; its log says why", kind="server_error") from error
            except TimeoutError as error:
                SILENT_CALLS.add(self._call)
                raise Lost(f"no word for {SILENCE_S:g} s") from error
            except StopAsyncIteration as error:
                raise Lost("the reply broke off") from error
            except (RayError, RayServeException) as error:
                raise Lost(type(error).__name__) from error
        self._is_open = item is not None
        return item

    async def rest(self) -> AsyncIterator[bytes]:
        """The pieces of the body until its end. Raises what `item` raises."""
        while (item := await self.item()) is not None:
            assert isinstance(item, bytes)
            yield item

    def close(self) -> None:
        """End the request at the replica where it still runs."""
        if self._is_open:
            self._is_open = False
            self._response.cancel()


def _queue_full() -> ApiError:
    return ApiError(
        429,
        "too many requests wait for a replica",
        kind="overloaded_error",
        code="queue_full",
        retry_after_s=1,
    )
