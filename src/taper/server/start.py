"""From files to a running server: memory shared out, the address checked, uvicorn."""

from __future__ import annotations

import gc
import logging
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from taper.engine import LLM, load
from taper.engine.batch import BatchEngine, BatchSizes
from taper.errors import DoesNotFitError, UsageError
from taper.formats.container import TaperFile
from taper.kvcache import BLOCK_ENTRIES, parse_kv
from taper.models import Decoder
from taper.planner.calibration import step_time_of
from taper.planner.planner import Planner
from taper.server import limits
from taper.server.app import Server, app_of
from taper.server.batch_loop import BatchLoop
from taper.server.guard import LOOPBACK_HOSTS
from taper.server.one_loop import OneLoop
from taper.server.serving import Loop, Served

DEFAULT_PORT = 8642  # 8000, 8080 and 11434 are taken on many machines
MIN_KEY_CHARS = 16
DEFAULT_KV = "7"
# How long the engine's thread may keep the interpreter while HTTP waits; Python's 5 ms would add up over
# the several waits of one request.
_SWITCH_S = 0.0005
_GC_THRESHOLDS = 5000, 10, 20


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line says.

    Attributes:
        host, port: to listen at; port 0 takes a free one.
        key: of the API; None asks for none, which is for loopback addresses only.
        allow_hosts: further names in the Host header.
        memory_bytes: for weights and KV caches of all models; None sets no limit.
        max_waiting: requests in a model's queue.
        max_batch: sequences that share a pass.
        kv: format of the KV cache; None takes the file's own where it is of planes, else 7 bits, which costs
            less than 0.1 % of perplexity (docs/kv.md) and lets sequences share blocks.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    key: str | None = None
    allow_hosts: tuple[str, ...] = ()
    memory_bytes: int | None = None
    max_waiting: int = 256
    max_batch: int = 32
    kv: str | None = None


