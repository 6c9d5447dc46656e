"""What a refusal says would help does, and a little less does not."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from planner.cost import CostModel
from planner.fitting import MIB, Fitting, do_fit, fits
from planner.headers import TensorHeader
from planner.kv_quant import KvQuantization
from planner.load_options import Quantization
from planner.model_profile import profile_model
from planner.node_profile import GB, NodeProfile, make_node
from planner.optimal import RingSearch
from planner.plan import Plan, Refusal
from planner.precision import convert
from planner.remedies import Remedy, mac_for, remedies
from planner.sizes import at_least, gb
from planner.solver import PlanOptions, make_plan
from planner.variants import Checkpoint
from planner.workload import Workload
from tests.brute_force import all_rings
from tests.fake_models import headers_of, llama_config, made_up_model, node
from tests.random_clusters import random_case, with_forced


def fitting_of(cost: CostModel, legal_cuts: frozenset[int] | None = None) -> Fitting:
    forced = {i: n.layers for i, n in enumerate(cost.nodes) if n.use and n.layers is not None}
    return Fitting(cost, legal_cuts, RingSearch(cost, legal_cuts, forced).least_overflow())


def refused(seed: int) -> tuple[CostModel, frozenset[int] | None] | None:
    """A random cluster on which nothing fits, some of its Macs with a GPU limit below their memory."""
    rng = random.Random(seed)
    cost = random_case(rng, max_layers=6, max_nodes=4)
    nodes = [
        replace(n, ceiling_bytes=n.ceiling_bytes * 2 // 3, reserve_bytes=n.memory_bytes // 10)
        if rng.random() < 0.4
        else n
        for n in cost.nodes
    ]
    cost = CostModel(cost.model, nodes, cost.links, cost.work)
    if rng.random() < 0.3:
        cost = with_forced(rng, cost)
    legal = None
    if rng.random() < 0.3 and not any(n.layers for n in cost.nodes):
        legal = frozenset(c for c in range(1, cost.model.num_layers) if rng.random() < 0.6)
    if fits(cost, legal) or not any(n.use for n in cost.nodes):
        return None
    return cost, legal


CASES = [case for case in map(refused, range(180)) if case is not None]


def has_plan(
    cost: CostModel,
    legal_cuts: frozenset[int] | None,
    *,
    nodes: list[NodeProfile] | None = None,
    work: Workload | None = None,
) -> bool:
    """By another way than the refusal's own: the best ring's."""
    work = work or cost.work
    options = PlanOptions(work.context, work.concurrency, legal_cuts=legal_cuts, rows=work.rows)
    return isinstance(make_plan(cost.model, nodes or cost.nodes, cost.links, options), Plan)


def test_less_work_fits_and_one_step_more_does_not() -> None:
    seen = 0
    for cost, legal in CASES:
        fitting, (context, users) = fitting_of(cost, legal), (cost.work.context, cost.work.concurrency)
        most = fitting.largest_context()
        seen += most > 0
        assert most % 256 == 0
        assert most < context
        assert not most or has_plan(cost, legal, work=Workload(most, users))
        assert not has_plan(cost, legal, work=Workload(most + 256, users))
        most = fitting.largest_concurrency()
        assert most < users
        assert not most or has_plan(cost, legal, work=Workload(context, most))
        assert not has_plan(cost, legal, work=Workload(context, most + 1))
    assert seen > 5


def test_a_node_more_is_enough_at_the_byte() -> None:
    for cost, legal in CASES:
        fitting, rank = fitting_of(cost, legal), len(cost.nodes)

        def with_new(budget_bytes: int, cost: CostModel = cost, rank: int = rank) -> list[NodeProfile]:
            return [*cost.nodes, replace(node(rank, 1), ceiling_bytes=budget_bytes)]

        need_bytes = fitting.new_node_budget_bytes()
        if need_bytes is None:
            assert not has_plan(cost, legal, nodes=with_new(10**15))
        else:
            assert has_plan(cost, legal, nodes=with_new(need_bytes))
            assert not has_plan(cost, legal, nodes=with_new(need_bytes - 1))
        num = fitting.num_more_nodes()
        if num is not None:
            like = replace(fitting.best_node, layers=None)
            more = [replace(like, rank=rank + n, name=f"m{n}", host=f"m{n}") for n in range(num)]
            assert has_plan(cost, legal, nodes=[*cost.nodes, *more])
            assert not has_plan(cost, legal, nodes=[*cost.nodes, *more[:-1]])


def test_raised_limits_are_the_least_that_fit_and_leave_the_reserve() -> None:
    seen = 0
    for cost, legal in CASES:
        limits = fitting_of(cost, legal).raised_limits_mib()
        raised = [
            replace(n, ceiling_bytes=limits[i] * MIB) if i in limits else n for i, n in enumerate(cost.nodes)
        ]
        seen += bool(limits)
        for i, mib in limits.items():
            assert raised[i].ceiling_bytes > cost.nodes[i].ceiling_bytes
            assert mib * MIB + cost.nodes[i].reserve_bytes <= cost.nodes[i].memory_bytes
        assert not limits or has_plan(cost, legal, nodes=raised)
        highest = [
            replace(n, ceiling_bytes=max(n.ceiling_bytes, (n.memory_bytes - n.reserve_bytes) // MIB * MIB))
            if [other.host for other in cost.nodes if other.use].count(n.host) == 1
            else n
            for n in cost.nodes
        ]
        high = CostModel(cost.model, highest, cost.links, cost.work)
        least_bytes = min(
            (
                sum(cost.overflow_bytes(s.index, s.start, s.stop) for s in ring)
                for ring in all_rings(high, legal)
                if do_fit(high, ring)
            ),
            default=None,
        )
        more_bytes = sum(raised[i].ceiling_bytes - cost.nodes[i].ceiling_bytes for i in limits)
        if least_bytes is None:
            assert not limits
        else:
            assert 0 <= more_bytes - least_bytes < MIB * len(limits)
    assert seen > 5


def test_the_sysctl_line_is_told_and_enough() -> None:
    """11 GB on a Mac of 16, of which its GPU may use 10.7 and the reserve is 2."""
    mini = make_node(0, "mini", "mini.local", memory_bytes=16 * GB, chip="Apple M4")
    model = made_up_model([GB] * 11)
    refusal = make_plan(model, [mini], (), PlanOptions(4096))
    assert isinstance(refusal, Refusal)
    found = re.search(r"on mini `sudo sysctl iogpu\.wired_limit_mb=(\d+)`", refusal.advice)
    assert found is not None
    assert "until the next reboot" in refusal.advice
    assert int(found[1]) == 12_399
    for mib, kind in ((12_399, Plan), (12_398, Refusal)):
        raised = replace(mini, ceiling_bytes=mib * MIB)
        assert isinstance(make_plan(model, [raised], (), PlanOptions(4096)), kind)


@pytest.mark.parametrize(
    "machine",
    [
        make_node(0, "box", "box", memory_bytes=16 * GB, chip="AMD EPYC", ceiling_bytes=10 * GB),
        make_node(0, "box", "box", memory_bytes=16 * GB, ceiling_bytes=10 * GB),
        make_node(0, "mini", "mini", memory_bytes=16 * GB, chip="Apple M4", cap_bytes=9 * GB),
        make_node(0, "mini", "mini", memory_bytes=12 * GB, chip="Apple M4"),
    ],
    ids=["no Mac", "unknown chip", "capped", "too small"],
)
def test_no_sysctl_line_where_it_would_not_help(machine: NodeProfile) -> None:
    refusal = make_plan(made_up_model([GB] * 11), [machine], (), PlanOptions(4096))
    assert isinstance(refusal, Refusal)
    assert "sysctl" not in refusal.advice


def test_a_cap_that_is_too_low_is_told() -> None:
    """The reserve of 2 GB counts within the cap."""
    mini = make_node(0, "mini", "mini", memory_bytes=16 * GB, chip="Apple M4", cap_bytes=8 * GB)
    refusal = make_plan(made_up_model([GB] * 8), [mini], (), PlanOptions(4096))
    assert isinstance(refusal, Refusal)
    assert refusal.advice.startswith("Raise max_memory_gb of mini to 10.1, or add a node")
    for cap_bytes, kind in ((10_100_000_000, Plan), (10_000_000_000, Refusal)):
        changed = replace(mini, cap_bytes=cap_bytes)
        assert isinstance(make_plan(made_up_model([GB] * 8), [changed], (), PlanOptions(4096)), kind)


def test_the_missing_bytes_are_those_of_the_best_split() -> None:
    for cost, legal in CASES:
        least = min(
            (
                sum(cost.overflow_bytes(s.index, s.start, s.stop) for s in ring)
                for ring in all_rings(cost, legal)
            ),
            default=0,
        )
        options = PlanOptions(cost.work.context, cost.work.concurrency, legal_cuts=legal)
        refusal = make_plan(cost.model, cost.nodes, cost.links, options)
        assert isinstance(refusal, Refusal)
        assert refusal.missing_bytes == least


def kinds_of(found: list[Remedy]) -> dict[str, Remedy]:
    kinds = {remedy.kind: remedy for remedy in found}
    assert len(kinds) == len(found)
    return kinds


def test_excluded_nodes_and_forced_layers_are_remedies() -> None:
    nodes = [node(0, 4, layers=(0, 5)), node(1, 4, use=False), node(2, 6), node(3, 9, use=False)]
    cost = CostModel(made_up_model([GB] * 9), nodes, (), Workload(256, 1))
    found = kinds_of(remedies(fitting_of(cost)))
    assert "forced_layers" not in found
    smaller = replace(cost.model, layers=cost.model.layers[:8])
    cost = CostModel(smaller, nodes, (), Workload(256, 1))
    text = kinds_of(remedies(fitting_of(cost)))["forced_layers"].text
    assert text == "let the planner choose the layers of n0"
    nodes = [replace(n, layers=None) for n in nodes]
    cost = CostModel(made_up_model([GB] * 11), nodes, (), Workload(256, 1))
    found = kinds_of(remedies(fitting_of(cost)))
    assert found["excluded_node"].text == "use n1 too, left out so far"
    cost = CostModel(made_up_model([GB] * 18), nodes, (), Workload(256, 1))
    assert kinds_of(remedies(fitting_of(cost)))["excluded_node"].values == {"nodes": ["n1", "n3"]}


def test_with_many_different_nodes_what_is_told_fits_too() -> None:
    nodes = [node(rank, 2 + rank / 50, f"Apple M{1 + rank % 4}") for rank in range(24)]
    cost = CostModel(made_up_model([GB] * 60, kv_token_bytes=1000), nodes, (), Workload(4096, 3))
    fitting = fitting_of(cost)
    assert not fitting.search.knows_least_overflow
    found = kinds_of(remedies(fitting))
    need_bytes = found["node"].values["budget_bytes"]
    assert has_plan(cost, None, nodes=[*nodes, replace(node(24, 1), ceiling_bytes=need_bytes)])
    assert "nodes" not in found
    assert not has_plan(cost, None)


# -- precision --------------------------------------------------------------------------------------------
CONFIG = llama_config(8, hidden_size=2048, head_dim=64, vocab_size=32000, max_position_embeddings=1 << 17)


def headers(dtype: str = "BF16") -> dict[str, TensorHeader]:
    """About 0.9 GB in bf16: eight layers of 96 MB, two tables of 131 MB."""
    shapes = {"self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (512, 2048), "mlp.up_proj": (8192, 2048)}
    shapes |= {"self_attn.v_proj": (512, 2048), "mlp.down_proj": (2048, 8192)}
    tensors = {f"model.layers.{i}.{n}.weight": (dtype, s) for i in range(8) for n, s in shapes.items()}
    tensors |= {f"{n}.weight": (dtype, (32000, 2048)) for n in ("model.embed_tokens", "lm_head")}
    return headers_of(tensors)


@pytest.mark.parametrize("budget_gb", [0.7, 0.5, 0.4, 0.3])
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_the_smallest_loss_of_precision_is_told(budget_gb: float, num_nodes: int) -> None:
    nodes = [node(rank, budget_gb / num_nodes) for rank in range(num_nodes)]
    plain = profile_model(CONFIG, headers(), "tiny")
    cost = CostModel(plain, nodes, (), Workload(512, 1))
    found = kinds_of(remedies(fitting_of(cost), Checkpoint(CONFIG, headers(), plain)))

    def is_enough(bits: int) -> bool:
        config, whole, options = convert(CONFIG, headers(), bits)
        model = profile_model(config, whole, "tiny", options)
        return isinstance(make_plan(model, nodes, (), PlanOptions(512)), Plan)

    enough = [bits for bits in (8, 6, 4, 3) if is_enough(bits)]
    assert ("precision" in found) == bool(enough)
    if enough:
        assert found["precision"].values["bits"] == enough[0]
        assert f'("load": {{"quantize": {{"bits": {enough[0]}}}}})' in found["precision"].text


def test_a_quantised_checkpoint_is_made_anew() -> None:
    config, whole, options = convert(CONFIG, headers(), 8)
    model = profile_model(config, whole, "tiny", options)
    packed = CONFIG | {"quantization": {"bits": 8, "group_size": 64}}
    cost = CostModel(model, [node(0, 0.4)], (), Workload(512, 1))
    assert options.quantize == Quantization(8, 64)
    found = kinds_of(remedies(fitting_of(cost), Checkpoint(packed, headers(), model)))
    assert "convert the original anew with mlx_lm.convert --quantize --q-bits 4" in found["precision"].text
    assert found["precision"].values["is_on_load"] is False


def test_caches_in_fewer_bits_are_told_where_the_model_has_them() -> None:
    plain = profile_model(CONFIG, headers(), "tiny")
    cost = CostModel(plain, [node(0, 4)], (), Workload(1 << 17, 2))
    found = kinds_of(remedies(fitting_of(cost), Checkpoint(CONFIG, headers(), plain)))
    bits = found["kv_bits"].values["kv_bits"]
    assert f'keep keys and values in {bits} bits ("load": {{"kv_bits": {bits}}})' in found["kv_bits"].text
    has_4_bits = Checkpoint(CONFIG, headers(), plain, KvQuantization(4))
    assert "kv_bits" not in kinds_of(remedies(fitting_of(cost), has_4_bits))


# -- words ------------------------------------------------------------------------------------------------
def test_what_is_enough_is_rounded_up() -> None:
    for nbytes in (1, 99_999, 2_350_001, 151_000_000, 1_001_000_000, 12_340_000_000, 99_999_999_999):
        number, unit = at_least(nbytes).split()
        assert float(number) * (GB if unit == "GB" else 10**6) >= nbytes * (1 - 1e-12)
        assert at_least(nbytes)[:3] in (gb(nbytes)[:3], at_least(nbytes)[:3])


def test_the_smallest_mac_that_would_do_is_named() -> None:
    assert [mac_for(n * GB) for n in (1, 8, 9, 40, 1000)] == [8, 16, 24, 64, None]


def test_the_advice_is_one_sentence() -> None:
    refusal = make_plan(made_up_model([GB] * 12), [node(0, 10.5), node(1, 1.5)], (), PlanOptions(4096))
    assert isinstance(refusal, Refusal)
    assert refusal.advice.count(".") == refusal.advice.count(" GB") + 1 or refusal.advice.endswith("model.")
    assert "dd a node with a budget of at least 1.01 GB, such as another Mac of 8 GB" in refusal.advice
