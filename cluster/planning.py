"""The head's plan: config and what the nodes measured of themselves, in; plan, refusal or missing ranks, out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.config import DEFAULT_CONTEXT, ClusterConfig, NodeConfig
from planner.cost import Link
from planner.model_profile import ModelProfile, read_model_profile
from planner.node_profile import GB, NodeProfile, make_node, share_machine
from planner.plan import Plan
from planner.render import render_plan
from planner.solver import PlanOptions, make_plan
from proto import control_pb2


@dataclass(frozen=True, slots=True)
class Planning:
    """What came out: a plan with its table, or the ranks still missing, or why it can never be."""

    model: ModelProfile
    plan: Plan | None = None
    table: str = ""
    missing_ranks: tuple[int, ...] = ()
    refusal: str = ""


def plan_cluster(
    config: ClusterConfig, model_dir: Path, measured: Mapping[int, control_pb2.NodeProfile | None]
) -> Planning:
    """Plan as soon as every used node's memory is known: from the config, else as the node measured it.

    Raises planner.headers.ModelFilesError for files that cannot be read, ForcedLayersError for ranges that do
    not tile the model.
    """
    model = read_model_profile(model_dir, config.model)
    used = [node for node in config.nodes if node.use]
    missing = tuple(n.rank for n in used if n.memory_gb is None and measured.get(n.rank) is None)
    if missing:
        return Planning(model, missing_ranks=missing)
    sharing = Counter(node.host for node in used if node.memory_gb is None)
    nodes = []
    for node in used:
        profile = _profile(node, measured.get(node.rank))
        num_sharing = sharing[node.host] if node.memory_gb is None else 1
        nodes.append(share_machine(profile, num_sharing) if num_sharing > 1 else profile)
    options = PlanOptions(
        context=config.context or min(DEFAULT_CONTEXT, model.max_context),
        concurrency=config.concurrency,
        strategy=config.strategy,
        objective=config.objective,
    )
    result = make_plan(model, nodes, _links(config), options)
    if isinstance(result, Plan):
        return Planning(model, plan=result, table=render_plan(result, nodes))
    return Planning(model, refusal=f"{result.reason}; {result.advice}")


def _profile(node: NodeConfig, measured: control_pb2.NodeProfile | None) -> NodeProfile:
    """What the config says, and where it is silent, what the node measured."""
    found = measured or control_pb2.NodeProfile()
    return make_node(
        node.rank,
        node.name,
        node.host,
        memory_bytes=int(node.memory_gb * GB) if node.memory_gb is not None else found.memory_bytes,
        chip=node.chip or found.chip or None,
        gpu_cores=node.gpu_cores or found.gpu_cores or None,
        ceiling_bytes=None if node.memory_gb is not None else found.ceiling_bytes or None,
        cap_bytes=None if node.max_memory_gb is None else int(node.max_memory_gb * GB),
        reserve_bytes=None if node.reserve_gb is None else int(node.reserve_gb * GB),
        layers=node.layers,
        available_bytes=found.available_bytes or None,
    )


def _links(config: ClusterConfig) -> list[Link]:
    ranks = {node.name: node.rank for node in config.nodes}
    return [
        Link(frozenset(ranks[name] for name in link.between), link.latency_ms, link.bandwidth_gbit_s)
        for link in config.links
    ]
