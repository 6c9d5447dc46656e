"""The head's plan, from its config and from what the nodes measured of themselves. Pure but for headers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.kernel_times import read_times
from cluster.measured_speeds import MeasuredSpeeds
from cluster.plan_choices import AS_IN_FILE, PlanChoices, without_excluded
from cluster.plan_inputs import (
    kv_note,
    max_rows,
    plan_links,
    plan_nodes,
    plan_options,
    precision_note,
    read_model,
)
from cluster.proof import Prover
from cluster.proven_plan import ProvenPlan, make_proven_plan
from planner.cost import CostModel
from planner.draft_bytes import with_drafter
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile, make_node
from planner.plan import Plan
from planner.planned_from import PlannedFrom
from planner.prefill_chunk import PromptChunks, choose_chunks
from planner.render import render_plan
from planner.solver import make_plan
from planner.workload import Workload
from proto import control_pb2, head_pb2
from shard_loader.cut_proof import NO_ROWS, RowProof

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Planning:
    """What came out: a plan with its table, or the ranks still missing, or why it can never be."""

    model: ModelProfile
    plan: Plan | None = None
    table: str = ""
    missing_ranks: tuple[int, ...] = ()
    refusal: str = ""
    planned_from: str = ""  # PlannedFrom.to_json()
    predicted: dict[int, head_pb2.PredictedMemory] = field(default_factory=dict)  # by rank, of those planned
    rows: RowProof = NO_ROWS  # what may be done with sequences of the model
    chunks: PromptChunks = field(default_factory=PromptChunks)


def plan_cluster(
    config: ClusterConfig,
    model_dir: Path,
    told: Mapping[int, control_pb2.NodeProfile | None],
    prover: Prover | None = None,
    choices: PlanChoices = AS_IN_FILE,
    *,
    draft: ModelProfile | None = None,
) -> Planning:
    """Plan as soon as every used node is known: its memory and chip from the config, else what the node told.

    draft: the draft model's profile, which takes its bytes off rank 0's budget.
    prover: proves the plan's cuts, which may take a while; None takes every cut for legal. Raises ConfigError
    for model files that cannot be read, ForcedLayersError (a ValueError) for ranges that do not tile
    the model, UserError for cuts that cannot be proven.
    """
    config = without_excluded(config, choices.excluded)
    model = read_model(config, model_dir)
    measured = {rank: _measured(rank, profile) for rank, profile in told.items() if profile is not None}
    missing = tuple(
        n.rank
        for n in config.nodes
        if n.use and n.rank not in measured and (n.memory_gb is None or n.chip is None)
    )
    if missing:
        return Planning(model, missing_ranks=missing)
    links, options = plan_links(config), plan_options(config, model, choices)
    rows = NO_ROWS if prover is None else _rows(config, prover.rows())
    if prover is not None and not rows.batched:
        options = replace(options, max_rows=1)
    nodes = plan_nodes(config, measured, model)
    nodes = with_drafter(nodes, draft, options.context, options.concurrency)
    wanted = (model, nodes, links, options)
    if prover is None:
        proven = ProvenPlan(make_plan(*wanted))
    else:
        proven = make_proven_plan(*wanted, prover, is_together=True)
    plan = proven.result
    if not isinstance(plan, Plan):
        return Planning(model, refusal=plan.sentence)
    table = render_plan(plan, nodes, [*proven.notes, *kv_note(config), *precision_note(model)])
    planned_from = PlannedFrom(model, tuple(nodes), tuple(links), replace(options, legal_cuts=_legal(prover)))
    return Planning(
        model,
        plan=plan,
        table=table,
        planned_from=planned_from.to_json(),
        predicted=predicted_memory(model, nodes, plan),
        chunks=_chunks(config, CostModel(model, nodes, links, options.work), plan),
        rows=rows,
    )


def _rows(config: ClusterConfig, proof: RowProof) -> RowProof:
    """Of what is right for the model, what the config leaves."""
    shares = max_rows(config) > 1
    return replace(
        proof,
        batched=proof.batched and shares,
        read_together=proof.read_together and shares,
        forked=proof.forked and config.prefix_cache,
    )


def _chunks(config: ClusterConfig, cost: CostModel, plan: Plan) -> PromptChunks:
    """As configured, or as the plan has it, and chosen from it for company."""
    tokens = config.prefill_chunk
    return choose_chunks(cost, plan) if tokens is None else PromptChunks(tokens, tokens)


def _legal(prover: Prover | None) -> frozenset[int] | None:
    """The cuts that are known to be exact; None: not every cut was proven."""
    proofs = None if prover is None else prover.known(None)
    return None if proofs is None else frozenset(proof.cut for proof in proofs if proof.exact)


def told_nodes(
    config: ClusterConfig, told: Mapping[int, control_pb2.NodeProfile], model: ModelProfile
) -> list[NodeProfile]:
    """All nodes, from the config and from what they told. Raises ConfigError where that is too little."""
    return plan_nodes(config, {rank: _measured(rank, profile) for rank, profile in told.items()}, model)


def predicted_memory(
    model: ModelProfile, nodes: Sequence[NodeProfile], plan: Plan
) -> dict[int, head_pb2.PredictedMemory]:
    """What each stage should take, part by part, by the rank of its node."""
    cost = CostModel(model, nodes, (), Workload(plan.context, plan.concurrency))
    found = {}
    for part in plan.assignments:
        weights = cost.weights(part.start, part.stop)
        found[part.rank] = head_pb2.PredictedMemory(
            weights=control_pb2.Footprint(
                layers_bytes=weights.layers_bytes,
                embed_bytes=weights.embed_bytes,
                norm_bytes=weights.norm_bytes,
                head_bytes=weights.head_bytes,
                other_bytes=weights.other_bytes,
                full_model_bytes=plan.memory.full_model_bytes,
            ),
            kv_bytes=part.kv_bytes,
            activation_bytes=part.activation_bytes,
            budget_bytes=part.budget_bytes,
            reserve_bytes=part.reserve_bytes,
        )
    return found


def _measured(rank: int, told: control_pb2.NodeProfile) -> NodeProfile:
    node = make_node(
        rank,
        told.name,
        told.name,
        memory_bytes=told.memory_bytes,
        chip=told.chip or None,
        gpu_cores=told.gpu_cores or None,
        ceiling_bytes=told.ceiling_bytes or None,
        available_bytes=told.available_bytes or None,
    )
    try:
        node = replace(node, forms=read_times(told.forms))
    except ValueError as error:
        logger.warning("the times of kernels that rank %d told are not used: %s", rank, error)
    if not told.HasField("speeds"):
        return node
    try:
        found = MeasuredSpeeds.from_proto(told.speeds)
    except ValueError as error:
        logger.warning("the speeds that rank %d told are not used: %s", rank, error)
        return node
    return replace(node, measured=found.speeds, measured_on=found.measured_on)
