"""Counters of the HTTP process and the head's newest numbers, as Prometheus text. Event loop only."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

from proto import head_pb2

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
STATUSES = ("ok", "starting", "loading", "degraded")


class Histogram:
    """Seconds in fixed buckets."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BUCKETS_S) + 1)
        self._sum_s = 0.0

    def add(self, value_s: float) -> None:
        self._counts[bisect_left(_BUCKETS_S, value_s)] += 1
        self._sum_s += value_s

    def lines(self, name: str) -> Iterable[str]:
        total = 0
        for bound, count in zip(map(str, (*_BUCKETS_S, "+Inf")), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum_s:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What this process counts since it started."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # (path, status)
        self.num_in_flight = 0
        self.num_disconnects = 0
        self.num_stream_errors = 0
        self.num_prompt_tokens = 0
        self.num_completion_tokens = 0
        self.first_token_s = Histogram()
        self.request_s = Histogram()

    def text(self, state: str, status: head_pb2.ClusterStatus | None) -> str:
        """The whole page; `state` is what /health says, `status` the head's last word."""
        page = _Page()
        page.add("status", "gauge", "1 for the state that /health reports", _one_hot(state))
        paths = {f'{{path="{path}",status="{code}"}}': n for (path, code), n in sorted(self.requests.items())}
        page.add("http_requests_total", "counter", "HTTP requests by path and status", paths)
        page.one("http_requests_in_flight", "gauge", "HTTP requests being answered", self.num_in_flight)
        page.one("client_disconnects_total", "counter", "clients that left early", self.num_disconnects)
        page.one("stream_errors_total", "counter", "streams that ended with an error", self.num_stream_errors)
        page.one("prompt_tokens_total", "counter", "tokens of prompts", self.num_prompt_tokens)
        page.one("completion_tokens_total", "counter", "tokens of answers", self.num_completion_tokens)
        page.histogram("time_to_first_token_seconds", "until the head's first reply", self.first_token_s)
        page.histogram("request_seconds", "until the end of the answer", self.request_s)
        if status is not None:
            _add_head(page, status)
        return page.text()


class _Page:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, kind: str, about: str, samples: Mapping[str, float]) -> None:
        self._lines += [f"# HELP macrame_{name} {about}", f"# TYPE macrame_{name} {kind}"]
        self._lines += [f"macrame_{name}{labels} {value:.15g}" for labels, value in samples.items()]

    def one(self, name: str, kind: str, about: str, value: float) -> None:
        self.add(name, kind, about, {"": value})

    def histogram(self, name: str, about: str, histogram: Histogram) -> None:
        self.add(name, "histogram", about, {})
        self._lines += histogram.lines(f"macrame_{name}")

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def _one_hot(state: str) -> dict[str, float]:
    return {f'{{status="{name}"}}': float(name == state) for name in STATUSES}


def _add_head(page: _Page, status: head_pb2.ClusterStatus) -> None:
    page.one("ring_epoch", "gauge", "epoch of the plan", status.epoch)
    page.one("sessions_active", "gauge", "requests in the ring", status.num_active)
    page.one("sessions_queued", "gauge", "requests that wait", status.num_queued)
    page.one("sessions_max", "gauge", "requests that the plan has room for", status.max_active)
    page.one("head_requests_total", "counter", "requests that the head took", status.num_requests)
    page.one("head_failed_total", "counter", "requests that failed", status.num_failed)
    labels = [f'{{rank="{rank.rank}"}}' for rank in status.ranks]
    for name, kind, about, field in _NODE_FIELDS:
        values = [float(getattr(rank.node, field)) for rank in status.ranks]
        page.add(name, kind, about, dict(zip(labels, values, strict=True)))


_NODE_FIELDS = (
    ("node_loaded_bytes", "gauge", "bytes of weights that a node holds", "loaded_bytes"),
    ("node_kv_bytes", "gauge", "bytes of all sessions on a node", "kv_bytes"),
    ("node_sessions", "gauge", "sessions on a node", "num_sessions"),
    ("node_active_bytes", "gauge", "what MLX holds on a node", "active_bytes"),
    ("node_peak_rss_bytes", "gauge", "the largest resident size of a node's process", "peak_rss_bytes"),
    ("node_cpu_seconds_total", "counter", "user and system time of a node's process", "cpu_s"),
)
