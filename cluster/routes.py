"""Where a rank's frames go under a plan, and which edges it must accept. Pure values."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.ring import PROTOCOL
from planner.plan import Assignment, Plan
from proto import ring_pb2

HEAD_RANK = 0


@dataclass(frozen=True, slots=True)
class Edge:
    """One directed edge of the ring; the head's feed has start == stop."""

    from_rank: int
    to_rank: int
    start: int  # layers of the sending stage
    stop: int


@dataclass(frozen=True, slots=True)
class Route:
    """One rank's part in a plan."""

    rank: int
    assignment: Assignment | None
    output: Edge | None  # from this rank's stage to the next stage, or to the head
    feed: Edge | None  # from the head to the first stage
    incoming: tuple[Edge, ...]  # from other ranks

    @property
    def layers(self) -> tuple[int, int]:
        """[start, stop); (0, 0) for a rank without layers."""
        return (0, 0) if self.assignment is None else (self.assignment.start, self.assignment.stop)

    @property
    def outgoing(self) -> tuple[Edge, ...]:
        """Edges that leave this rank for another one, each a stream of its own."""
        return tuple(
            edge for edge in (self.feed, self.output) if edge is not None and edge.to_rank != self.rank
        )


def edges(plan: Plan) -> tuple[Edge, ...]:
    """Every edge: the head's feed, then each stage's output, the last one to the head."""
    stages = plan.assignments
    feed = Edge(HEAD_RANK, stages[0].rank, 0, 0)
    targets = [stage.rank for stage in stages[1:]] + [HEAD_RANK]
    outputs = tuple(
        Edge(stage.rank, target, stage.start, stage.stop)
        for stage, target in zip(stages, targets, strict=True)
    )
    return (feed, *outputs)


def route(plan: Plan, rank: int) -> Route:
    """The part of `rank`; a rank without layers has neither output nor assignment."""
    feed, *outputs = edges(plan)
    assignment = next((a for a in plan.assignments if a.rank == rank), None)
    output = next((e for e in outputs if e.from_rank == rank), None)
    incoming = tuple(e for e in (feed, *outputs) if e.to_rank == rank and e.from_rank != rank)
    return Route(rank, assignment, output, feed if rank == HEAD_RANK else None, incoming)


def hello(
    edge: Edge, *, config_digest: str, plan_digest: str, epoch: int, incarnation: int
) -> ring_pb2.Hello:
    """What opens the stream of `edge`."""
    return ring_pb2.Hello(
        protocol=PROTOCOL,
        config_digest=config_digest,
        plan_digest=plan_digest,
        epoch=epoch,
        from_rank=edge.from_rank,
        to_rank=edge.to_rank,
        start=edge.start,
        stop=edge.stop,
        incarnation=incarnation,
    )


def refusal(
    got: ring_pb2.Hello, mine: Route, *, config_digest: str, plan_digest: str, epoch: int
) -> str | None:
    """Why this HELLO does not belong to the present epoch of this rank, in one sentence; None if it does."""
    if got.config_digest != config_digest:
        return (
            f"rank {got.from_rank} runs with another config (digest {got.config_digest}, here "
            f"{config_digest}); copy one config to every node"
        )
    if got.epoch != epoch:
        return f"rank {got.from_rank} is in epoch {got.epoch}, this node in epoch {epoch}"
    if got.plan_digest != plan_digest:
        return f"rank {got.from_rank} has plan {got.plan_digest}, this node {plan_digest}"
    edge = Edge(got.from_rank, got.to_rank, got.start, got.stop)
    if edge not in mine.incoming:
        layers = f"{got.start}:{got.stop}"
        return f"rank {got.from_rank} with layers {layers} does not send to rank {mine.rank} in this plan"
    return None
