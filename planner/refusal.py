"""Why nothing fits, in numbers, and the best remedy in a sentence. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from planner.cost import CostModel, Stage
from planner.fitting import Fitting
from planner.plan import Refusal
from planner.remedies import more_nodes, own_remedies
from planner.sizes import gb, lacking

__all__ = ["explain", "gb"]

UNPROVEN = "; not every order of the nodes could be tried, so one may fit after all"
SMALLER_MODEL = "take a smaller or more quantised model"


def explain(
    cost: CostModel,
    stages: Sequence[Stage] | None,
    legal_cuts: frozenset[int] | None = None,
    *,
    keeps_order: bool = False,
    is_least: bool = True,
    is_proven: bool = True,
) -> Refusal:
    """The refusal for the split `stages`, which exceeds its budgets by the least in all.

    None: no legal split. keeps_order: of those in the order of the nodes. is_least, is_proven: False where
    not every order was tried, and another one may exceed them by less, or even fit.
    """
    if stages is None:
        order = ", or the order of the nodes, which --keep-order keeps" if keeps_order else ""
        return Refusal(
            reason=f"no legal cut of {cost.model.name} fits the forced layers or the number of nodes{order}",
            missing_bytes=0,
            advice="Remove forced layers, or move them to a cut that is proven for this model.",
        )
    missing_bytes = sum(cost.overflow_bytes(s.index, s.start, s.stop) for s in stages)
    over = [s for s in stages if cost.overflow_bytes(s.index, s.start, s.stop)]
    fitting = Fitting(cost, legal_cuts, stages, keeps_order)
    reason = _reason(cost, over, missing_bytes, is_least=is_least)
    return Refusal(reason if is_proven else f"{reason}{UNPROVEN}", missing_bytes, _advice(fitting))


def _reason(cost: CostModel, over: Sequence[Stage], missing_bytes: int, *, is_least: bool) -> str:
    model, work, num_layers = cost.model, cost.work, cost.model.num_layers
    users = "one request" if work.concurrency == 1 else f"{work.concurrency} requests"
    used = [node for node in cost.nodes if node.use]
    budget_bytes = sum(node.budget_bytes for node in used)
    whole = (
        f"{model.name} needs {gb(cost.weight_bytes(0, num_layers))} for its weights and "
        f"{gb(cost.kv_bytes(0, num_layers))} for {users} of {work.context} tokens"
    )
    node = cost.nodes[over[0].index]
    if len(over) == 1 and node.layers is not None:
        stage = over[0]
        need_bytes = cost.need_bytes(stage.index, stage.start, stage.stop)
        return (
            f"{node.name} is forced to layers {stage.start}:{stage.stop}, which need {gb(need_bytes)}, "
            f"and its budget is {gb(node.budget_bytes)}: {lacking(missing_bytes)}"
        )
    budgets = (
        f"the budget of {used[0].name} is {gb(budget_bytes)}"
        if len(used) == 1
        else f"the budgets of the nodes add up to {gb(budget_bytes)}"
    )
    missing = lacking(missing_bytes, is_least=is_least)
    return f"{whole}, {budgets}, and {missing}{_where(cost, over, missing_bytes)}"


def _where(cost: CostModel, over: Sequence[Stage], missing_bytes: int) -> str:
    """The one node that is the matter: all others hold their layers, and it is less than a layer short."""
    stage = over[0]
    least_bytes = min(cost.layer_bytes(layer) for layer in range(stage.start, stage.stop))
    if len(over) > 1 or len(cost.nodes) == 1 or missing_bytes >= least_bytes:
        return ""
    return f" on {cost.nodes[stage.index].name}, for layers {stage.start}:{stage.stop}"


def _advice(fitting: Fitting) -> str:
    """One sentence: the remedy that loses least, a node that would do, and a smaller model."""
    best = next(own_remedies(fitting), None)
    node = next(more_nodes(fitting), None)
    orders = [remedy.text for remedy in (best, node) if remedy is not None] + [SMALLER_MODEL]
    words = ", or ".join(orders) if len(orders) > 1 else orders[0]
    return f"{words[0].upper()}{words[1:]}."
