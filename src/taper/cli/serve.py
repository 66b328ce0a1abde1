"""`taper serve`: OpenAI's HTTP interface, with deadlines and bits for each request."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING

import click

from taper.cli.options import FILE_SIZE, model_path, set_threads, threads_option
from taper.cli.terminal import note
from taper.errors import UsageError

if TYPE_CHECKING:
    from taper.server.start import ServeOptions

KEY_VARIABLE = "TAPER_API_KEY"
_NEEDED = ("starlette", "uvicorn", "msgspec", "prometheus_client", "llguidance")


@click.command("serve")
@click.argument("models", nargs=-1, metavar="[NAME=]FILE...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8642, show_default=True, help="0: a free one.")
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"File with the key that requests must send; or the variable {KEY_VARIABLE}.",
)
@click.option(
    "--allow-host",
    "allow_hosts",
    multiple=True,
    metavar="NAME",
    help="A further name that the Host header may have; repeat for more.",
)
@click.option(
    "--memory", type=FILE_SIZE, metavar="SIZE", help="For weights and KV caches of all models, as in 2GiB."
)
@click.option(
    "--max-queue",
    type=click.IntRange(1, 1 << 20),
    default=256,
    show_default=True,
    help="Requests that may wait at a model; the next ones are refused with 429.",
)
@click.option(
    "--ray",
    "on_ray",
    is_flag=True,
    help="Run the models on a Ray cluster: of RAY_ADDRESS, or the one here, or one started for it.",
)
@click.option(
    "--replicas",
    metavar="N|MIN..MAX",
    help="With --ray: of each model, a number, or bounds for queue and deadlines to choose in; default: 1.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1, 256),
    default=32,
    show_default=True,
    help="Answers that share a pass.",
)
@click.option(
    "--kv", metavar="FORMAT", help="KV cache: float16, or bits such as 7; default: the file's, else 7."
)
@threads_option
def command(
    models: tuple[str, ...],
    host: str,
    port: int,
    api_key_file: Path | None,
    allow_hosts: tuple[str, ...],
    memory: int | None,
    max_queue: int,
    max_batch: int,
    kv: str | None,
    on_ray: bool,
    replicas: str | None,
    threads: int | None,
) -> None:
    """Serve models (.taper files or Hugging Face folders; default: the one in the package) over HTTP.

    POST /v1/chat/completions, /v1/completions, /v1/responses; GET /v1/models, /health, /ready, /metrics,
    /openapi.json; a page for people at /. Ctrl-C ends it.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"taper serve needs {', '.join(missing)}", "pip install 'taper[server]'")
    from taper.server.start import ServeOptions, check_address, listen, named, open_models, serve

    options = ServeOptions(host, port, _key(api_key_file), allow_hosts, memory, max_queue, max_batch, kv)
    check_address(options)
    files = named(models or [str(model_path(None))])
    if on_ray:
        _serve_on_ray(files, options, replicas or "1", threads)
        return
    if replicas is not None:
        raise UsageError("--replicas is for Ray", "give --ray, too")
    bound = listen(options)
    set_threads(threads)
    served = open_models(files, options)
    for one in served.values():
        note(one.llm.notice)
    _announce(files, options, bound)
    serve(served, options, bound)


def _serve_on_ray(
    files: Mapping[str, Path], options: ServeOptions, replicas: str, threads: int | None
) -> None:
    if find_spec("ray") is None:
        raise UsageError("taper serve --ray needs ray", "pip install 'taper[server,ray]'")
    from taper.ray.start import Scale, connected, deployed
    from taper.server.start import listen, run

    scale = Scale.read(replicas, threads)
    bound = listen(options)
    with connected(), deployed(files, options, scale) as front:
        _announce(files, options, bound)
        run(front, options, bound)


def _announce(names: Iterable[str], options: ServeOptions, bound: socket) -> None:
    """Where it listens, and a request to try."""
    host = options.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    click.echo(f"serving {', '.join(names)} at {url} ({'with' if options.key else 'no'} API key)", err=True)
    header = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if options.key else ""
    body = f'{{"model": "{next(iter(names))}", "prompt": "Once upon a time"}}'
    curl = f"curl {url}/v1/completions{header} -H 'Content-Type: application/json' -d '{body}'"
    click.echo(curl, err=True)


def _key(path: Path | None) -> str | None:
    """The key of the file or the variable; never from the command line, which other users can read."""
    if path is not None:
        key = path.read_text(encoding="utf-8").strip()
        if not key:
            raise UsageError(f"{path} is empty; it must hold the API key", "write a key into it")
        return key
    return os.environ.get(KEY_VARIABLE) or None
