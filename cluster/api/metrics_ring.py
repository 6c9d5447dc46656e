"""The head's newest status as Prometheus metrics. Pure.

A node that is not heard has no values but its state: an old number would look like a present one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from proto import control_pb2, head_pb2

STATUSES = ("ok", "starting", "loading", "degraded")
NODE_STATES = (
    *("waiting", "unreachable", "frozen"),
    *("idle", "loading", "connecting", "ready", "failed", "draining"),
)
PRESSURES = ("normal", "warning", "critical")
QUANTILES = (0.5, 0.99)
SILENT_S = 2.0  # then a node's last numbers are no longer shown

Rank = head_pb2.RankStatus
Family = CounterMetricFamily | GaugeMetricFamily
Node = control_pb2.NodeStatus


def ring_metrics(state: str, status: head_pb2.ClusterStatus | None) -> Iterator[Metric]:
    """All families; `state` is what /health says, `status` None where the head is out of reach."""
    yield _one_hot("macrame_status", "1 for the state that /health reports.", "status", STATUSES, state)
    yield GaugeMetricFamily(
        "macrame_head_up", "1 while the head answers the HTTP process.", float(status is not None)
    )
    if status is None:
        return
    for name, about, value in (
        ("ring_epoch", "Number of the ring's present epoch.", status.epoch),
        ("context_tokens", "Tokens that a prompt and its answer may have together.", status.context),
        ("sessions_active", "Requests in the ring.", status.num_active),
        ("sessions_queued", "Requests that wait.", status.num_queued),
        ("sessions_kept", "Caches kept for prompts that begin like theirs.", status.num_kept),
        ("prefix_cache_share", "Of all tokens of prompts, those not read again: 0 to 1.", _cached(status)),
        ("sessions_max", "Requests that the plan has room for at once.", status.max_active),
    ):
        yield GaugeMetricFamily(f"macrame_{name}", about, float(value))
    for name, about, value in (
        ("head_requests", "Requests that the head took.", status.num_requests),
        ("head_failed", "Requests that the head refused or that failed.", status.num_failed),
        ("head_prompts", "Prompts that entered the ring.", status.num_prompts),
        ("head_cached_prompts", "Of those, begun with tokens kept of others.", status.num_cached_prompts),
        ("head_prompt_tokens", "Tokens of prompts that entered the ring.", status.num_prompt_tokens),
        ("head_cached_tokens", "Of those of prompts, tokens not read again.", status.num_cached_tokens),
        ("head_completion_tokens", "Tokens that the ring drew.", status.num_completion_tokens),
        ("head_guessed_tokens", "Tokens guessed before they were drawn, and judged.", status.num_guessed),
        ("head_guessed_right_tokens", "Of those guessed, the right ones.", status.num_guessed_right),
        ("head_drafted_tokens", "Tokens that the draft model guessed, sent or not.", status.num_drafted),
        ("head_draft_pauses", "Times that the draft model did not pay and paused.", status.num_draft_pauses),
    ):
        yield CounterMetricFamily(f"macrame_{name}", about, float(value))
    errors = CounterMetricFamily(
        "macrame_request_errors",
        "Requests that ended without all of their tokens, by kind; cancelled: by their clients; late: they "
        "waited too long.",
        labels=("kind",),
    )
    for error in status.errors:
        errors.add_metric((error.kind,), float(error.count))
    yield errors
    yield from _nodes(status.ranks)


def _cached(status: head_pb2.ClusterStatus) -> float:
    return status.num_cached_tokens / max(status.num_prompt_tokens, 1)


def _one_hot(name: str, about: str, label: str, values: Sequence[str], present: str) -> Metric:
    family = GaugeMetricFamily(name, about, labels=(label,))
    for value in values:
        family.add_metric((value,), float(value == present))
    return family


def is_heard(rank: Rank) -> bool:
    """Whether its last status is of now."""
    return rank.HasField("node") and rank.age_s < SILENT_S


def _nodes(ranks: Sequence[Rank]) -> Iterator[Metric]:
    up = GaugeMetricFamily("macrame_node_up", "1 while the head hears the node.", labels=("rank", "node"))
    state = GaugeMetricFamily(
        "macrame_node_state", "1 for the state in which the head sees it.", labels=("rank", "node", "state")
    )
    for rank in ranks:
        up.add_metric(_labels(rank), float(is_heard(rank)))
        for name in NODE_STATES:
            state.add_metric((*_labels(rank), name), float(rank.state == name))
    yield from (up, state)
    heard = [rank for rank in ranks if is_heard(rank)]
    for name, about, get in _GAUGES:
        yield _of_nodes(GaugeMetricFamily, f"macrame_{name}", about, heard, get)
    for name, about, get in _COUNTERS:
        yield _of_nodes(CounterMetricFamily, f"macrame_{name}", about, heard, get)
    yield from _certificates(heard)
    yield from _pressures(heard)
    yield from _windows(heard)


def _labels(rank: Rank) -> tuple[str, str]:
    return str(rank.rank), rank.name


def _of_nodes(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    about: str,
    ranks: Sequence[Rank],
    get: Callable[[Rank], float],
) -> Metric:
    family = kind(name, about, labels=("rank", "node"))
    for rank in ranks:
        family.add_metric(_labels(rank), float(get(rank)))
    return family


_GAUGES: tuple[tuple[str, str, Callable[[Rank], float]], ...] = (
    ("node_layers", "Layers that the node owns.", lambda r: r.node.stop - r.node.start),
    ("node_loaded_bytes", "Weights that the node has loaded.", lambda r: r.node.loaded_bytes),
    ("node_load_total_bytes", "Weights that the node is to load.", lambda r: r.node.load_total_bytes),
    ("node_sessions", "Requests that have caches on the node.", lambda r: r.node.num_sessions),
    ("node_kv_bytes", "Caches of all requests on the node.", lambda r: r.node.kv_bytes),
    ("node_kv_budget_bytes", "Caches that the plan has room for.", lambda r: r.predicted.kv_bytes),
    (
        "node_budget_bytes",
        "Weights, caches and activations that the plan has room for.",
        lambda r: r.predicted.budget_bytes,
    ),
    ("node_active_bytes", "Arrays that MLX holds.", lambda r: r.node.active_bytes),
    ("node_cache_bytes", "Freed buffers that MLX keeps.", lambda r: r.node.memory.cache_bytes),
    ("node_resident_bytes", "Resident set of the node's process.", lambda r: r.node.memory.rss_bytes),
    ("node_peak_rss_bytes", "Largest resident set of the process so far.", lambda r: r.node.peak_rss_bytes),
    ("node_memory_bytes", "Memory of the machine, or its container.", lambda r: r.node.memory.total_bytes),
    (
        "node_memory_available_bytes",
        "Of these, what is free without swapping.",
        lambda r: r.node.memory.available_bytes,
    ),
    ("node_swap_used_bytes", "Swap in use on the machine.", lambda r: r.node.memory.swap_used_bytes),
    ("node_admitting", "1 while memory lets new requests start.", lambda r: r.node.memory.is_admitting),
    ("node_busy_seconds", "How long the present work has been without progress.", lambda r: r.node.busy_s),
    ("node_status_age_seconds", "Since the node's last status.", lambda r: r.age_s),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Rank], float]], ...] = (
    ("node_cpu_seconds", "User and system time of the node's process.", lambda r: r.node.cpu_s),
    (
        "node_memory_trims",
        "Times that MLX's cache was emptied for memory.",
        lambda r: r.node.memory.num_trims,
    ),
    (
        "node_draft_passes",
        "Forward passes of the node's draft model: a chunk of a text, or a token.",
        lambda r: r.node.drafter.num_passes,
    ),
    ("stage_busy_seconds", "Time in which the stage computed.", lambda r: r.node.stats.busy_ms / 1e3),
    ("stage_steps", "Frames that the stage computed.", lambda r: r.node.stats.num_steps),
    ("stage_tokens", "Tokens that went through the stage.", lambda r: r.node.stats.num_tokens),
)


def _certificates(ranks: Sequence[Rank]) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "macrame_node_certificate_expiry_timestamp_seconds",
        "When the node's certificate ends, as Unix time.",
        labels=("rank", "node"),
    )
    for rank in ranks:
        if rank.node.certificate_ends_s:
            family.add_metric(_labels(rank), rank.node.certificate_ends_s)
    yield family


def _pressures(ranks: Sequence[Rank]) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "macrame_node_memory_pressure",
        "1 for the present pressure on memory.",
        labels=("rank", "node", "level"),
    )
    for rank in ranks:
        for level in PRESSURES:
            family.add_metric((*_labels(rank), level), float(rank.node.memory_pressure == level))
    yield family


def _windows(ranks: Sequence[Rank]) -> Iterator[Metric]:
    """Quantiles of each stage's latest steps and of each edge's latest hops."""
    steps = GaugeMetricFamily(
        "macrame_stage_step_seconds",
        "Computing one frame: quantiles of the latest 64.",
        labels=("rank", "node", "quantile"),
    )
    hops = GaugeMetricFamily(
        "macrame_hop_seconds",
        "One way to another node, half of a heartbeat's round trip: quantiles of the latest 64.",
        labels=("rank", "node", "to_rank", "quantile"),
    )
    edges = GaugeMetricFamily(
        "macrame_edge_up", "1 while frames can go to that rank.", labels=("rank", "node", "to_rank")
    )
    for rank in ranks:
        stats = rank.node.stats
        for quantile, value_ms in _quantiles(stats.recent_step_ms):
            steps.add_metric((*_labels(rank), quantile), value_ms / 1e3)
        for edge in rank.node.edges:
            to_rank = str(edge.to_rank)
            edges.add_metric((*_labels(rank), to_rank), float(edge.is_up))
            found = [
                ms
                for ms, to in zip(stats.recent_hop_ms, stats.recent_hop_rank, strict=False)
                if to == edge.to_rank
            ]
            for quantile, value_ms in _quantiles(found):
                hops.add_metric((*_labels(rank), to_rank, quantile), value_ms / 1e3)
    yield from (steps, hops, edges)


def _quantiles(values: Sequence[float]) -> Iterator[tuple[str, float]]:
    ordered = sorted(values)
    if ordered:
        for share in QUANTILES:
            yield str(share), ordered[min(len(ordered) - 1, int(share * len(ordered)))]
