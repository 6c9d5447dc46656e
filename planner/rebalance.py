"""What a new plan would gain over the present one, by what the running ring measured of itself. Pure.

Both plans are priced alike, with the measured speeds and hops. A gain below 3 % is none: the next measurement
could ask for the opposite. For the same reason no layers are advised to a node of which nothing was measured:
slow in fact, it would lose them again, and then look as fast as before. What it might bring is told beside.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from planner.cost import CostModel, Link, Stage
from planner.measured import (
    StageFactor,
    StageTimes,
    measured_links,
    measured_nodes,
    median_factor,
    stage_factor,
    stages_of,
)
from planner.node_profile import NodeProfile
from planner.plan import Plan, Refusal
from planner.planned_from import PlannedFrom
from planner.solver import PlanOptions, make_plan

MIN_GAIN = 0.03
MAX_GROWTH = 2  # times the layers that a node measured, up to which its own measurements say enough

Verdict = Literal["leave", "uncertain", "replan"]


class NoAdviceError(ValueError):
    """The present plan cannot be priced; one sentence."""


@dataclass(frozen=True, slots=True)
class Move:
    """What a node would have to load that it does not hold, and what it would free."""

    rank: int
    node: str
    old: tuple[int, int] | None  # layers [start, stop); None: none
    new: tuple[int, int] | None
    load_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Hop:
    """One way between two ranks of the present ring, in ms."""

    from_rank: int
    to_rank: int
    expected_ms: float
    measured_ms: float | None  # None: not measured, so the expected one counts


@dataclass(frozen=True, slots=True)
class Advice:
    """Both plans by what was measured, and what to do. Gains are shares: 0.1 is 10 % less time."""

    verdict: Verdict
    objective: str
    gain: float
    low_gain: float  # if the stages' p25 and p75 steps are what they really take, at worst
    high_gain: float
    present: Plan
    best: Plan
    stages: tuple[StageFactor, ...]
    hops: tuple[Hop, ...]
    moves: tuple[Move, ...]  # where anything changes
    nodes: tuple[NodeProfile, ...]  # with the speeds that the plans are priced with
    unmeasured: tuple[str, ...]  # nodes in use that have no layers, and no speeds measured before
    freed: tuple[str, ...]  # nodes whose layers the config forces, and the best plan does not
    is_kept: bool = False  # layers are forced, and stay where they are
    untested: Plan | None = None  # a better plan, if the unmeasured nodes are as fast as it takes them to be
    untested_gain: float = 0.0


def advise(
    planned: PlannedFrom,
    present: Plan,
    times: Mapping[int, StageTimes],
    hops: Mapping[tuple[int, int], Sequence[float]],
    *,
    objective: str | None = None,
    keeps_forced: bool = False,
) -> Advice:
    """The advice for a ring that was planned so and has measured this, by rank.

    keeps_forced: layers that the config forces stay where they are. Raises TooFewStepsError and MeasuresError
    for what was measured, NoAdviceError where the present plan does not fit its own budgets.
    """
    options = replace(planned.options, strategy="optimal", objective=objective or planned.options.objective)
    by_rank = {node.rank: node for node in planned.nodes}
    found = tuple(
        stage_factor(planned.model, by_rank[part.rank], part, times.get(part.rank, StageTimes()))
        for part in present.assignments
    )
    price = _Price(planned, found, measured_links(planned.links, hops), options)
    nodes = price.cost().nodes
    old = price.plan(_forced(nodes, present), legal_cuts=None)
    if isinstance(old, Refusal):
        raise NoAdviceError(f"the present plan exceeds the budgets that it was made for: {old.reason}")
    free = nodes if keeps_forced else [replace(node, layers=None) for node in nodes]
    known = {one.rank for one in found} | {n.rank for n in planned.nodes if n.speeds.source == "measured"}
    best = price.better([replace(node, use=node.use and node.rank in known) for node in free], old)
    gain = price.gain(old, best)
    low, high = price.bounds(old, best)
    untested = price.better(free, best) if gain < MIN_GAIN else best
    is_worth_a_try = untested is not best and price.gain(old, untested) >= MIN_GAIN
    return Advice(
        verdict="leave" if gain < MIN_GAIN else "uncertain" if low < MIN_GAIN else "replan",
        objective=options.objective,
        gain=gain,
        low_gain=min(low, gain),
        high_gain=max(high, gain),
        present=old,
        best=best,
        stages=found,
        hops=_hops(planned, price.links, hops, old),
        moves=_moves(price.cost(), old, best),
        nodes=tuple(nodes),
        unmeasured=tuple(node.name for node in nodes if node.use and node.rank not in known),
        freed=tuple(node.name for node in nodes if node.layers is not None and not keeps_forced),
        is_kept=keeps_forced and any(node.layers is not None for node in nodes),
        untested=untested if is_worth_a_try else None,
        untested_gain=price.gain(old, untested) if is_worth_a_try else 0.0,
    )


@dataclass(frozen=True, slots=True)
class _Price:
    """Prices rings with the measured speeds, or with others within their spread."""

    planned: PlannedFrom
    found: tuple[StageFactor, ...]
    links: list[Link]
    options: PlanOptions

    def cost(self, factors: Mapping[int, float] | None = None, chunk_tokens: int = 0) -> CostModel:
        """chunk_tokens: of a plan, which count where its first token does."""
        nodes, work = measured_nodes(self.planned.nodes, self.found, factors), self.options.work
        work = replace(work, chunk_tokens=chunk_tokens or work.chunk_tokens)
        return CostModel(self.planned.model, nodes, self.links, work)

    def plan(self, nodes: Sequence[NodeProfile], **options: Any) -> Plan | Refusal:
        return make_plan(self.planned.model, nodes, self.links, replace(self.options, **options))

    def better(self, nodes: Sequence[NodeProfile], than: Plan) -> Plan:
        """The best plan of these nodes, or `than` where it is no better."""
        best = self.plan(nodes)
        return best if isinstance(best, Plan) and self.gain(than, best) > 0 else than

    def gain(self, old: Plan, new: Plan) -> float:
        """The share of time that the objective gains."""
        objective = self.options.objective
        return _value(old, objective) / _value(new, objective) - 1

    def bounds(self, old: Plan, new: Plan) -> tuple[float, float]:
        """The gain when the nodes that would do less are as fast as their p25 steps, and those that would do
        more as slow as their p75; and the other way round."""
        cost = self.cost()
        before, after = stages_of(old.assignments, cost.nodes), stages_of(new.assignments, cost.nodes)
        less = {}
        for one in self.found:
            index = next(i for i, node in enumerate(cost.nodes) if node.rank == one.rank)
            less[one.rank] = _own_ms(cost, after, index) < _own_ms(cost, before, index)
        worst = {one.rank: one.low if less[one.rank] else one.high for one in self.found}
        for one in self.found:  # from few layers to many is a far cry: what nodes like it showed counts too
            stages = [s for s in after if cost.nodes[s.index].rank == one.rank]
            if stages and stages[0].stop - stages[0].start > MAX_GROWTH * (one.stop - one.start):
                worst[one.rank] = max(worst[one.rank], median_factor(cost.nodes, self.found, one.rank))
        luckiest = {one.rank: one.high if less[one.rank] else one.low for one in self.found}
        rings = (before, old.chunk_tokens), (after, new.chunk_tokens)
        return self._gain_by(worst, *rings), self._gain_by(luckiest, *rings)

    def _gain_by(self, factors: Mapping[int, float], *rings: tuple[list[Stage], int]) -> float:
        """rings: before and after, with the tokens of their chunks."""
        objective = self.options.objective
        before, after = (_ring_ms(self.cost(factors, n), stages, objective) for stages, n in rings)
        return before / after - 1


def _own_ms(cost: CostModel, stages: Sequence[Stage], index: int) -> float:
    return sum(cost.decode_ms(s.index, s.start, s.stop) for s in stages if s.index == index)


def _ring_ms(cost: CostModel, stages: list[Stage], objective: str) -> float:
    match objective:
        case "latency":
            return cost.path_ms(stages)
        case "throughput":
            return 1e3 / cost.throughput_tok_s(stages)
        case _:
            return cost.ttft_ms(stages)


def _value(plan: Plan, objective: str) -> float:
    """What the objective makes small."""
    predicted = plan.predicted
    match objective:
        case "latency":
            return 1e3 / predicted.decode_tok_s
        case "throughput":
            return 1e3 / predicted.throughput_tok_s
        case _:
            return predicted.ttft_s * 1e3


def _forced(nodes: Sequence[NodeProfile], plan: Plan) -> list[NodeProfile]:
    """The nodes with the plan's layers forced onto them, so that it is the only one."""
    layers = {part.rank: (part.start, part.stop) for part in plan.assignments}
    return [replace(node, layers=layers.get(node.rank)) for node in nodes]


