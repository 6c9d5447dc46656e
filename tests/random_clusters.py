"""Seeded small clusters on which a model just fits, or just does not."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from planner.cost import CostModel, Link, Stage
from planner.node_profile import GB, NodeProfile
from planner.plan import Plan
from planner.speeds import FormatRate, Speeds
from planner.workload import Workload
from tests.fake_models import CHIPS, made_up_model, node


def batches(num: int, num_short: int) -> list[object]:
    """Seeds of batches, of which the first few are in the short run."""
    return [pytest.param(i, marks=[] if i < num_short else [pytest.mark.long]) for i in range(num)]


def random_case(rng: random.Random, max_layers: int, max_nodes: int) -> CostModel:
    """A small cluster on which a model just fits, or just does not; some of its nodes are alike."""
    num_layers, num_nodes = rng.randint(1, max_layers), rng.randint(1, max_nodes)
    is_even = rng.random() < 0.3
    model = made_up_model(
        [GB // 2 if is_even else rng.randint(1, 12) * GB // 10 for _ in range(num_layers)],
        embed_bytes=rng.randint(0, 10) * GB // 10,
        head_bytes=rng.randint(0, 10) * GB // 10,
        is_tied=rng.random() < 0.3,
        kv_token_bytes=rng.choice([0, 1000, 20000]),
    )
    work = Workload(rng.choice([256, 4096, 16384]), rng.choice([1, 3, 8]), rng.choice([1, 1, 4]))
    need_gb = CostModel(model, [node(0, 1)], (), work).need_bytes(0, 0, num_layers) / GB
    shares = [rng.random() + 0.3 for _ in range(num_nodes)]
    scale = need_gb * rng.choice([0.9, 1.1, 1.2, 1.3, 1.5, 2.0, 8.0]) / sum(shares)
    nodes = [random_node(rng, rank, share * scale) for rank, share in enumerate(shares)]
    for i in range(1, num_nodes):
        if rng.random() < 0.3:  # the same machine once more
            nodes[i] = replace(nodes[rng.randrange(i)], rank=i, name=f"n{i}", host=f"host{i}")
    if rng.random() < 0.2:
        nodes[-1] = replace(nodes[-1], host=nodes[0].host)
    links = [
        Link(frozenset(pair), rng.choice([0.05, 0.5, 5.0, 250.0]), rng.choice([0.1, 10.0]))
        for pair in itertools.combinations(range(num_nodes), 2)
        if rng.random() < 0.5
    ]
    return CostModel(model, nodes, links, work)


def with_forced(rng: random.Random, cost: CostModel) -> CostModel:
    """The case with one or two nodes forced to layers, where they leave no gap that nobody may fill."""
    num_layers, nodes = cost.model.num_layers, list(cost.nodes)
    links = list(cost.links)
    usable = [i for i, n in enumerate(nodes) if n.use]
    if len(usable) < 4 or num_layers < 4:
        return cost
    cuts = sorted(rng.sample(range(num_layers + 1), 4))
    chosen = rng.sample(usable, rng.randint(1, 2))
    for i, part in zip(chosen, [(cuts[0], cuts[1]), (cuts[2], cuts[3])], strict=False):
        nodes[i] = replace(nodes[i], layers=part)
    gaps = len(chosen) + 1
    return cost if len(usable) - len(chosen) < gaps else CostModel(cost.model, nodes, links, cost.work)


def stages_of(plan: Plan, cost: CostModel) -> list[Stage]:
    index = {n.rank: i for i, n in enumerate(cost.nodes)}
    return [Stage(index[a.rank], a.start, a.stop) for a in plan.assignments]


def random_node(rng: random.Random, rank: int, budget_gb: float) -> NodeProfile:
    chip, cores = rng.choice(CHIPS)
    measured = random_speeds(rng) if rng.random() < 0.3 else None
    return node(rank, budget_gb, chip, gpu_cores=cores, use=rng.random() < 0.9, measured=measured)


def random_speeds(rng: random.Random) -> Speeds:
    """Measured speeds, at times bound by arithmetic in decode; "" is the format of made-up models."""
    read_bytes_ms = 10 ** rng.uniform(7, 9)
    rate = FormatRate("", read_bytes_ms / 2 * rng.uniform(0.3, 3), 10 ** rng.uniform(9, 10))
    return Speeds(
        read_bytes_ms=read_bytes_ms,
        flops_ms=10 ** rng.uniform(9, 10),
        layer_ms=rng.choice([0.0, 0.1]),
        stage_ms=rng.uniform(0, 1),
        formats=(rate,) if rng.random() < 0.5 else (),
        source="measured",
    )
