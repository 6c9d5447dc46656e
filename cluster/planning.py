"""The head's plan, from its config and from what the nodes measured of themselves. Pure but for headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.plan_inputs import plan_links, plan_nodes, plan_options, read_model
from cluster.proof import Prover
from cluster.proven_plan import ProvenPlan, make_proven_plan
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile, make_node
from planner.plan import Plan
from planner.render import render_plan
from planner.solver import make_plan
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
    config: ClusterConfig,
    model_dir: Path,
    told: Mapping[int, control_pb2.NodeProfile | None],
    prover: Prover | None = None,
) -> Planning:
    """Plan as soon as every used node is known: its memory and chip from the config, else what the node told.

    prover: proves the plan's cuts, which may take a while; None takes every cut for legal. Raises ConfigError
    for model files that cannot be read, ForcedLayersError (a ValueError) for ranges that do not tile
    the model, UserError for cuts that cannot be proven.
    """
    model = read_model(config, model_dir)
    measured = {rank: _measured(rank, profile) for rank, profile in told.items() if profile is not None}
    missing = tuple(
        n.rank
        for n in config.nodes
        if n.use and n.rank not in measured and (n.memory_gb is None or n.chip is None)
    )
    if missing:
        return Planning(model, missing_ranks=missing)
    nodes = plan_nodes(config, measured)
    wanted = (model, nodes, plan_links(config), plan_options(config, model))
    if prover is None:
        proven = ProvenPlan(make_plan(*wanted))
    else:
        proven = make_proven_plan(*wanted, prover, is_together=True)
    if isinstance(proven.result, Plan):
        return Planning(model, plan=proven.result, table=render_plan(proven.result, nodes, proven.notes))
    return Planning(model, refusal=f"{proven.result.reason}; {proven.result.advice}")


def _measured(rank: int, told: control_pb2.NodeProfile) -> NodeProfile:
    return make_node(
        rank,
        told.name,
        told.name,
        memory_bytes=told.memory_bytes,
        chip=told.chip or None,
        gpu_cores=told.gpu_cores or None,
        ceiling_bytes=told.ceiling_bytes or None,
        available_bytes=told.available_bytes or None,
    )
