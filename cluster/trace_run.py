"""Traces one request through a running ring: switch on, ask, switch off, fetch, align. Main thread."""

from __future__ import annotations

import json
import random
import secrets
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast

import grpc

from cluster.call_trouble import call_trouble
from cluster.config import ClusterConfig
from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, UserError
from cluster.length import check_length
from cluster.routes import HEAD_RANK
from cluster.rpc import connect
from cluster.tls import Credentials
from cluster.trace_client import Choices, NodeTrace, Tracing, troubles
from cluster.trace_file import trace_file
from cluster.trace_parts import Answer, answer_of, stage_means_ms, table
from cluster.trace_spans import Timeline, timeline
from cluster.versions import macrame_version
from planner.plan import Plan
from proto import head_pb2, head_pb2_grpc

ANSWER_S = 5.0
SILENT_S = 150.0  # longer than a ring waits for a stalled stage
WARM_TOKENS = 4
MAX_TOKENS = 4096  # of one trace: nodes keep so many frames


@dataclass(frozen=True, slots=True)
class Ask:
    """The request that is traced. prompts: as many as are drawn from, the first to warm up."""

    prompts: Iterator[list[int]]
    num_tokens: int
    is_warmed: bool = True
    is_forced: bool = False  # one by one evaluation of layers although others are served
    is_over: threading.Event = field(default_factory=threading.Event)  # set: nobody wants it any more


@dataclass(slots=True)
class Traced:
    """One traced request. trouble: why it or its trace is not whole; empty: it is."""

    model: str
    request_id: str
    plan: Plan
    nodes: list[NodeTrace]
    choices: Choices
    timeline: Timeline
    answer: Answer
    num_tokens: int = 0
    queue_ms: float = 0.0
    num_others: int = 0  # requests that ran besides, when it began
    trouble: list[str] = field(default_factory=list)

    @property
    def names(self) -> dict[int, str]:
        """Of the nodes, with their layers."""
        parts = {part.rank: f" {part.start}:{part.stop}" for part in self.plan.assignments}
        return {node.rank: node.name + parts.get(node.rank, "") for node in self.nodes}

    def summary(self) -> dict[str, Any]:
        """What `macrame trace --json` prints, the file's name left out."""
        answer, trips = self.answer, self.answer.trips
        first = None if answer.first_token is None else (answer.first_token - answer.first_fed) * 1e3
        tokens = sum(trip.num_tokens for trip in trips)
        whole_ms = sum(trip.took for trip in trips) * 1e3
        return {
            "model": self.model,
            "tokens": self.num_tokens,
            "trips": len(trips),
            "tokens_of_trips": tokens,
            "queued_ms": self.queue_ms,
            "first_token_ms": first,
            "trip_ms": {
                "p50": table_p50(trips),
                "mean": whole_ms / len(trips) if trips else None,
            },
            "parts": [
                {"part": r.part.value, "p50_ms": r.p50_ms, "mean_ms": r.mean_ms, "share": r.share}
                for r in table(trips)
            ],
            "nodes": [self._node(node) for node in self.nodes],
            "layers_per_span": self.choices.layers_per_span,
            "others": self.num_others,
            "unfinished_frames": len(answer.unfinished),
            "trouble": self.trouble,
        }

    def file(self) -> dict[str, Any]:
        """The trace, for Perfetto."""
        summary = self.summary() | {"macrame": macrame_version(), "request": self.request_id}
        summary["clocks"] = (
            "times of all nodes are on one line; each may be off by its node's clock_uncertainty_us"
        )
        return trace_file(self.timeline, self.answer, self.names, summary)

    def _node(self, node: NodeTrace) -> dict[str, Any]:
        clock = self.timeline.clocks.get(node.rank)
        drift = None if clock is None else clock.drift
        return {
            "rank": node.rank,
            "name": node.name,
            "mean_ms": stage_means_ms(self.answer.trips, node.rank),
            "records": len(node.records),
            "dropped": node.num_dropped,
            "clock_uncertainty_us": None if clock is None else clock.uncertainty * 1e6,
            "clock_drift_ppm": None if drift is None else drift * 1e6,
            "trouble": node.trouble,
        }


def table_p50(trips: Sequence[Any]) -> float | None:
    """The median trip in ms."""
    return median(trip.took for trip in trips) * 1e3 if trips else None


