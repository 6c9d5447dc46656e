"""`plan-dry-run --json` on checkpoints of published sizes: what fits is placed, at the byte, and what is said
adds up. Bytes and decode times are reckoned from the tensors' shapes alone (tests/shaped_models.py).
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.dry_run import main
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_OK, EXIT_USAGE
from planner.chips import find_chip
from planner.cost import CostModel
from planner.kv_profile import PREFILL_CHUNK_TOKENS
from planner.model_profile import ModelProfile, read_model_profile
from planner.solver import OBJECTIVES, STRATEGIES
from planner.workload import Workload
from tests.fake_models import CHIPS, node
from tests.real_configs import REAL_CONFIGS
from tests.shaped_models import SHAPES, Shape, Shaped, write_shaped
from tests.tiny_models import write_checkpoint

GB = 10**9
NUM_SHORT, NUM_LONG = 3, 100  # cases for each checkpoint
HOST_HOPS, NODE_HOPS = (0.1, 20.0), (0.5, 10.0)  # ms, Gbit/s where the file says nothing


@dataclass(frozen=True)
class Checkpoint:
    shaped: Shaped
    profile: ModelProfile

    def need_bytes(self, start: int, stop: int, context: int, users: int) -> int:
        """Of a stage; its scratch alone is the planner's."""
        cost = CostModel(self.profile, [node(0, 1)], (), Workload(context, users))
        shaped = self.shaped
        return (
            shaped.weight_bytes(start, stop)
            + shaped.kv_bytes(start, stop, context, users)
            + cost.activation_bytes(0, start, stop)
        )


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    shape: Shape = request.param
    shaped = write_shaped(shape, tmp_path_factory.mktemp("shaped") / shape.name)
    return Checkpoint(shaped, read_model_profile(shaped.folder))


