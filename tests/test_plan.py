from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from planner.node_profile import GB, make_node
from planner.plan import Plan
from planner.solver import PlanOptions, make_plan
from tests.fake_models import made_up_model

KEYS = {
    *(
        "model",
        "digest",
        "strategy",
        "objective",
        "fits",
        "num_layers",
        "context",
        "concurrency",
        "assignments",
    ),
    *("unused_nodes", "predicted", "memory", "refusal"),
}
ASSIGNMENT_KEYS = {
    *(
        "rank",
        "node",
        "stage",
        "start",
        "stop",
        "embed",
        "head",
        "weight_bytes",
        "kv_bytes",
        "activation_bytes",
    ),
    *("reserve_bytes", "budget_bytes", "decode_ms", "prefill_ms"),
}


def plan() -> Plan:
    nodes = [
        make_node(rank, f"n{rank}", "localhost", memory_bytes=8 * GB, chip="Apple M4") for rank in range(3)
    ]
    made = make_plan(made_up_model([GB] * 5), nodes, (), PlanOptions(1024, 2, "uniform"))
    assert isinstance(made, Plan)
    return made


def changed(**overrides: Any) -> str:
    data = plan().as_dict() | overrides
    return json.dumps(data)


def test_json_has_exactly_the_keys_of_the_design() -> None:
    data = json.loads(plan().to_json())
    assert set(data) == KEYS
    assert all(set(part) == ASSIGNMENT_KEYS for part in data["assignments"])
    assert set(data["predicted"]) == {"decode_tok_s", "ttft_s", "throughput_tok_s"}
    assert set(data["memory"]) == {"full_model_bytes", "largest_node_bytes", "saved_bytes"}
    assert (data["fits"], data["refusal"]) == (True, None)


def test_a_plan_survives_the_wire() -> None:
    assert Plan.from_json(plan().to_json()) == plan()


def test_the_digest_is_of_what_the_plan_decides() -> None:
    made = plan()
    first = made.assignments[0]
    faster = replace(made, assignments=(replace(first, decode_ms=1.0, budget_bytes=1), *made.assignments[1:]))
    assert faster.digest == made.digest
    assert replace(made, strategy="balanced").digest == made.digest
    assert replace(made, context=2048).digest != made.digest
    assert replace(made, assignments=(replace(first, rank=7), *made.assignments[1:])).digest != made.digest
    assert len(made.digest) == 16


def test_cuts_are_the_starts_of_later_stages() -> None:
    assert plan().cuts == tuple(a.start for a in plan().assignments[1:])


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        (1, {"start": 3}, "assignments.1. has layers 3:"),
        (1, {"stop": 1}, "assignments.1. has layers"),
        (0, {"start": 1}, "assignments.0. has layers 1:"),
        (2, {"stop": 6}, "end at layer 6, the model has 5"),
        (2, {"stop": 4}, "end at layer 4, the model has 5"),
        (1, {"embed": True}, "the first stage has the one embedding"),
        (0, {"embed": False}, "the first stage has the one embedding"),
        (1, {"head": True}, "the last the one head"),
        (2, {"head": False}, "the last the one head"),
        (1, {"rank": 0}, "a rank is assigned twice"),
        (1, {"stage": 2}, "assignments.1..stage = 2 must be 1"),
    ],
)
def test_a_plan_tiles_all_layers_once(stage: int, overrides: dict[str, Any], message: str) -> None:
    parts = list(plan().assignments)
    parts[stage] = replace(parts[stage], **overrides)
    if stage == 2 and overrides.get("stop") == 4:
        parts[1] = replace(parts[1], stop=3)
        parts[2] = replace(parts[2], start=3)
    with pytest.raises(ValueError, match=message):
        replace(plan(), assignments=tuple(parts))


def test_a_plan_without_assignments_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one assignment"):
        replace(plan(), assignments=())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a plan must be JSON"),
        ("[]", "the plan is malformed"),
        ("3", "the plan is malformed"),
        ("{}", "a plan needs the key model"),
        (changed(digest="0" * 16), "the plan says digest 0000000000000000"),
        (changed(num_layers="5"), "'5' must be int"),
        (changed(num_layers=True), "True must be int"),
        (changed(context=-1), "-1 must not be negative"),
        (changed(unused_nodes=[3]), "3 must be str"),
        (changed(assignments=[{"rank": 0}]), "the plan is malformed"),
        (changed(assignments=[1]), "the plan is malformed"),
        (changed(assignments=3), "3 must be list"),
        (changed(predicted=None), "the plan is malformed"),
        (changed(memory={"full_model_bytes": 1.5}), "1.5 must be int"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_frames_in_flight_keep_the_slowest_stage_busy() -> None:
    near = plan()
    assert near.frames_in_flight == 4
    slowest_ms = max(part.decode_ms for part in near.assignments)
    far = replace(near, predicted=replace(near.predicted, decode_tok_s=1e3 / (9.5 * slowest_ms)))
    assert far.frames_in_flight == 11
    dead = replace(near, predicted=replace(near.predicted, decode_tok_s=1e-9))
    assert dead.frames_in_flight == 1001
