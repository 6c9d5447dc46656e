from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.model_profile import read_model_profile
from planner.planned_from import PlannedFrom
from planner.solver import PlanOptions, make_plan
from planner.speeds import FormatRate, Speeds
from tests.fake_models import llama_config, llama_tensors, node, write_model
from tests.random_clusters import random_case


def small(tmp_path: Path) -> PlannedFrom:
    model = read_model_profile(write_model(tmp_path / "m", llama_config(), llama_tensors()))
    speeds = Speeds(5e7, 1e9, formats=(FormatRate("affine4/64", 1e6, 2e9),), source="measured")
    nodes = (replace(node(0, 9), measured=speeds, layers=(0, 3)), node(1, 9, cap_bytes=5, use=False))
    return PlannedFrom(model, nodes, (), PlanOptions(512, legal_cuts=frozenset({3, 1})))


def plain(planned: PlannedFrom) -> Any:
    return json.loads(planned.to_json())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    planned = small(tmp_path)
    assert PlannedFrom.from_plain(plain(planned)) == planned


def test_the_same_plan_is_made_from_it() -> None:
    for case in range(20):
        cost = random_case(random.Random(50_000 + case), max_layers=6, max_nodes=4)
        options = PlanOptions(cost.work.context, cost.work.concurrency)
        planned = PlannedFrom(cost.model, cost.nodes, cost.links, options)
        read = PlannedFrom.from_plain(plain(planned))
        assert read == planned
        assert make_plan(read.model, read.nodes, read.links, read.options) == make_plan(
            cost.model, cost.nodes, cost.links, options
        )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("nodes",), {}, "planning.nodes must be a list"),
        (("nodes", 0), None, r"planning.nodes\[0\] must be an object"),
        (("nodes", 0, "rank"), "0", r"planning.nodes\[0\].rank = '0' must be of type int"),
        (("nodes", 0, "rank"), True, r"planning.nodes\[0\].rank = True must be of type int"),
        (("nodes", 0, "layers"), [1], r"planning.nodes\[0\].layers must have 2 entries"),
        (("nodes", 0, "device"), "tpu", r"planning.nodes\[0\].device = 'tpu' must be one of metal"),
        (("nodes", 0, "measured", "read_bytes_ms"), 0, "read_bytes_ms = 0.0 must be a number above 0"),
        (("options", "strategy"), "best", "strategy = 'best' must be one of"),
        (("model", "colour"), 1, "planning.model.colour is not known here: the ring runs another version"),
    ],
)
def test_what_is_none_is_named(tmp_path: Path, path: tuple[Any, ...], value: object, message: str) -> None:
    data = plain(small(tmp_path))
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        PlannedFrom.from_plain(data)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    data = plain(small(tmp_path))
    del data["model"]["layers"]
    with pytest.raises(
        ValueError, match=r"planning\.model\.layers is missing: the ring runs another version"
    ):
        PlannedFrom.from_plain(data)
    with pytest.raises(ValueError, match="planning must be an object"):
        PlannedFrom.from_plain(None)
