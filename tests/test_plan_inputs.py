from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig, ConfigError, load_config
from cluster.plan_choices import PlanChoices
from cluster.plan_inputs import kv_note, plan_links, plan_nodes, plan_options, read_model
from planner.cost import Link
from planner.node_profile import GB, make_node
from tests.fake_models import llama_config, llama_tensors, write_model

MEASURED = make_node(
    0,
    "here",
    "localhost",
    memory_bytes=24 * GB,
    chip="AMD EPYC",
    ceiling_bytes=20 * GB,
    available_bytes=5 * GB,
)


def config(folder: Path, *nodes: dict[str, Any], **overrides: Any) -> ClusterConfig:
    path = folder / "c.json"
    path.write_text(json.dumps({"model": "m", "nodes": list(nodes)} | overrides))
    return load_config(path)


def local(port: int, **values: Any) -> dict[str, Any]:
    return {"host": "127.0.0.1", "port": port, "name": f"n{port}"} | values


def test_what_the_file_gives_wins(tmp_path: Path) -> None:
    node = local(1, memory_gb=16, chip="Apple M4", gpu_cores=10, max_memory_gb=9, reserve_gb=1, layers="0:3")
    (made,) = plan_nodes(config(tmp_path, node), {0: MEASURED})
    assert (made.chip, made.gpu_cores, made.memory_bytes) == ("Apple M4", 10, 16 * GB)
    assert made.ceiling_bytes == int(16 * GB * 0.667)  # the measured one is another machine's
    assert (made.cap_bytes, made.reserve_bytes, made.layers) == (9 * GB, GB, (0, 3))
    assert (made.host, made.name, made.rank) == ("localhost", "n1", 0)


def test_a_measured_ceiling_is_that_of_the_memory_it_was_measured_with(tmp_path: Path) -> None:
    """16 GB on the box are 17.2 GB measured; the ceiling of that machine then counts."""
    measured = make_node(0, "", "", memory_bytes=16 << 30, chip="Apple M4", ceiling_bytes=12 * GB)
    (made,) = plan_nodes(config(tmp_path, local(1, memory_gb=16, chip="Apple M4")), {0: measured})
    assert (made.memory_bytes, made.ceiling_bytes, made.ceiling_source) == (16 * GB, 12 * GB, "measured")
    (made,) = plan_nodes(
        config(tmp_path, local(1, memory_gb=23)), {0: replace(MEASURED, ceiling_bytes=24 * GB)}
    )
    assert made.ceiling_bytes == 23 * GB


def test_what_the_file_leaves_open_is_measured(tmp_path: Path) -> None:
    (made,) = plan_nodes(config(tmp_path, local(1)), {0: MEASURED})
    assert (made.chip, made.memory_bytes, made.ceiling_bytes) == ("AMD EPYC", 24 * GB, 20 * GB)
    assert (made.available_bytes, made.num_sharing) == (5 * GB, 1)


def test_nodes_without_memory_share_their_machine(tmp_path: Path) -> None:
    entries = [
        local(1),
        local(2),
        local(3, memory_gb=16),
        local(4, use=False),
        {"host": "other", "memory_gb": 8},
    ]
    made = plan_nodes(config(tmp_path, *entries), dict.fromkeys(range(4), MEASURED))
    assert [n.num_sharing for n in made] == [2, 2, 1, 1, 1]
    assert [n.memory_bytes // GB for n in made[:3]] == [12, 12, 16]
    whole = plan_nodes(config(tmp_path, local(1)), {0: MEASURED})[0]
    assert made[0].budget_bytes + made[1].budget_bytes == pytest.approx(whole.budget_bytes)


def test_another_machine_needs_its_memory(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nodes\[1\]\.memory_gb is missing: far is another machine, so give"
    ):
        plan_nodes(config(tmp_path, local(1, memory_gb=8), {"host": "far"}), {})
    made = plan_nodes(config(tmp_path, local(1, memory_gb=8), {"host": "far", "use": False}), {})
    assert made[1].budget_bytes == 0


def test_links_are_between_ranks(tmp_path: Path) -> None:
    made = config(
        tmp_path,
        local(1),
        local(2),
        links=[{"between": ["n2", "n1"], "latency_ms": 2, "bandwidth_gbit_s": 1}],
    )
    assert plan_links(made) == [Link(frozenset((0, 1)), 2.0, 1.0)]


@pytest.mark.parametrize(
    ("asked", "own", "context"), [(None, 4096, 4096), (None, 40960, 8192), (99999, 4096, 99999)]
)
def test_the_context_is_by_default_the_smaller_of_8192_and_the_models(
    tmp_path: Path, asked: int | None, own: int, context: int
) -> None:
    folder = write_model(tmp_path / "m", llama_config(max_position_embeddings=own), llama_tensors())
    cluster = config(tmp_path, local(1), context=asked, concurrency=3, strategy="uniform", objective="ttft")
    options = plan_options(cluster, read_model(cluster, folder), PlanChoices(is_forced=True))
    assert (options.context, options.concurrency, options.is_forced) == (context, 3, True)
    assert (options.strategy, options.objective) == ("uniform", "ttft")


def test_broken_model_files_are_a_usage_error(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", llama_config(), llama_tensors())
    (folder / "model.safetensors").write_bytes(b"123")
    with pytest.raises(ConfigError, match="is truncated"):
        read_model(config(tmp_path, local(1)), folder)


def test_quantised_caches_are_planned_with(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", llama_config(5) | {"head_dim": 64}, llama_tensors(5))
    plain, quantised = config(tmp_path, local(1)), config(tmp_path, local(1), load={"kv_bits": 4})
    before, after = read_model(plain, model), read_model(quantised, model)
    assert after.layers[0].cache.token_bytes == before.layers[0].cache.token_bytes * (0.5 + 4 / 64) / 2
    assert kv_note(plain) == []
    assert kv_note(quantised) == ["note: keys and values in 4 bits, groups of 64"]
    assert plain.digest != quantised.digest


def test_caches_that_cannot_be_quantised_are_a_config_error(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", llama_config(5) | {"head_dim": 80}, llama_tensors(5))
    with pytest.raises(ConfigError, match=r"load\.kv_bits = 4: the heads of .* have 80 elements, which are"):
        read_model(config(tmp_path, local(1), load={"kv_bits": 4}), model)
