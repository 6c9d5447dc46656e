"""Bytes of every node of a ring over a load and a generation: records, status, and what was predicted."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.call_trouble import call_trouble
from cluster.config import ClusterConfig
from cluster.errors import EXIT_UNREACHABLE, UserError
from cluster.routes import HEAD_RANK
from cluster.rpc import connect
from cluster.tls import Credentials
from cluster.trace_client import Choices, NodeTrace, Tracing, troubles
from cluster.trace_file import trace_file
from cluster.trace_parts import answer_of
from cluster.trace_recorder import MEMORY_FIELDS, Kind
from cluster.trace_run import ANSWER_S, Ask, count_tokens, generate, served
from cluster.trace_spans import Timeline, timeline
from cluster.versions import macrame_version
from proto import head_pb2, head_pb2_grpc

WITH_MEMORY = Choices(has_memory=True)


@dataclass(slots=True)
class MemoryProfile:
    """What was seen. status: of the head, after the answer. trouble: why it is not whole."""

    request_id: str
    has_load: bool
    nodes: list[NodeTrace]
    timeline: Timeline
    status: head_pb2.ClusterStatus
    model: str
    num_tokens: int
    num_prompt_tokens: int
    trouble: list[str]

    def summary(self) -> dict[str, Any]:
        """What `macrame profile --memory --json` prints, the file's name left out."""
        return {
            "model": self.model,
            "has_load": self.has_load,
            "prompt_tokens": self.num_prompt_tokens,
            "tokens": self.num_tokens,
            "nodes": [self._node(rank) for rank in self.status.ranks],
            "trouble": self.trouble,
        }

    def file(self) -> dict[str, Any]:
        """The trace, for Perfetto."""
        names = {rank.rank: f"{rank.name} {rank.node.start}:{rank.node.stop}" for rank in self.status.ranks}
        metadata = self.summary() | {"macrame": macrame_version(), "request": self.request_id}
        return trace_file(self.timeline, answer_of(self.timeline, self.request_id), names, metadata)

    def _node(self, told: head_pb2.RankStatus) -> dict[str, Any]:
        memory, node = told.node.memory, told.node
        peaks = self._peaks(told.rank)
        return {
            "rank": told.rank,
            "name": told.name,
            "measured": {
                "weight_bytes": _weights(node.footprint),
                "kv_bytes": max(memory.peak_kv_bytes, peaks["kv"]),
                "activation_bytes": memory.activation_bytes,
                "cache_bytes": peaks["cache"],
                "mlx_peak_bytes": max(node.peak_bytes, peaks["peak"]),
                "peak_rss_bytes": node.peak_rss_bytes,
                "import_rss_bytes": node.import_base_rss_bytes,
            },
            "predicted": _predicted(told),
            "load_s": self._load_s(told.rank),
            "num_samples": len(self.timeline.memory.get(told.rank, ())),
        }

    def _peaks(self, rank: int) -> Mapping[str, int]:
        columns = zip(*(numbers for _, numbers in self.timeline.memory.get(rank, ())), strict=True)
        return dict.fromkeys(MEMORY_FIELDS, 0) | dict(zip(MEMORY_FIELDS, map(max, columns), strict=False))

    def _load_s(self, rank: int) -> float | None:
        own = next((node.records for node in self.nodes if node.rank == rank), [])
        loads = [r.ended - r.began for r in own if r.kind is Kind.LOADED]
        return sum(loads) if loads else None


def _weights(part: Any) -> int:
    return int(part.layers_bytes + part.embed_bytes + part.norm_bytes + part.head_bytes + part.other_bytes)


def _predicted(told: head_pb2.RankStatus) -> dict[str, int] | None:
    """None for a node without layers."""
    if not told.HasField("predicted"):
        return None
    predicted = told.predicted
    weights = _weights(predicted.weights)
    return {
        "weight_bytes": weights,
        "kv_bytes": predicted.kv_bytes,
        "activation_bytes": predicted.activation_bytes,
        "sum_bytes": weights + predicted.kv_bytes + predicted.activation_bytes,
        "budget_bytes": predicted.budget_bytes,
    }


def tracing_memory(config: ClusterConfig, credentials: Credentials | str | None) -> Tracing:
    """Of all the config's nodes, not switched on yet: their load may be still to come."""
    nodes = [node for node in config.nodes if node.use]
    return Tracing(nodes, credentials, f"memory-{uuid.uuid4().hex}", WITH_MEMORY)


def profile_memory(
    config: ClusterConfig,
    credentials: Credentials | str | None,
    ask: Ask,
    tracing: Tracing,
    *,
    has_load: bool,
    say: Callable[[str], None] = lambda _line: None,
) -> MemoryProfile:
    """One answer of a ring whose `tracing` is on; switches it off. Raises UserError."""
    head_node = config.nodes[HEAD_RANK]
    replies: list[head_pb2.GenerateReply] = []
    trouble = []
    request_id = f"memory-{uuid.uuid4().hex}"
    with connect(head_node.address, credentials, head_node.name) as channel:
        stub = head_pb2_grpc.HeadStub(channel)
        try:
            plan = served(_status(stub, config, credentials))
            say(f"an answer of {ask.num_tokens} tokens")
            failure = generate(stub, ask, ask.num_tokens, request_id, replies)
            if failure:
                trouble.append(f"the answer broke off after {count_tokens(replies)} tokens: {failure}")
        except KeyboardInterrupt:
            trouble.append(f"it was interrupted after {count_tokens(replies)} tokens")
        finally:
            nodes = tracing.stop()
        status = _status(stub, config, credentials)
    trouble += troubles(nodes)
    num_prompt = replies[0].prompt_tokens if replies else 0
    return MemoryProfile(
        request_id,
        has_load,
        nodes,
        timeline(nodes, HEAD_RANK),
        status,
        plan.model,
        count_tokens(replies),
        num_prompt,
        trouble,
    )


def _status(
    stub: head_pb2_grpc.HeadStub, config: ClusterConfig, credentials: Credentials | str | None
) -> head_pb2.ClusterStatus:
    try:
        status: head_pb2.ClusterStatus = stub.GetCluster(head_pb2.ClusterRequest(), timeout=ANSWER_S)
        return status
    except grpc.RpcError as error:
        raise UserError(
            call_trouble(error, config.nodes[HEAD_RANK], credentials), EXIT_UNREACHABLE
        ) from error
