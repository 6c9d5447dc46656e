"""What the HTTP process counts, and the page of /metrics: Prometheus' names and base units. Event loop only.

Every label has few values: known paths, status codes, quantiles, and the nodes of the config.
https://prometheus.io/docs/practices/naming/
"""

from __future__ import annotations

import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.api.metrics_ring import ring_metrics
from cluster.versions import macrame_version, mlx_lm_version, mlx_version
from proto import head_pb2

_WAIT_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_ANSWER_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)

# What /health says and the head's newest status, None while the head is out of reach.
Read = Callable[[], tuple[str, head_pb2.ClusterStatus | None]]


class Gaps(Collector):
    """Times between an answer's tokens. Counted by hand: this is the one thing here that each token costs."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_GAP_S) + 1)
        self._sum_s = 0.0

    def add(self, since_s: float) -> float:
        """A token came, the one before it at `since_s`; the present time. Both by time.monotonic()."""
        now_s = time.monotonic()
        self._counts[bisect_left(_GAP_S, now_s - since_s)] += 1
        self._sum_s += now_s - since_s
        return now_s

    def collect(self) -> Iterator[Metric]:
        total, buckets = 0, []
        for bound, count in zip((*map(str, _GAP_S), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        name, about = "macrame_inter_token_seconds", "Between two tokens of one answer."
        yield HistogramMetricFamily(name, about, buckets, self._sum_s)


class Metrics:
    """What this process counts since it started."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each one
        self._registry = registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter(
            "macrame_http_requests", "HTTP requests that ended.", ("path", "status"), registry=registry
        )
        self.in_flight = Gauge(
            "macrame_http_requests_in_flight", "HTTP requests that are being answered.", registry=registry
        )
        self.disconnects = Counter(
            "macrame_client_disconnects", "Clients that left before their answer ended.", registry=registry
        )
        self.stream_errors = Counter(
            "macrame_stream_errors", "Streams that ended with an error event.", registry=registry
        )
        self.prompt_tokens = Counter(
            "macrame_prompt_tokens", "Tokens of prompts, counted when an answer ends.", registry=registry
        )
        self.completion_tokens = Counter(
            "macrame_completion_tokens", "Tokens of answers, counted when one ends.", registry=registry
        )
        self.first_token_s = Histogram(
            "macrame_time_to_first_token_seconds",
            "From the parsed request to the head's first reply, waiting included.",
            buckets=_ANSWER_S,
            registry=registry,
        )
        self.request_s = Histogram(
            "macrame_request_seconds",
            "From the parsed request to the end of its answer.",
            buckets=_ANSWER_S,
            registry=registry,
        )
        self.queue_s = Histogram(
            "macrame_queue_wait_seconds",
            "What a request waited at the head before its first chunk entered the ring.",
            buckets=_WAIT_S,
            registry=registry,
        )
        self.prefill_s = Histogram(
            "macrame_prefill_seconds",
            "From the first chunk's start to the first token.",
            buckets=_ANSWER_S,
            registry=registry,
        )
        self.gaps = Gaps()
        registry.register(self.gaps)
        build = Gauge(
            "macrame_build_info",
            "1, with the versions of the HTTP process.",
            ("version", "mlx", "mlx_lm", "python"),
            registry=registry,
        )
        build.labels(macrame_version(), mlx_version(), mlx_lm_version(), platform.python_version()).set(1)
        ProcessCollector(registry=registry)

    def watch(self, read: Read) -> None:
        """Also show what the head knows; call once. `read` is called for each page."""
        self._registry.register(_Ring(read))

    def page(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type: OpenMetrics for who asks for it, else Prometheus text."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _Ring(Collector):
    def __init__(self, read: Read) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return ring_metrics(*self._read())
