"""The best plan of which every cut is proven exact; the same for plan-dry-run and for the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.errors import EXIT_ERROR, UserError
from cluster.proof import Prover
from planner.cost import Link
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.plan import Plan, Refusal
from planner.refusal import gb
from planner.solver import PlanOptions, make_plan
from shard_loader.cut_proof import CutProof


@dataclass(frozen=True, slots=True)
class ProvenPlan:
    """A plan, or why there is none, with sentences about cuts that it would rather have had."""

    result: Plan | Refusal
    notes: tuple[str, ...] = ()
    legal_cuts: frozenset[int] | None = None  # that are known, if not every cut is; no others were needed


def make_proven_plan(
    model: ModelProfile,
    nodes: Sequence[NodeProfile],
    links: Sequence[Link],
    options: PlanOptions,
    prover: Prover,
    *,
    is_together: bool,
) -> ProvenPlan:
    """The plan that would be best if every cut were legal, where its cuts are; else the best of legal cuts.

    is_together: prove the plan's own stages, not only every cut of the model in stages of one layer. Raises
    UserError for a plan whose cuts cannot be proven, ForcedLayersError as `make_plan`.
    """
    best = make_plan(model, nodes, links, options)
    if isinstance(best, Refusal) and (cuts := legal_cuts(prover)) is not None:
        best = make_plan(model, nodes, links, replace(options, legal_cuts=cuts))
    if isinstance(best, Refusal) or not best.cuts:
        return ProvenPlan(best, (), legal_cuts(prover))
    proofs = _proofs(prover, best.cuts, is_together)
    bad = [proof for proof in proofs if not proof.exact]
    if not bad or prover.is_stopped:
        return ProvenPlan(best, (), legal_cuts(prover))
    every = prover.prove(None)
    if prover.is_stopped:
        return ProvenPlan(best)
    legal = frozenset(proof.cut for proof in every if proof.exact)
    other = make_plan(model, nodes, links, replace(options, legal_cuts=legal))
    if isinstance(other, Refusal):
        return ProvenPlan(_refused(model, best, bad, legal, other), (), legal)
    _check(_proofs(prover, other.cuts, is_together) if other.cuts else [])
    return ProvenPlan(other, (_note(best, bad, other),), legal)


def legal_cuts(prover: Prover) -> frozenset[int] | None:
    """The cuts that are exact, where some are known not to be; None: as far as is known, all are."""
    known = prover.known(None)
    if known is None or all(proof.exact for proof in known):
        return None
    return frozenset(proof.cut for proof in known if proof.exact)


def _proofs(prover: Prover, cuts: Sequence[int], is_together: bool) -> list[CutProof]:
    """One proof for each of the cuts; what was not proven is not exact."""
    proofs = prover.prove(cuts if is_together else None)
    found = {proof.cut: proof for proof in proofs}
    why = next((proof.reason for proof in proofs if not proof.exact), "it was not proven")
    return [found.get(cut) or CutProof(cut, False, None, why) for cut in cuts]


def _check(proofs: Sequence[CutProof]) -> None:
    bad = [proof for proof in proofs if not proof.exact]
    if bad:
        raise UserError(
            f"this plan cuts the model where it is not exact ({_reasons(bad)}); plan other layers", EXIT_ERROR
        )


def _reasons(bad: Sequence[CutProof]) -> str:
    """One entry for each reason, with its layers."""
    layers: dict[str, list[int]] = {}
    for proof in bad:
        layers.setdefault(proof.reason, []).append(proof.cut)
    return "; ".join(
        f"before layer{'s' * (len(cuts) > 1)} {', '.join(map(str, cuts))}: {reason}"
        for reason, cuts in layers.items()
    )


def _note(best: Plan, bad: Sequence[CutProof], other: Plan) -> str:
    faster = best.predicted.decode_tok_s / other.predicted.decode_tok_s - 1
    gain = f", which would be {faster:.0%} faster," if faster >= 0.005 else ""
    return f"note: the best plan without proofs{gain} has cuts that are not exact ({_reasons(bad)})"


def _refused(
    model: ModelProfile, best: Plan, bad: Sequence[CutProof], legal: frozenset[int], refusal: Refusal
) -> Refusal:
    where = f"only before layers {', '.join(map(str, sorted(legal)))}" if legal else "nowhere"
    reason = f"{model.name} can be cut {where} ({_reasons(bad)}), and so it has no plan"
    if not legal:
        reason += f": one node must hold it whole, {gb(best.memory.full_model_bytes)} and its KV"
    return Refusal(reason, refusal.missing_bytes, refusal.advice)