def named(sources: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE or FILE, whose name without its ending is the model's. Raises UsageError for a name twice."""
    models: dict[str, Path] = {}
    for source in sources:
        name, equals, path = source.partition("=")
        file = Path(path if equals else source)
        name = name if equals else file.name.removesuffix(".taper")
        if not re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", name):
            raise UsageError(
                f"{name!r} is no model's name", "give one: NAME=FILE, of letters, digits, . _ : -"
            )
        if name in models:
            raise UsageError(f"two models are called {name!r}", "give them names: NAME=FILE")
        models[name] = file
    return models


def shares(files: Mapping[str, Path], total_bytes: int) -> dict[str, int]:
    """Memory of each model: what its least width needs, and of the rest its part by size at full width.

    Raises:
        DoesNotFitError: the least widths do not fit together.
    """
    opened = {name: TaperFile.open(path) for name, path in files.items()}
    least = {name: file.memory_at(file.min_bits) for name, file in opened.items()}
    full = {name: file.memory_at(file.total_bits) for name, file in opened.items()}
    rest = total_bytes - sum(least.values())
    if rest < 0:
        raise DoesNotFitError(
            f"the models need {sum(least.values()):,} bytes at least widths; the budget is {total_bytes:,}",
            "serve fewer models, or give more memory",
        )
    return {name: least[name] + rest * full[name] // sum(full.values()) for name in files}


def open_models(files: Mapping[str, Path], options: ServeOptions) -> dict[str, Served]:
    """Load the models. Raises what `taper.load` raises."""
    parts: Mapping[str, int | None] = dict.fromkeys(files)
    if options.memory_bytes is not None:
        parts = shares(files, options.memory_bytes)
    served = {}
    for name, path in files.items():
        llm = load(path, memory_budget=parts[name], kv=kv_of(path, options.kv))
        served[name] = Served(name, llm, make_loop(llm, path, options, parts[name]))
    return served


def kv_of(path: Path, asked: str | None) -> str | None:
    """The KV format that a model is served with; see `ServeOptions.kv`."""
    if asked is not None or path.is_dir():
        return asked
    file = TaperFile.open(path)
    has_own = parse_kv(file.header.activations.kv) is not None
    return None if has_own or file.header.config.head_dim % 16 else DEFAULT_KV


def make_loop(llm: LLM, path: Path, options: ServeOptions, memory_bytes: int | None = None) -> Loop:
    """Batches under the planner; one request at a time for a Hugging Face folder in float32."""
    if path.is_dir():
        return OneLoop(llm.engine, options.max_waiting)
    file, model = TaperFile.open(path), Decoder.from_taper(TaperFile.open(path))
    sizes = BatchSizes(options.max_batch, kv_blocks=kv_blocks(llm, file, options.max_batch, memory_bytes))
    planner = Planner(max_waiting=options.max_waiting)
    return BatchLoop(BatchEngine(llm.engine, planner, step_time_of(file, model), sizes), options.max_waiting)


def kv_blocks(llm: LLM, file: TaperFile, max_batch: int, memory_bytes: int | None) -> int | None:
    """Blocks of 64 entries: those that fit beside the least width; None without a budget."""
    if memory_bytes is None:
        return None
    model = llm.engine.model
    block_bytes: int = model.new_cache(BLOCK_ENTRIES).bytes_at(BLOCK_ENTRIES)
    whole = -(-model.context_length // BLOCK_ENTRIES)
    fitting = (memory_bytes - file.memory_at(file.min_bits)) // block_bytes
    return max(1, min(max_batch * whole, fitting))


def check_address(options: ServeOptions) -> None:
    """Refuse to listen where others can reach without a key. Raises UsageError."""
    if options.key is not None and len(options.key) < MIN_KEY_CHARS:
        raise UsageError(
            f"the API key has {len(options.key)} characters; at least {MIN_KEY_CHARS} are needed",
            "make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    if options.key is None and not is_loopback(options.host):
        raise UsageError(
            f"--host {options.host} can be reached by others, and there is no API key",
            "give --api-key-file FILE, or set TAPER_API_KEY, or listen at 127.0.0.1",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a name other than localhost is not trusted."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def listen(options: ServeOptions) -> socket.socket:
    """A socket at the address, before any model is loaded. Raises UsageError where it is taken."""
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        # asyncio sets TCP_NODELAY only where the protocol is named; else a reply waits 40 ms for an ACK.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((options.host, options.port))
    except OSError as error:
        raise UsageError(
            f"cannot listen at {options.host}:{options.port}: {error.strerror or error}",
            "choose another port: --port N; 0 takes a free one",
        ) from error
    return bound


def serve(models: Mapping[str, Served], options: ServeOptions, bound: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""
    server = Server(models)
    keep_pauses_short()
    try:
        run(server, options, bound)
    finally:
        gc.unfreeze()  # or the native objects would outlive their module


def keep_pauses_short() -> None:
    """Set the interpreter up for a server whose models are loaded: one that stops for 50 ms is too
    late with a refusal.

    What is there by now is left out of garbage collections, for one over modules, models and tokenizers took
    46 ms, once in some hundreds of requests; and they come more rarely, for what is left are requests.
    """
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def run(server: Server, options: ServeOptions, bound: socket.socket) -> None:
    """Run a server, whatever answers behind it, until SIGINT or SIGTERM."""
    # Of a client that left it warns at every write but the first five; nobody may be reading them.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    hosts = {*LOOPBACK_HOSTS, options.host.lower(), *options.allow_hosts}
    DrainingServer(app_of(server, hosts=hosts, key=options.key)).run(sockets=[bound])


class DrainingServer(uvicorn.Server):
    """Lets the application know of a signal at once, so that its endless streams end.

    Args:
        app: of `make_app`.
        grace_s: for requests that run when the signal comes.
    """

    def __init__(self, app: Starlette, grace_s: int = 10) -> None:
        super().__init__(_config(app, grace_s))
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then as uvicorn does."""
        self._app.state.server.drain()
        await super().shutdown(sockets)


def _config(app: Starlette, grace_s: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.MAX_HEADER_BYTES,
        timeout_graceful_shutdown=grace_s,
        limit_concurrency=4096,
    )
