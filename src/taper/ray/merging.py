"""One view of several replicas: their states added up, their metrics side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

# Of a replica they would count again what the front has counted.
_OF_FRONT = frozenset({"taper:http_requests", "taper:ready"})
_SUMS = ("num_running", "num_waiting", "kv_blocks", "free_kv_blocks", "deadlines_met", "deadlines_due")


def merged_state(replicas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A model's state: counts added, other numbers their mean, and every replica's own.

    Args:
        replicas: `EngineReplica.state` of each.
    """
    snapshots = [replica["snapshot"] for replica in replicas]
    state: dict[str, Any] = dict.fromkeys(_SUMS, 0) | {"kv_share": 0.0, "bits": None, "step_ms": 0.0}
    for key in dict.fromkeys(key for snapshot in snapshots for key in snapshot):
        values = [snapshot[key] for snapshot in snapshots if isinstance(snapshot.get(key), (int, float))]
        if values:
            state[key] = sum(values) if key in _SUMS else sum(values) / len(values)
    state["replicas"] = [{"pid": replica["pid"], **replica["snapshot"]} for replica in replicas]
    return state


def merged_metrics(front: str, replicas: Mapping[str, str]) -> bytes:
    """Prometheus' text of all of them.

    Args:
        front: the front's text, taken as it is.
        replicas: texts by what their label `replica` shall say.
    """
    families: dict[str, Metric] = {}
    for name, text in (("", front), *replicas.items()):
        for family in text_string_to_metric_families(text):
            if not name or family.name not in _OF_FRONT:
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                labels = {"replica": name} if name else {}
                merged.samples += [
                    sample._replace(labels=sample.labels | labels) for sample in family.samples
                ]
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        """As they are."""
        return self._families
