"""What every strategy would make of the same cluster, to show beside the plan. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from planner.cost import CostModel, Link
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.optimal import RingSearch
from planner.plan import Plan, Predicted, Refusal
from planner.render import table
from planner.solver import (
    OBJECTIVES,
    STRATEGIES,
    PlanOptions,
    at_best_chunk,
    best_ring_of,
    predict,
    rings_of,
)

# Beyond them the other plans would take longer than the plan itself may.
QUICK_STEPS = 50_000_000  # of one search that is made without being asked for
QUICK_RING_STEPS = 10_000_000  # of one of the several that the best ring for an objective takes


@dataclass(frozen=True, slots=True)
class Compared:
    """One strategy's outcome. predicted: None where it does not fit."""

    strategy: str
    objective: str | None  # only `optimal` has one
    is_chosen: bool  # it is the plan's own
    fits: bool
    num_stages: int
    predicted: Predicted | None

    def as_dict(self) -> dict[str, Any]:
        """An entry of "strategies" in JSON."""
        return asdict(self)


def compare(
    chosen: Plan | Refusal,
    model: ModelProfile,
    nodes: Sequence[NodeProfile],
    links: Sequence[Link],
    options: PlanOptions,
    *,
    is_quick: bool,
) -> list[Compared]:
    """`optimal` for each objective and every other strategy; `chosen` is what the options gave.

    is_quick: without those whose search would take more than a fraction of a second.
    """
    cost = CostModel(model, nodes, links, options.work)
    rings = rings_of(cost, options)
    found = []
    for strategy, objective in (*(("optimal", o) for o in OBJECTIVES), *((s, None) for s in STRATEGIES[1:])):
        is_chosen = strategy == options.strategy and objective in (None, options.objective)
        if isinstance(chosen, Plan) and is_chosen:
            part = len(chosen.assignments), chosen.predicted
            found.append(Compared(strategy, objective, True, chosen.fits, *part))
        elif not isinstance(chosen, Plan) or not chosen.fits:  # none refuses what another would accept
            found.append(Compared(strategy, objective, is_chosen, False, 0, None))
        elif not is_quick or is_quickly_found(rings, strategy):
            asked = replace(options, strategy=strategy, objective=objective or options.objective)
            found.append(_compared(cost, rings, asked, objective, is_chosen=is_chosen))
    return found


def _compared(
    cost: CostModel, rings: RingSearch, asked: PlanOptions, objective: str | None, *, is_chosen: bool
) -> Compared:
    """A strategy's own row, with the chunk that its ring would have."""
    best = best_ring_of(rings, asked.strategy, asked.objective, is_even=asked.is_even)
    if best is None:
        return Compared(asked.strategy, objective, is_chosen, False, 0, None)
    made, best = at_best_chunk(cost, best, asked)
    predicted = predict(made, best.stages)
    return Compared(asked.strategy, objective, is_chosen, True, len(best.stages), predicted)


def is_quickly_found(rings: RingSearch, strategy: str) -> bool:
    """Whether a row costs so little that nobody has to ask for it."""
    is_ring = strategy == "optimal"
    return rings.num_steps(is_any_order=is_ring) <= (QUICK_RING_STEPS if is_ring else QUICK_STEPS)


def render_compared(rows: Sequence[Compared]) -> list[str]:
    """A table with a star at the plan's own row; no lines without rows."""
    return table(
        [
            {
                "strategy": row.strategy + (f" ({row.objective})" if row.objective else ""),
                "": "*" if row.is_chosen else "",
                "fits": "yes" if row.fits else "no",
                "decode tok/s": f"{row.predicted.decode_tok_s:.1f}" if row.predicted else "",
                "throughput tok/s": f"{row.predicted.throughput_tok_s:.1f}" if row.predicted else "",
                "first token s": f"{row.predicted.ttft_s:.2f}" if row.predicted else "",
                "stages": str(row.num_stages) if row.num_stages else "",
            }
            for row in rows
        ]
    )
