"""What `/metrics` tells: counts and times of steps, requests and answers, as Prometheus reads them.

Each number has one writer, the engine's thread or the event loop, and is a plain int or float: a
step pays for some additions, and all else is paid for by whoever reads.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .replica_metrics import replica_families
from .served import ServedEngine

if TYPE_CHECKING:
    from prometheus_client import Metric

    from ..requests.outputs import RequestOutput
    from ..scheduling.owners import StepTimes

_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    300,
    1800,
)
_STEP_SECONDS = (0.0001, 0.00025, 0.0005, *_SECONDS[:13])
_HOST_SECONDS = (
    0.00001,
    0.000025,
    0.00005,
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.1,
)
_COUNTS = tuple(2**power for power in range(15))
_SMOOTHING = 0.2

_HISTOGRAMS = {
    "infc_time_to_first_token_seconds": (
        "Time from the arrival of a request to its first token.",
        "first_token_seconds",
    ),
    "infc_inter_token_latency_seconds": (
        "Time between tokens of a completion, as they were generated.",
        "inter_token_seconds",
    ),
    "infc_e2e_request_latency_seconds": (
        "Time from the arrival of a request to its last token.",
        "request_seconds",
    ),
    "infc_request_queue_time_seconds": (
        "Time from the arrival of a request to its first step.",
        "queue_seconds",
    ),
    "infc_step_time_seconds": (
        "Duration of a step: schedule, execute, sample, publish.",
        "step_seconds",
    ),
    "infc_step_host_time_seconds": ("Duration of a step, without the executor.", "host_seconds"),
    "infc_step_sequences": ("Sequences in a step (batch size).", "step_sequences"),
    "infc_step_tokens": ("Tokens computed in a step.", "step_tokens"),
}


class Histogram:
    """Counts of values by upper edges, and their sum."""

    __slots__ = ("counts", "edges", "sum")

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.edges, value)] += times
        self.sum += value * times

    def family(self, name: str, doc: str) -> Metric:
        """What a scrape reads."""
        total, buckets = 0, []
        for edge, count in zip(
            (*map(str, map(float, self.edges)), "+Inf"), self.counts, strict=True
        ):
            total += count
            buckets.append((edge, total))
        return HistogramMetricFamily(name, doc, buckets=buckets, sum_value=self.sum)


class ServerMetrics(Collector):
    """Every number of one server, also where one artifact follows another."""

    def __init__(self, engine: ServedEngine, info: dict[str, str]) -> None:
        self._engines: list[ServedEngine] = []  # the last one takes requests, the others end theirs
        self._info = info
        self._lock = threading.Lock()  # steps of two engines may be told at a time
        self._past_preemptions = 0  # of engines that have ended
        self.http_requests: Counter[tuple[str, str]] = Counter()  # by endpoint and status
        self.finished: Counter[str] = Counter()  # by reason
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.queue_seconds = Histogram(_SECONDS)
        self.first_token_seconds = Histogram(_SECONDS)
        self.inter_token_seconds = Histogram(_SECONDS)
        self.request_seconds = Histogram(_SECONDS)
        self.step_seconds = Histogram(_STEP_SECONDS)
        self.host_seconds = Histogram(_HOST_SECONDS)
        self.step_sequences = Histogram(_COUNTS)
        self.step_tokens = Histogram(_COUNTS)
        self.recent_queue_seconds = 0.0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self.follow(engine, info)

    def follow(self, engine: ServedEngine, info: dict[str, str]) -> None:
        """From now on this engine takes the requests; on the event loop."""
        self._info = info
        self._engines.append(engine)
        engine.watch_steps(self._on_step)

    def leave(self, engine: ServedEngine) -> None:
        """An engine that was followed by another one has ended."""
        self._past_preemptions += engine.stats().num_preemptions
        self._engines.remove(engine)

    def _on_step(self, times: StepTimes) -> None:
        """On an engine's thread."""
        with self._lock:
            self.generated_tokens += times.num_sampled
            self.step_seconds.observe(times.seconds)
            self.host_seconds.observe(times.seconds - times.executor_seconds)
            self.step_sequences.observe(times.num_sequences)
            self.step_tokens.observe(times.num_tokens)
            for seconds, count in times.token_gaps.items():
                self.inter_token_seconds.observe(seconds, count)

    def scrape(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type: Prometheus' text, or OpenMetrics for who accepts it."""
        encode, media = choose_encoder(accept)
        return encode(self._registry), media

    def collect(self) -> Iterator[Metric]:
        """Every family; called by the registry."""
        yield InfoMetricFamily("infc_build", "Model, backend and version.", self._info)
        yield from self._gauges()
        yield from self._counters()
        if replicas := self._engines[-1].replicas():
            yield from replica_families(replicas)
        for name, (doc, attribute) in _HISTOGRAMS.items():
            histogram: Histogram = getattr(self, attribute)
            yield histogram.family(name, doc)

    def _gauges(self) -> Iterator[Metric]:
        each = [engine.stats() for engine in self._engines]
        num_running = sum(stats.num_running for stats in each)
        num_waiting = sum(stats.num_waiting for stats in each)
        num_blocks = sum(stats.num_blocks for stats in each)
        used = num_blocks - sum(stats.num_free_blocks for stats in each)
        for name, doc, value in (
            ("infc_requests_running", "Requests that are being processed.", num_running),
            ("infc_requests_waiting", "Requests waiting to be scheduled.", num_waiting),
            ("infc_kv_blocks_used", "Blocks of the KV cache in use.", used),
            ("infc_kv_blocks", "Total blocks of the KV cache.", num_blocks),
            (
                "infc_kv_usage_ratio",
                "Part of the blocks of the KV cache in use, from 0 to 1.",
                used / num_blocks if num_blocks else 0.0,
            ),
        ):
            yield GaugeMetricFamily(name, doc, value)

    def _counters(self) -> Iterator[Metric]:
        http = CounterMetricFamily(
            "infc_http_requests_total",
            "Finished HTTP requests, by endpoint and status; `-` if the headers were incomplete.",
            labels=("endpoint", "status"),
        )
        for labels, count in list(self.http_requests.items()):
            http.add_metric(labels, count)
        yield http
        finished = CounterMetricFamily(
            "infc_completions_total",
            "Finished completions, by reason: `stop`, `length`, `abort` (cancelled), `error`.",
            labels=("finish_reason",),
        )
        for reason, count in list(self.finished.items()):
            finished.add_metric((reason,), count)
        yield finished
        preemptions = sum(engine.stats().num_preemptions for engine in self._engines)
        for name, doc, value in (
            ("infc_prompt_tokens_total", "Prompt tokens of started requests.", self.prompt_tokens),
            (
                "infc_prefix_cache_hit_tokens_total",
                "Prompt tokens found in the prefix cache.",
                self.cached_tokens,
            ),
            ("infc_generation_tokens_total", "Generated tokens.", self.generated_tokens),
            (
                "infc_preemptions_total",
                "Preempted requests, which are recomputed later.",
                self._past_preemptions + preemptions,
            ),
        ):
            yield CounterMetricFamily(name, doc, value)

    def retry_seconds(self) -> int:
        """When whom the queue had no room for may come again: after about what others waited."""
        return min(60, max(1, round(self.recent_queue_seconds)))

    def meter(self) -> RequestMeter:
        """What follows one request through its outputs."""
        return RequestMeter(self)


class RequestMeter:
    """Follows one request of the engine. Times are the engine's: a slow reader is not in them."""

    __slots__ = ("_begun", "_has_token", "_metrics", "_open")

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._begun = False
        self._has_token = False
        self._open = 1

    def add(self, output: RequestOutput) -> None:
        """Take in what steps gave."""
        times, metrics = output.metrics, self._metrics
        if not self._begun and times.first_scheduled_time is not None:
            self._begun = True
            waited = times.first_scheduled_time - times.arrival_time
            metrics.prompt_tokens += len(output.prompt_token_ids)
            metrics.cached_tokens += times.num_cached_tokens
            metrics.queue_seconds.observe(waited)
            metrics.recent_queue_seconds += _SMOOTHING * (waited - metrics.recent_queue_seconds)
        if not self._has_token and times.first_token_time is not None:
            self._has_token = True
            metrics.first_token_seconds.observe(times.first_token_time - times.arrival_time)
        for part in output.outputs:
            if part.finish_reason is not None:
                metrics.finished[part.finish_reason] += 1
        if output.finished:
            self._open = 0
            if times.finished_time is not None:
                metrics.request_seconds.observe(times.finished_time - times.arrival_time)

    def close(self) -> None:
        """The request is over, also where nobody waited for its end."""
        if self._open and self._begun:
            self._metrics.finished["abort"] += 1
        self._open = 0