def trace_ring(
    config: ClusterConfig,
    credentials: Credentials | str | None,
    ask: Ask,
    choices: Choices,
    say: Callable[[str], None] = lambda _line: None,
) -> Traced:
    """One request of our own, beside those of others. What breaks on the way is told in `trouble`.

    Raises UserError where the ring does not serve, or a node cannot be traced.
    """
    head_node = config.nodes[HEAD_RANK]
    with connect(head_node.address, credentials, head_node.name) as channel:
        stub = head_pb2_grpc.HeadStub(channel)
        try:
            status = stub.GetCluster(head_pb2.ClusterRequest(), timeout=ANSWER_S)
        except grpc.RpcError as error:
            raise UserError(call_trouble(error, head_node, credentials), EXIT_UNREACHABLE) from error
        plan = served(status)
        if choices.layers_per_span and status.num_active and not ask.is_forced:
            raise UserError(
                f"{status.num_active} requests are running, and evaluating layers one by one would slow "
                "them: wait, or say --anyway",
                EXIT_ERROR,
            )
        if ask.is_warmed:
            say("warming up")
            failure = generate(stub, ask, min(WARM_TOKENS, ask.num_tokens), uuid.uuid4().hex, [])
            if failure:
                raise UserError(f"the ring did not answer: {failure}", EXIT_ERROR)
        ranks = {HEAD_RANK, *(part.rank for part in plan.assignments)}
        request_id = f"trace-{uuid.uuid4().hex}"
        tracing = Tracing([config.nodes[r] for r in sorted(ranks)], credentials, request_id, choices)
        say(f"tracing {ask.num_tokens} tokens on {len(ranks)} nodes")
        tracing.start()
        replies: list[head_pb2.GenerateReply] = []
        trouble = []
        try:
            failure = generate(stub, ask, ask.num_tokens, request_id, replies)
            if failure:
                trouble.append(f"the answer broke off after {count_tokens(replies)} tokens: {failure}")
        except KeyboardInterrupt:
            trouble.append(f"it was interrupted after {count_tokens(replies)} tokens")
        finally:
            nodes = tracing.stop()
    trouble += troubles(nodes)
    line = timeline(nodes, HEAD_RANK)
    queue_ms = replies[0].queue_ms if replies else 0.0
    return Traced(
        plan.model,
        request_id,
        plan,
        nodes,
        choices,
        line,
        answer_of(line, request_id),
        count_tokens(replies),
        queue_ms,
        status.num_active,
        trouble,
    )


def random_prompts(vocab_size: int, length: int) -> Iterator[list[int]]:
    """Others each time: a ring may know those of the last time."""
    draw = random.Random(secrets.randbits(63))
    return ([draw.randrange(1, max(2, vocab_size)) for _ in range(length)] for _ in iter(int, 1))


def served(status: head_pb2.ClusterStatus) -> Plan:
    """The plan of a ring that serves. Raises UserError for one that does not."""
    if status.status != "ok":
        raise UserError(f"the ring does not serve: {status.reason or status.status}", EXIT_UNREACHABLE)
    return Plan.from_json(status.plan_json)


def prompts_for(
    config: ClusterConfig, credentials: Credentials | str | None, prompt_tokens: int, answer_tokens: int
) -> Iterator[list[int]]:
    """Random ones in the tokens of the model that the ring serves.

    Raises UserError where it serves none, or where a prompt and its answer exceed the plan's context.
    """
    head_node = config.nodes[HEAD_RANK]
    with connect(head_node.address, credentials, head_node.name) as channel:
        try:
            status = head_pb2_grpc.HeadStub(channel).GetCluster(head_pb2.ClusterRequest(), timeout=ANSWER_S)
        except grpc.RpcError as error:
            raise UserError(call_trouble(error, head_node, credentials), EXIT_UNREACHABLE) from error
    check_length(prompt_tokens, answer_tokens, served(status).context, "the plan")
    return random_prompts(status.vocab_size, prompt_tokens)


def generate(
    stub: head_pb2_grpc.HeadStub,
    ask: Ask,
    num_tokens: int,
    request_id: str,
    replies: list[head_pb2.GenerateReply],
) -> str:
    """Greedy, of just so many tokens; why it failed, or an empty string."""
    request = head_pb2.GenerateRequest(
        request_id=request_id, trace_id=request_id, prompt=next(ask.prompts), max_tokens=num_tokens
    )
    call = stub.Generate(request, timeout=SILENT_S + num_tokens * SILENT_S)
    try:
        for reply in call:
            replies.append(reply)
            if ask.is_over.is_set():
                return "nobody waits for it any more"
    except grpc.RpcError as error:
        call_error = cast(grpc.Call, error)
        return call_error.details() or call_error.code().name.lower()
    finally:
        call.cancel()
    return ""


def count_tokens(replies: Sequence[head_pb2.GenerateReply]) -> int:
    """Of all of them."""
    return sum(len(reply.tokens) for reply in replies)


def as_json(found: dict[str, Any]) -> str:
    """One line: a file of many events is not read by people."""
    return json.dumps(found, separators=(",", ":"))