@dataclass
class Cluster:
    """A cluster file; budgets are exact bytes."""

    model: Path
    context: int = 4096
    users: int = 1
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)

    def add(self, budget_bytes: int, chip: str = "Apple M4", **more: Any) -> Cluster:
        """A node of which a plan may use exactly so much."""
        rank = len(self.nodes)
        memory_gb = 3 * budget_bytes / GB + 8  # its ceiling is above the cap
        cap_gb = (budget_bytes + 0.5) / GB  # no rounding down by a byte
        known = {"name": f"n{rank}", "host": f"n{rank}.local", "chip": chip, "memory_gb": memory_gb}
        self.nodes.append(known | {"max_memory_gb": cap_gb, "reserve_gb": 0} | more)
        self.budgets.append(budget_bytes)
        return self

    def link(self, a: int, b: int, **values: float) -> Cluster:
        self.links.append({"between": [f"n{a}", f"n{b}"], **values})
        return self

    def plan(self, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
        path = self.model.parent / "cluster.json"
        path.write_text(
            json.dumps(
                {
                    "model": str(self.model),
                    "context": self.context,
                    "concurrency": self.users,
                    "prefill_chunk": PREFILL_CHUNK_TOKENS,  # with a larger one a byte less would fit, too
                    "nodes": self.nodes,
                    "links": self.links,
                }
            )
        )
        code = main(["--config", str(path), "--json", *flags])
        return code, json.loads(capsys.readouterr().out)


def check(data: Mapping[str, Any], cluster: Cluster, shaped: Shaped) -> None:
    """A plan that fits: every number that can be known without the planner."""
    parts = data["assignments"]
    assert [p["start"] for p in parts] == [0, *(p["stop"] for p in parts[:-1])]
    assert parts[-1]["stop"] == data["num_layers"] == shaped.num_layers
    assert [p["stage"] for p in parts] == list(range(len(parts)))
    assert [p["embed"] for p in parts] == [True, *[False] * (len(parts) - 1)]
    assert [p["head"] for p in parts] == [*[False] * (len(parts) - 1), True]
    used = [p["rank"] for p in parts]
    assert len(set(used)) == len(used)
    assert data["unused_nodes"] == [n["name"] for i, n in enumerate(cluster.nodes) if i not in used]
    for p in parts:
        start, stop, one = p["start"], p["stop"], cluster.nodes[p["rank"]]
        assert one.get("use", True)
        assert p["weight_bytes"] == shaped.weight_bytes(start, stop)
        assert p["kv_bytes"] == shaped.kv_bytes(start, stop, cluster.context, cluster.users)
        assert p["budget_bytes"] == cluster.budgets[p["rank"]]
        assert p["weight_bytes"] + p["kv_bytes"] + p["activation_bytes"] <= p["budget_bytes"]
        read_bytes_ms = find_chip(one["chip"], None).bandwidth_gb_s * 1e6 * 0.7
        assert p["decode_ms"] == pytest.approx(
            shaped.decode_ms(start, stop, cluster.context, read_bytes_ms), rel=1e-6
        )
    hidden_bytes = 8 * _hidden_bytes(shaped)
    hops_ms = sum(_hop_ms(cluster, a, b, hidden_bytes) for a, b in itertools.pairwise(used))
    hops_ms += _hop_ms(cluster, 0, used[0], 0) + _hop_ms(cluster, used[-1], 0, 0)
    path_ms = sum(p["decode_ms"] for p in parts) + hops_ms
    assert data["predicted"]["decode_tok_s"] == pytest.approx(1e3 / path_ms, rel=1e-6)
    whole_bytes = shaped.weight_bytes(0, shaped.num_layers)
    largest_bytes = max(p["weight_bytes"] for p in parts)
    assert data["memory"] == {
        "full_model_bytes": whole_bytes,
        "largest_node_bytes": largest_bytes,
        "saved_bytes": whole_bytes - largest_bytes,
    }


def _hidden_bytes(shaped: Shaped) -> int:
    config = json.loads((shaped.folder / "config.json").read_text())
    return int(config["hidden_size"]) * (4 if shaped.shape.dtype == "F32" else 2)


def _hop_ms(cluster: Cluster, a: int, b: int, hidden_bits: int) -> float:
    if a == b:
        return 0.0
    is_local = cluster.nodes[a]["host"] == cluster.nodes[b]["host"]
    latency_ms, gbit_s = HOST_HOPS if is_local else NODE_HOPS
    for link in cluster.links:
        if set(link["between"]) == {f"n{a}", f"n{b}"}:
            latency_ms = link.get("latency_ms", latency_ms)
            gbit_s = link.get("bandwidth_gbit_s", gbit_s)
    return latency_ms + (hidden_bits + 8 * 256) / (gbit_s * 1e6)


def can_hold(checkpoint: Checkpoint, cluster: Cluster, first: tuple[int, int] | None) -> bool:
    """Whether any order of any nodes holds all layers; `first`: (rank, stop) of the forced first stage.

    In a given order each node may as well take all that it can hold.
    """
    free = [i for i, n in enumerate(cluster.nodes) if n.get("use", True) and (first is None or i != first[0])]
    num_layers = checkpoint.shaped.num_layers

    def holds(rank: int, start: int, stop: int) -> bool:
        need = checkpoint.need_bytes(start, stop, cluster.context, cluster.users)
        return need <= cluster.budgets[rank]

    if first is not None and not holds(first[0], 0, first[1]):
        return False
    for order in itertools.permutations(free):
        at = 0 if first is None else first[1]
        for rank in order:
            if at < num_layers and holds(rank, at, num_layers):
                at = num_layers
            elif at < num_layers:
                at = max([at, *(stop for stop in range(at + 1, num_layers) if holds(rank, at, stop))])
        if at == num_layers:
            return True
    return False


def random_cluster(rng: random.Random, checkpoint: Checkpoint) -> tuple[Cluster, list[str], Any]:
    """A cluster that just holds the model or just does not, flags, and what they force."""
    context, users = rng.choice([4096, 32_768]), rng.choice([1, 4])
    cluster = Cluster(checkpoint.shaped.folder, context, users)
    shares = [rng.uniform(0.3, 1.3) for _ in range(rng.randint(2, 4))]
    whole = checkpoint.need_bytes(0, checkpoint.shaped.num_layers, context, users)
    scale = whole * rng.choice([0.95, 1.05, 1.2, 2.0]) / sum(shares)
    for rank, share in enumerate(shares):
        more: dict[str, Any] = {"use": False} if rank and rng.random() < 0.15 else {}
        if rng.random() < 0.3:
            more |= {"host": "mini.local", "port": 50051 + rank}
        cluster.add(int(share * scale), rng.choice(CHIPS)[0], **more)
    for a, b in itertools.combinations(range(len(shares)), 2):
        if rng.random() < 0.4:
            cluster.link(a, b, latency_ms=rng.choice([0.05, 250.0]), bandwidth_gbit_s=rng.choice([1, 40]))
    flags = ["--strategy", rng.choice([*STRATEGIES, "optimal"]), "--objective", rng.choice(OBJECTIVES)]
    if rng.random() < 0.3:
        first = (0, rng.randint(1, checkpoint.shaped.num_layers // 2))
        return cluster, [*flags, "--layers", f"n0=0:{first[1]}"], first
    return cluster, flags, None


def check_random(seeds: Sequence[int], checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        cluster, flags, first = random_cluster(rng, checkpoint)
        usable = sum(n.get("use", True) for n in cluster.nodes)
        if first is not None and usable < 2:
            continue
        code, data = cluster.plan(capsys, *flags)
        assert data["fits"] == can_hold(checkpoint, cluster, first), seed
        if data["fits"]:
            assert code == EXIT_OK
            check(data, cluster, checkpoint.shaped)
            assert first is None or data["assignments"][0]["stop"] == first[1]
            continue
        assert code == EXIT_DOES_NOT_FIT
        assert data["refusal"]["missing_bytes"] > 0
        assert (data["assignments"], data["digest"], data["predicted"]) == ([], None, None)


def test_what_fits_is_placed_and_adds_up(checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    check_random(range(NUM_SHORT), checkpoint, capsys)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_what_fits_is_placed_on_hundreds(checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    check_random(range(100, 100 + NUM_LONG), checkpoint, capsys)


def test_memory_is_exact_at_the_byte(checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    """One node that holds all, and two of which each holds exactly its part."""
    folder, num_layers = checkpoint.shaped.folder, checkpoint.shaped.num_layers
    whole = checkpoint.need_bytes(0, num_layers, 4096, 1)
    code, data = Cluster(folder).add(whole).plan(capsys)
    assert code == EXIT_OK
    check(data, Cluster(folder).add(whole), checkpoint.shaped)
    code, data = Cluster(folder).add(whole - 1).plan(capsys)
    assert (code, data["refusal"]["missing_bytes"]) == (EXIT_DOES_NOT_FIT, 1)
    assert "the budget of n0 is" in data["refusal"]["reason"]
    assert data["refusal"]["reason"].endswith("and 1 byte is missing")
    cut = num_layers // 3
    needs = [checkpoint.need_bytes(0, cut, 4096, 1), checkpoint.need_bytes(cut, num_layers, 4096, 1)]
    flags = ("--layers", f"n0=0:{cut}", f"n1={cut}:{num_layers}")
    assert Cluster(folder).add(needs[0]).add(needs[1]).plan(capsys, *flags)[0] == EXIT_OK
    for short in (0, 1):
        cluster = Cluster(folder)
        for rank, need in enumerate(needs):
            cluster.add(need - (rank == short))
        code, data = cluster.plan(capsys, *flags)
        assert (code, data["refusal"]["missing_bytes"]) == (EXIT_DOES_NOT_FIT, 1)
        assert data["refusal"]["reason"].startswith(f"n{short} is forced to layers ")


@pytest.mark.long
@pytest.mark.parametrize("arch", REAL_CONFIGS)
def test_memory_is_exact_at_the_byte_for_every_architecture(
    arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what the plan itself says that the stages need."""
    folder = write_shaped(Shape(arch, "BF16", None, 0), tmp_path / arch).folder
    for users, num_nodes in ((1, 1), (4, 2)):
        roomy = Cluster(folder, users=users)
        for _ in range(num_nodes):
            roomy.add(10**14)
        code, data = roomy.plan(capsys, "--strategy", "uniform")
        assert code == EXIT_OK
        parts = data["assignments"]
        assert len(parts) == min(num_nodes, data["num_layers"])
        needs = {p["rank"]: p["weight_bytes"] + p["kv_bytes"] + p["activation_bytes"] for p in parts}
        flags = ("--layers", *(f"{p['node']}={p['start']}:{p['stop']}" for p in parts))
        for short in (None, *needs):
            cluster = Cluster(folder, users=users)
            for rank in range(num_nodes):
                cluster.add(needs[rank] - (rank == short))
            code, data = cluster.plan(capsys, *flags)
            if short is None:
                assert code == EXIT_OK
                continue
            assert (code, data["refusal"]["missing_bytes"]) == (EXIT_DOES_NOT_FIT, 1)
            assert data["refusal"]["reason"].startswith(f"n{short} is forced to layers ")


def test_a_node_behind_a_slow_link_is_used_only_where_it_must_be(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, num_layers = checkpoint.shaped.folder, checkpoint.shaped.num_layers
    half = checkpoint.need_bytes(num_layers // 2, num_layers, 4096, 1)

    def used(budget_bytes: int, latency_ms: float) -> set[int]:
        cluster = Cluster(folder).add(budget_bytes).add(budget_bytes)
        cluster.add(8 * half, "Apple M3 Ultra")  # the fastest, and it would hold all
        for near in (0, 1):
            cluster.link(near, 2, latency_ms=latency_ms)
        code, data = cluster.plan(capsys)
        assert code == EXIT_OK
        check(data, cluster, checkpoint.shaped)
        return {p["rank"] for p in data["assignments"]}

    roomy = checkpoint.need_bytes(0, num_layers, 4096, 1)
    assert 2 not in used(roomy, 5000.0)
    assert 2 in used(roomy, 0.05)
    assert 2 in used(half // 2, 5000.0)


def test_a_longer_context_moves_layers_or_is_refused_with_the_bytes(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fast node has room for all at 4k; at 128k it gives layers away, and alone it is refused."""
    shaped = checkpoint.shaped
    fast = checkpoint.need_bytes(0, shaped.num_layers, 4096, 1)
    layers = {}
    for context in (4096, 131_072):
        cluster = Cluster(shaped.folder, context).add(fast, "Apple M3 Ultra").add(20 * fast, "Apple M1")
        code, data = cluster.plan(capsys)
        assert code == EXIT_OK
        check(data, cluster, shaped)
        layers[context] = sum(p["stop"] - p["start"] for p in data["assignments"] if p["rank"] == 0)
    assert layers[4096] == shaped.num_layers
    assert layers[131_072] < shaped.num_layers
    code, data = Cluster(shaped.folder, 131_072).add(fast).plan(capsys)
    assert code == EXIT_DOES_NOT_FIT
    missing = checkpoint.need_bytes(0, shaped.num_layers, 131_072, 1) - fast
    assert data["refusal"]["missing_bytes"] == missing


def test_fewer_layers_than_nodes_leave_nodes_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster(write_checkpoint("llama", tmp_path / "m", num_layers=5))
    for _ in range(7):
        cluster.add(GB)
    for strategy in STRATEGIES:
        code, data = cluster.plan(capsys, "--strategy", strategy)
        assert code == EXIT_OK
        assert len(data["assignments"]) <= 5
        assert len(data["assignments"]) + len(data["unused_nodes"]) == 7
    assert main(["--config", str(tmp_path / "cluster.json")]) == EXIT_OK
    assert "would own no layers" in capsys.readouterr().out


# -- other forms of the file ------------------------------------------------------------------------------
def test_the_older_form_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint("llama", tmp_path / "m", num_layers=5)
    devices = [
        {
            "device_id": f"mini{i}",
            "hostname": f"mini{i}.local",
            "capabilities": {
                "memory_gb": 16,
                "gpu_cores": 10,
                "device_type": "mac_mini",
                "model": "Apple M4",
                "max_recommended_model_size_gb": 3 + i,
            },
        }
        for i in range(3)
    ]
    for key in ("devices", "device_list"):
        path = tmp_path / "old.json"
        path.write_text(json.dumps({"model_name": "m", "model_parallel_size": 3, key: devices}))
        code = main(["--config", str(path), "--json", "--strategy", "uniform"])
        data = json.loads(capsys.readouterr().out)
        assert code == EXIT_OK
        assert sorted(p["stop"] - p["start"] for p in data["assignments"]) == [1, 2, 2]
        assert [p["budget_bytes"] for p in data["assignments"]] == [GB, 2 * GB, 3 * GB]


def test_a_hostfile_is_planned_where_its_hosts_are_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint("llama", tmp_path / "m", num_layers=5)
    path = tmp_path / "hosts.json"
    hosts = [{"ssh": "localhost", "ips": ["127.0.0.1"]}]
    path.write_text(json.dumps(hosts))
    code = main(["--config", str(path), "--model", str(folder), "--json"])
    assert code == EXIT_OK
    assert len(json.loads(capsys.readouterr().out)["assignments"]) == 1
    path.write_text(json.dumps([*hosts, {"ssh": "far", "ips": ["192.0.2.1"]}]))
    assert main(["--config", str(path), "--model", str(folder), "--json"]) == EXIT_USAGE
    assert "memory_gb is missing" in capsys.readouterr().err
