"""What `/metrics` tells of each replica."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from prometheus_client import Metric

    from ..replicas.replica import ReplicaStats

_LABELS = ("replica",)


def replica_families(replicas: Sequence[ReplicaStats]) -> Iterator[Metric]:
    """Families with one value a replica."""
    gauges = {
        "infc_replica_ready": ("Whether the process of a replica takes requests.", _is_ready),
        "infc_replica_requests_running": (
            "Requests that are being processed, by replica.",
            lambda each: each.engine.num_running,
        ),
        "infc_replica_requests_waiting": (
            "Requests waiting to be scheduled, by replica.",
            lambda each: each.engine.num_waiting,
        ),
        "infc_replica_kv_blocks_used": (
            "Blocks of the KV cache in use, by replica.",
            lambda each: each.engine.num_blocks - each.engine.num_free_blocks,
        ),
        "infc_replica_kv_blocks": (
            "Total blocks of the KV cache, by replica.",
            lambda each: each.engine.num_blocks,
        ),
    }
    for name, (doc, value_of) in gauges.items():
        gauge = GaugeMetricFamily(name, doc, labels=_LABELS)
        for each in replicas:
            gauge.add_metric((str(each.index),), value_of(each))
        yield gauge
    restarts = CounterMetricFamily(
        "infc_replica_restarts_total",
        "How often the process of a replica was started again.",
        labels=_LABELS,
    )
    resumed = CounterMetricFamily(
        "infc_replica_resumed_requests_total",
        "Begun requests that a replica has lost, and that were continued.",
        labels=_LABELS,
    )
    for each in replicas:
        restarts.add_metric((str(each.index),), each.num_restarts)
        resumed.add_metric((str(each.index),), each.num_resumed)
    yield restarts
    yield resumed


def _is_ready(replica: ReplicaStats) -> int:
    return int(replica.state == "ready")
