"""Prometheus metrics: vLLM's names where it has the thing, `taper:` for what it has not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from taper.engine import Request, StepOutput
from taper.engine.schedule import Terms
from taper.server.errors import ApiError
from taper.server.serving import Ended, Event, Loop, Refused

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BITS = (2, 3, 4, 5, 6, 7, 8, 16, 32)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model = ("model_name",)

        def counter(name: str, text: str, labels: tuple[str, ...] = model) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(name, text, model, registry=self.registry, buckets=buckets)

        self.http = counter("taper:http_requests", "HTTP requests by route and status", ("route", "status"))
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of finished requests")
        self.generation_tokens = counter("vllm:generation_tokens", "Generated tokens")
        self.success = counter("vllm:request_success", "Finished sequences", (*model, "finished_reason"))
        self.first_token = histogram("vllm:time_to_first_token_seconds", "Submission to the first token")
        self.queue = histogram("vllm:request_queue_time_seconds", "Submission to the first pass")
        self.bits = histogram("taper:precision_bits", "Bits of the pass of each token", _BITS)
        self.met = counter("taper:deadline_met", "Sequences that met their deadline")
        self.missed = counter("taper:deadline_missed", "Admitted sequences that missed their deadline")
        self.rejected = counter("taper:rejected", "Sequences refused, by reason", (*model, "reason"))
        self.up = Gauge("taper:ready", "1 while requests are taken", registry=self.registry)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def watch(self, loops: Callable[[], Mapping[str, Loop]]) -> None:
        """Read the loops' state at every scrape."""
        self.registry.register(_LoopCollector(loops))


class CountedLoop:
    """A loop whose events are counted on their way.

    Args:
        loop: the engine's.
        name: of the model.
        metrics: that count.
    """

    def __init__(self, loop: Loop, name: str, metrics: Metrics) -> None:
        self._loop = loop
        self._name = name
        self._metrics = metrics
        # Looked up once: labels() takes a lock and a dictionary, for every token.
        self._tokens = metrics.generation_tokens.labels(name)
        self._bits = metrics.bits.labels(name)

    def submit(self, request: Request, terms: Terms, on_event: Callable[[Event], None]) -> int:
        """See `Loop`."""

        def counted(event: Event) -> None:
            self._count(event)
            on_event(event)

        try:
            return self._loop.submit(request, terms, counted)
        except ApiError as error:
            self._reject(error)
            raise

    def cancel(self, sequence_id: int) -> None:
        """See `Loop`."""
        self._loop.cancel(sequence_id)

    def snapshot(self) -> Mapping[str, Any]:
        """See `Loop`."""
        return self._loop.snapshot()

    def close(self) -> None:
        """See `Loop`."""
        self._loop.close()

    def _count(self, event: Event) -> None:
        if isinstance(event, StepOutput):
            self._tokens.inc()
            self._bits.observe(event.bits)
        elif isinstance(event, Refused):
            self._reject(event.error)
        else:
            self._end(event)

    def _end(self, end: Ended) -> None:
        metrics, name = self._metrics, self._name
        metrics.prompt_tokens.labels(name).inc(end.num_prompt_tokens)
        metrics.success.labels(name, end.finish_reason).inc()
        metrics.queue.labels(name).observe(end.queue_s)
        if end.first_token_s is not None:
            metrics.first_token.labels(name).observe(end.first_token_s)
        if end.deadline_met is not None:
            (metrics.met if end.deadline_met else metrics.missed).labels(name).inc()

    def _reject(self, error: ApiError) -> None:
        if error.status == 429:
            self._metrics.rejected.labels(self._name, error.code or "other").inc()


class _LoopCollector(Collector):
    """Gauges that are read from the loops' snapshots."""

    def __init__(self, loops: Callable[[], Mapping[str, Loop]]) -> None:
        self._loops = loops

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The families, one sample a model."""
        states = {name: loop.snapshot() for name, loop in self._loops().items()}
        yield self._gauge("vllm:num_requests_running", "In the batch", states, "num_running")
        yield self._gauge("vllm:num_requests_waiting", "In the queue", states, "num_waiting")
        yield self._gauge("vllm:kv_cache_usage_perc", "Used share of the KV blocks, 0..1", states, "kv_share")
        yield self._gauge("taper:kv_blocks_free", "KV blocks that are free", states, "free_kv_blocks")

    def _gauge(
        self, name: str, text: str, states: Mapping[str, Mapping[str, Any]], key: str
    ) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        for model, state in states.items():
            family.add_metric([model], state[key])
        return family
