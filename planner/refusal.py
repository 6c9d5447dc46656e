"""Why nothing fits, in numbers, and what would. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.cost import CostModel, Stage
from planner.kv_profile import KV_STEP_TOKENS
from planner.node_profile import GB
from planner.plan import Refusal
from planner.workload import Workload


def explain(cost: CostModel, stages: Sequence[Stage] | None, *, keeps_order: bool = False) -> Refusal:
    """The refusal for the split `stages`, which exceeds its budgets by the least in all.

    None: no legal split. keeps_order: of those in the order of the nodes.
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
    return Refusal(_reason(cost, over, missing_bytes), missing_bytes, _advice(cost, stages, missing_bytes))


def gb(nbytes: float) -> str:
    """Bytes as GB, or as MB below 0.1 GB, with three digits or more."""
    value = nbytes / GB
    if value >= 0.1:
        return f"{value:.1f} GB" if value >= 10 else f"{value:.2f} GB"
    return f"{value * 1e3:.1f} MB"


def _reason(cost: CostModel, over: Sequence[Stage], missing_bytes: int) -> str:
    model, work, num_layers = cost.model, cost.work, cost.model.num_layers
    users = "one request" if work.concurrency == 1 else f"{work.concurrency} requests"
    budget_bytes = sum(node.budget_bytes for node in cost.nodes if node.use)
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
            f"and its budget is {gb(node.budget_bytes)}"
        )
    return (
        f"{whole}, the budgets of the nodes add up to {gb(budget_bytes)}, and {gb(missing_bytes)} are missing"
    )


def _advice(cost: CostModel, stages: Sequence[Stage], missing_bytes: int) -> str:
    """One sentence; it names a context or concurrency only where this very split then fits."""
    work = cost.work
    more = (
        f"add a node with a budget of at least {gb(missing_bytes)}, or take a smaller or more quantised model"
    )
    if work.concurrency > 1 and _fits(cost, stages, Workload(work.context, 1)):
        most = largest(1, work.concurrency, lambda n: _fits(cost, stages, Workload(work.context, n)))
        return f"Lower --concurrency to {most}, or {more}."
    steps = work.context // KV_STEP_TOKENS
    if steps > 1 and _fits(cost, stages, Workload(KV_STEP_TOKENS, work.concurrency)):
        most = largest(
            1, steps, lambda n: _fits(cost, stages, Workload(n * KV_STEP_TOKENS, work.concurrency))
        )
        return f"Lower --context to {most * KV_STEP_TOKENS}, or {more}."
    return f"{more[0].upper()}{more[1:]}."


def _fits(cost: CostModel, stages: Sequence[Stage], work: Workload) -> bool:
    smaller = CostModel(cost.model, cost.nodes, (), work)
    return not any(smaller.overflow_bytes(s.index, s.start, s.stop) for s in stages)


def largest(low: int, high: int, is_fine: Callable[[int], bool]) -> int:
    """The largest number in [low, high) that is fine; `low` is."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_fine(middle) else (low, middle)
    return low
