"""The head's plan from its config and from what nodes told. Headers only; no MLX, no process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig, ConfigError, load_config
from cluster.kernel_times import told_times
from cluster.planning import Planning, plan_cluster
from planner.forced import ForcedLayersError
from planner.forms import FormSpan, FormTimes
from planner.model_profile import read_model_profile
from planner.planned_from import PlannedFrom
from proto import control_pb2
from tests.fake_models import llama_config, llama_tensors, write_model
from tests.node_process import write_cluster
from tests.tiny_models import write_checkpoint

MB = 10**6


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "llama", llama_config(5), llama_tensors(5))


def config_of(tmp_path: Path, model: Path, *nodes: dict[str, Any], **values: Any) -> ClusterConfig:
    places = [{"host": "127.0.0.1", "port": 5000 + i, **node} for i, node in enumerate(nodes)]
    return load_config(write_cluster(tmp_path, model, *places, **values))


def told(memory_gb: float, **values: Any) -> control_pb2.NodeProfile:
    nbytes = int(memory_gb * 10**9)
    return control_pb2.NodeProfile(name="told", memory_bytes=nbytes, ceiling_bytes=nbytes, **values)


def ranges(planning: Planning) -> list[tuple[int, int, int]]:
    assert planning.plan is not None
    return [(part.rank, part.start, part.stop) for part in planning.plan.assignments]


KNOWN = {"memory_gb": 16, "chip": "Apple M4"}


def test_nodes_that_the_file_describes_are_not_waited_for(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model, {**KNOWN, "layers": "0:4"}, {**KNOWN, "layers": "4:5"})
    planning = plan_cluster(config, model, {0: None, 1: None})
    assert ranges(planning) == [(0, 0, 4), (1, 4, 5)]
    assert planning.missing_ranks == ()
    assert "4:5" in planning.table


@pytest.mark.parametrize("open_node", [{}, {"memory_gb": 16}, {"chip": "Apple M4"}])
def test_a_node_with_open_values_is_waited_for(
    open_node: dict[str, Any], tmp_path: Path, model: Path
) -> None:
    config = config_of(tmp_path, model, KNOWN, open_node, {"use": False})
    planning = plan_cluster(config, model, {0: None, 1: None})
    assert planning.plan is None
    assert planning.missing_ranks == (1,)
    assert planning.refusal == ""
    assert plan_cluster(config, model, {0: None, 1: told(16, chip="Apple M4")}).plan is not None


def test_what_a_node_told_sets_its_budget(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model, {}, {"host": "10.0.0.2"}, strategy="memory_proportional", security={})
    planning = plan_cluster(config, model, {0: told(64), 1: told(16)})
    assert planning.plan is not None
    budgets = {part.rank: part.budget_bytes for part in planning.plan.assignments}
    assert budgets == {0: 57_600 * MB, 1: 14_000 * MB}  # less a tenth, at least 2 GB
    stages = {rank: stop - start for rank, start, stop in ranges(planning)}
    assert stages == {0: 4, 1: 1}


def test_the_same_values_give_the_same_plan(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model, {}, {"host": "10.0.0.2"})
    first, second = (plan_cluster(config, model, {0: told(64), 1: told(16)}) for _ in range(2))
    assert first.plan is not None
    assert first.plan == second.plan


def test_too_little_memory_is_a_refusal_with_numbers(tmp_path: Path, model: Path) -> None:
    planning = plan_cluster(config_of(tmp_path, model, {}), model, {0: told(0.0002)})
    assert planning.plan is None
    assert planning.missing_ranks == ()
    assert "MB are missing; add a node with a budget of at least " in planning.refusal


def test_layers_that_leave_a_gap_raise(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model, {**KNOWN, "layers": "0:2"}, {**KNOWN, "layers": "3:5"})
    with pytest.raises(ForcedLayersError, match=r"layers 2:3 are forced onto no node"):
        plan_cluster(config, model, {})


def test_broken_files_raise_with_their_name(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ConfigError, match=r"model\.safetensors is no safetensors file"):
        plan_cluster(config_of(tmp_path, model, KNOWN), model, {})


def test_the_speeds_that_a_node_told_take_the_tables_place(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model, {}, {"host": "10.0.0.2"}, security={})
    slow = control_pb2.Speeds(read_bytes_ms=1, flops_ms=1, measured_on="2026-11-21")
    both = {0: told(16, chip="Apple M4"), 1: told(16, chip="Apple M4")}
    assert ranges(plan_cluster(config, model, both)) == [(0, 0, 5)]
    both[0].speeds.CopyFrom(slow)
    planning = plan_cluster(config, model, both)
    assert ranges(planning) == [(1, 0, 5)]
    assert "note: the speeds of 127.0.0.1 were measured on 2026-11-21" in planning.table


def test_speeds_that_cannot_be_are_not_used(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path, model, {}, {"host": "10.0.0.2"}, security={})
    wrong = control_pb2.Speeds(read_bytes_ms=float("nan"), flops_ms=1, measured_on="2026-11-21")
    both = {0: told(16, chip="Apple M4", speeds=wrong), 1: told(16, chip="Apple M4")}
    planning = plan_cluster(config, model, both)
    assert ranges(planning) == [(0, 0, 5)]
    assert "were measured" not in planning.table
    assert "the speeds that rank 0 told are not used: read_bytes_ms = nan must be" in caplog.text


def test_the_times_of_kernels_that_a_node_told_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two equal nodes the second, far one has the faster kernels."""
    model = write_checkpoint("qwen3_moe", tmp_path / "model", num_layers=3)
    (form,) = read_model_profile(model).forms
    config = config_of(tmp_path, model, {}, {"host": "10.0.0.2"}, security={})
    both = {0: told(16, chip="Apple M4"), 1: told(16, chip="Apple M4")}
    assert ranges(plan_cluster(config, model, both)) == [(0, 0, 3)]
    for rank, ms in ((0, 5.0), (1, 0.1)):
        other = FormTimes(replace(form, top_k=form.top_k + 1), (FormSpan(1, 1, 1.0, 1.0),))
        found = FormTimes(form, (FormSpan(1, 1, ms, ms),))
        both[rank].forms.extend(told_times([other, found]))
    planning = plan_cluster(config, model, both)
    assert ranges(planning) == [(1, 0, 3)]
    assert "as the self-test of kernels timed them on 127.0.0.1, 10.0.0.2\n" in planning.table + "\n"
    (kept,) = PlannedFrom.from_plain(json.loads(planning.planned_from)).nodes[1].forms
    assert kept.form == form  # and no other model's
    both[0].forms[1].spans[0].first_ms = float("nan")
    planning = plan_cluster(config, model, both)
    assert "timed them on 10.0.0.2\n" in planning.table + "\n"
    message = "the times of kernels that rank 0 told are not used: first_ms = nan must be above 0"
    assert message in caplog.text
    elsewhere = config_of(
        tmp_path, model, {"chip": "Apple M1", "memory_gb": 16}, {"host": "10.0.0.2"}, security={}
    )
    assert "self-test" not in plan_cluster(elsewhere, model, {0: both[1], 1: told(16, chip="Apple M4")}).table


def test_measured_speeds_are_those_of_the_chip_that_the_file_names(tmp_path: Path, model: Path) -> None:
    slow = control_pb2.Speeds(read_bytes_ms=1, flops_ms=1, measured_on="2026-11-21")
    both = {0: told(16, chip="Apple M4", gpu_cores=10, speeds=slow), 1: None}
    for chip, stage in (("m4", (1, 0, 5)), ("Apple M4 Max", (0, 0, 5))):
        nodes = {"memory_gb": 16, "chip": chip}, {"host": "10.0.0.2", **KNOWN}
        config = config_of(tmp_path, model, *nodes, security={})
        assert ranges(plan_cluster(config, model, both)) == [stage]