def _hops(
    planned: PlannedFrom,
    links: list[Link],
    measured: Mapping[tuple[int, int], Sequence[float]],
    plan: Plan,
) -> tuple[Hop, ...]:
    """The present ring's hops in order, with one token's hidden state where there is one."""
    work = planned.options.work
    before = CostModel(planned.model, planned.nodes, planned.links, work)
    after = CostModel(planned.model, planned.nodes, links, work)
    at = [None, *(stage.index for stage in stages_of(plan.assignments, planned.nodes)), None]
    found = []
    for a, b in itertools.pairwise(at):
        ranks = tuple(0 if i is None else planned.nodes[i].rank for i in (a, b))
        if ranks[0] == ranks[1]:
            continue
        is_measured = bool(measured.get((ranks[0], ranks[1])) or measured.get((ranks[1], ranks[0])))
        measured_ms = after.hop_between_ms(a, b, 1) if is_measured else None
        found.append(Hop(ranks[0], ranks[1], before.hop_between_ms(a, b, 1), measured_ms))
    return tuple(found)


def _moves(cost: CostModel, old: Plan, new: Plan) -> tuple[Move, ...]:
    before, after = ({p.rank: (p.start, p.stop) for p in plan.assignments} for plan in (old, new))
    return tuple(
        Move(
            node.rank,
            node.name,
            before.get(node.rank),
            after.get(node.rank),
            _added_bytes(cost, before.get(node.rank), after.get(node.rank)),
            _added_bytes(cost, after.get(node.rank), before.get(node.rank)),
        )
        for node in cost.nodes
        if before.get(node.rank) != after.get(node.rank)
    )


def _added_bytes(cost: CostModel, old: tuple[int, int] | None, new: tuple[int, int] | None) -> int:
    """Weights of the layers `new` that are not among those of `old`."""
    if new is None:
        return 0
    mine = cost.weights(*new)
    if old is None:
        return mine.total_bytes
    theirs = cost.weights(*old)
    low, high = max(old[0], new[0]), min(old[1], new[1])
    kept_bytes = cost.weights(low, high).layers_bytes if low < high else 0
    parts = ("embed_bytes", "norm_bytes", "head_bytes", "other_bytes")
    added: int = sum(max(0, getattr(mine, part) - getattr(theirs, part)) for part in parts)
    return mine.layers_bytes - kept_bytes + added
