from __future__ import annotations

import pytest

from cluster.routes import HEAD_RANK, Edge, edges, hello, refusal, route
from planner.plan import Assignment, MemorySummary, Plan, Predicted
from proto import ring_pb2


def plan(*ranks: int) -> Plan:
    """A plan whose stage i is ranks[i] with one layer."""
    last = len(ranks) - 1
    return Plan(
        model="m",
        strategy="optimal",
        objective="latency",
        num_layers=len(ranks),
        context=8,
        concurrency=1,
        assignments=tuple(
            Assignment(r, f"n{r}", i, i, i + 1, i == 0, i == last, 1, 1, 1, 1, 9, 0.0, 0.0)
            for i, r in enumerate(ranks)
        ),
        unused_nodes=(),
        predicted=Predicted(1.0, 1.0, 1.0),
        memory=MemorySummary(1, 1, 0),
    )


def test_edges_go_once_round_and_back_to_the_head() -> None:
    assert edges(plan(2, 0, 1)) == (Edge(0, 2, 0, 0), Edge(2, 0, 0, 1), Edge(0, 1, 1, 2), Edge(1, 0, 2, 3))


def test_the_head_in_the_middle_has_two_outgoing_and_two_incoming_streams() -> None:
    mine = route(plan(2, 0, 1), HEAD_RANK)
    assert mine.outgoing == (Edge(0, 2, 0, 0), Edge(0, 1, 1, 2))
    assert mine.incoming == (Edge(2, 0, 0, 1), Edge(1, 0, 2, 3))
    assert mine.layers == (1, 2)


def test_a_single_stage_on_the_head_needs_no_stream() -> None:
    mine = route(plan(0), 0)
    assert mine.outgoing == ()
    assert mine.incoming == ()
    assert mine.output == Edge(0, 0, 0, 1)


def test_a_rank_without_layers_has_no_part() -> None:
    mine = route(plan(1, 2), 3)
    assert (mine.assignment, mine.output, mine.feed, mine.outgoing, mine.layers) == (
        None,
        None,
        None,
        (),
        (0, 0),
    )


def test_a_head_without_layers_still_feeds() -> None:
    mine = route(plan(1, 2), 0)
    assert mine.outgoing == (Edge(0, 1, 0, 0),)
    assert mine.incoming == (Edge(2, 0, 1, 2),)


SAME = {"config_digest": "c", "plan_digest": "p", "epoch": 4}


def opening(**changes: object) -> ring_pb2.Hello:
    got = hello(Edge(0, 1, 0, 1), incarnation=1, config_digest="c", plan_digest="p", epoch=4)
    for key, value in changes.items():
        setattr(got, key, value)
    return got


def test_the_expected_hello_is_accepted() -> None:
    assert refusal(opening(), route(plan(0, 1), 1), **SAME) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config_digest": "x"}, "another config"),
        ({"epoch": 3}, "is in epoch 3, this node in epoch 4"),
        ({"plan_digest": "x"}, "has plan x"),
        ({"from_rank": 5}, "rank 5 with layers 0:1 does not send to rank 1"),
        ({"stop": 2}, "with layers 0:2 does not send"),
    ],
)
def test_a_mismatch_is_refused_with_a_sentence(changes: dict[str, object], words: str) -> None:
    got = refusal(opening(**changes), route(plan(0, 1), 1), **SAME)
    assert got is not None
    assert words in got
