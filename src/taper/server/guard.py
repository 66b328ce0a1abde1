"""What stands before every route: who may ask, from where, and how much.

A page in a browser can reach a server on the same machine: by its address, from another origin, or by DNS
rebinding under a name of its own. So the Host header must be one that this server goes by, requests of other
origins are refused, and no CORS header is ever sent.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from taper.server.errors import ApiError

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
# The page's own files hold nothing of anyone; the page asks for the key and sends it with each request.
OPEN_PATHS = frozenset({"/", "/page.js", "/page.css", "/health"})


class Guard:
    """ASGI middleware: Host allow-list, Origin, API key.

    Args:
        app: what is guarded.
        hosts: names without a port that the Host header may have; `*` allows any.
        key: the API key; None asks for none.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str], key: str | None) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._digest = None if key is None else _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = self._refusal(scope["path"], Headers(scope=scope))
        if error is None:
            await self._app(scope, receive, send)
        else:
            headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
            await JSONResponse(error.body, error.status, headers)(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if not self._knows(host):
            return ApiError(
                403, f"the Host header is {host[:100]!r}; this server does not go by it (--allow-host)"
            )
        origin = headers.get("origin")
        # Of this server's own page, the origin is the host that was asked.
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return ApiError(403, f"requests of the origin {origin[:100]!r} are refused")
        if self._digest is None or path in OPEN_PATHS:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Digests are of one length, so the time says nothing about the key.
        if scheme.lower() == "bearer" and hmac.compare_digest(_digest(key.strip()), self._digest):
            return None
        return ApiError(
            401,
            "no API key, or a wrong one: send it as Authorization: Bearer KEY",
            kind="authentication_error",
            code="invalid_api_key",
        )

    def _knows(self, host: str) -> bool:
        return "*" in self._hosts or _name(host) in self._hosts


def _name(host: str) -> str:
    """A Host header without its port."""
    name = host.lower()
    if name.startswith("["):
        return name[: name.find("]") + 1]
    return name.split(":", 1)[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
