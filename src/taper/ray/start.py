"""From files to replicas on a Ray cluster and the server before them."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Before Ray is imported: it reads them then. Nothing is sent to its makers; load is looked at every second,
# not every ten.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import serve as ray_serve  # noqa: E402
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig  # noqa: E402

from taper.errors import TaperError, UsageError  # noqa: E402
from taper.formats.container import TaperFile  # noqa: E402
from taper.ray.front import Engine, Front  # noqa: E402
from taper.ray.replica import EngineReplica  # noqa: E402
from taper.ray.routing import DeadlineRouter  # noqa: E402
from taper.ray.scaling import queue_and_slack  # noqa: E402
from taper.server.start import ServeOptions, shares  # noqa: E402

START_S = 600.0  # a replica reads its file; a cluster may first have to add a node
DEPLOYMENT = "engine"
SAME_PATH = "its file must be at the same path on every node"
TARGET_REQUESTS = 4.0  # under way at a replica before another one is wanted
LOOK_BACK_S = 12.0
UPSCALE_S = 5.0
DOWNSCALE_S = 120.0
HEALTH_S = 1.0
HEALTH_TIMEOUT_S = 5.0  # Serve replaces a replica after three of them


@dataclass(frozen=True, slots=True)
class Scale:
    """How many replicas a model has.

    Attributes:
        least, most: bounds; equal ones set the number.
        threads: of a replica, which are also the CPUs that Ray keeps for it; None shares out those there are.
    """

    least: int = 1
    most: int = 1
    threads: int | None = None

    @classmethod
    def read(cls, text: str, threads: int | None = None) -> Scale:
        """N, or N..M. Raises UsageError."""
        found = re.fullmatch(r"([0-9]{1,4})(?:\.\.([0-9]{1,4}))?", text, re.ASCII)
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= least <= most:
            raise UsageError(f"--replicas is {text!r}; it must be a number, or bounds", "as in 2 or 1..4")
        return cls(least, most, threads)


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """The cluster of RAY_ADDRESS, or the one that runs here, or one that is started here and ends with this.

    Raises:
        TaperError: there is none, and none can be started.
    """
    previous = os.umask(0o077)  # Ray writes its token and logs for everyone on the machine to read
    try:
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:
        raise TaperError(
            f"no Ray cluster: {_first_line(error)}", "see RAY_ADDRESS, or start one: ray start --head"
        ) from error
    finally:
        os.umask(previous)
    # Serve sets the level of its logger anew; a filter stays.
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def deployed(files: Mapping[str, Path], options: ServeOptions, scale: Scale) -> Iterator[Front]:
    """Replicas of every model, and the front before them; those that it started end with it.

    Raises:
        UsageError: the cluster has too few CPUs.
        ModelNotFoundError, CorruptFileError: a file cannot be read here.
        TaperError: a model did not come up.
    """
    threads = _threads(len(files), scale)
    for path in files.values():
        if not path.is_dir():
            TaperFile.open(path)  # here a refusal says what it always says
    parts = shares(files, options.memory_bytes) if options.memory_bytes is not None else {}
    ray_serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
    there = set(ray_serve.status().applications)
    mine = [_app(name) for name in files if _app(name) not in there]
    try:
        targets = []
        for name, path in files.items():
            own = replace(options, memory_bytes=parts.get(name), key=None)  # the front checks the key
            arguments = (name, str(path.resolve()), own, threads)
            application = _deployment(options, scale, threads).bind(*arguments)
            targets.append(ray_serve.RunTarget(application, name=_app(name), route_prefix=None))
        ray_serve.run_many(targets, wait_for_applications_running=False)
        for name in files:
            _wait_for(name)
        yield Front({name: _engine(name) for name in files})
    finally:
        for app in mine:
            ray_serve.delete(app)


def _app(name: str) -> str:
    return f"taper:{name}"


def _deployment(options: ServeOptions, scale: Scale, threads: int) -> Any:
    deployment = ray_serve.deployment(EngineReplica)
    count: dict[str, Any] = {"num_replicas": scale.least}
    if scale.least < scale.most:
        count = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scale.least,
                max_replicas=scale.most,
                target_ongoing_requests=TARGET_REQUESTS,
                look_back_period_s=LOOK_BACK_S,
                upscale_delay_s=UPSCALE_S,
                downscale_delay_s=DOWNSCALE_S,
                policy=AutoscalingPolicy(policy_function=queue_and_slack),
            )
        }
    return deployment.options(
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": threads},
        # More than a replica's own queue holds: it refuses with 429 and a reason, Serve would only wait.
        max_ongoing_requests=2 * options.max_waiting + 64,
        max_queued_requests=options.max_waiting,
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=10,
        max_constructor_retry_count=2,
        request_router_config=RequestRouterConfig(
            request_router_class=DeadlineRouter,
            request_routing_stats_period_s=HEALTH_S,
            request_routing_stats_timeout_s=HEALTH_TIMEOUT_S,
        ),
        **count,
    )


def _threads(num_models: int, scale: Scale) -> int:
    """CPUs of a replica: as given, or what there is shared evenly, within one node."""
    total = int(ray.cluster_resources().get("CPU", 0))
    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    threads = scale.threads or max(1, min(largest, total // (num_models * scale.most)))
    needed = threads * num_models * scale.least
    if needed > total:
        raise UsageError(
            f"{num_models * scale.least} x {threads} threads need {needed} CPUs; the cluster has {total}",
            "fewer --replicas or --threads, or more nodes",
        )
    return threads


def _wait_for(name: str) -> None:
    """Until the model runs. Raises TaperError where it fails, or is not up in time."""
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s:
        status = ray_serve.status().applications[_app(name)]
        if status.status == "RUNNING":
            return
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise TaperError(f"{name} did not start: {_reason(status)}", SAME_PATH)
        time.sleep(0.1)
    raise TaperError(f"{name} was not up within {START_S:g} s", "see ray status and the logs of Ray Serve")


def _reason(status: Any) -> str:
    """The last line of the replica's own error; Ray puts a traceback around it."""
    texts = [status.message, *(deployment.message for deployment in status.deployments.values())]
    lines = [line.strip() for text in texts for line in text.splitlines() if "Error: " in line]
    return lines[-1] if lines else "no reason given"


def _engine(name: str) -> Engine:
    handle = ray_serve.get_app_handle(_app(name))
    about = handle.describe.remote().result(timeout_s=60)
    return Engine(handle, about["model"])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
