"""From a model, its nodes and their links to a plan, or to a refusal with numbers. Pure.

Every strategy searches the feasible plans only, so none refuses what another would accept: `optimal`
takes the one with the least predicted cost, in any order of the nodes, and may leave nodes idle; the others
use every node that can hold a layer and come as close to their ideal split as memory lets them. They keep
the order of the configuration, unless only another one fits. Where nothing fits, the options may ask for the
split that exceeds its budgets by the least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from planner.cost import CostModel, Link, Stage
from planner.forced import check_forced
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.optimal import RingSearch
from planner.plan import Assignment, MemorySummary, Plan, Predicted, Refusal
from planner.refusal import explain
from planner.search import Cost, Problem, add, cheapest, count_then_max
from planner.workload import Workload

STRATEGIES = ("optimal", "balanced", "memory_proportional", "compute_proportional", "uniform")
OBJECTIVES = ("latency", "throughput", "ttft")

MIN_TOLD_GAP = 0.0005  # what a better order could gain at most, if it is to be told


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How to plan.

    Raises ValueError for an unknown strategy or objective, or a context or concurrency below 1.
    """

    context: int
    concurrency: int = 1
    strategy: str = "optimal"
    objective: str = "latency"
    legal_cuts: frozenset[int] | None = None  # layers at which a stage may start; None: all
    rows: int = 1  # requests whose tokens one frame carries together; the scheduler sends one
    keeps_order: bool = False  # stages stand in the order of the nodes
    is_forced: bool = False  # where nothing fits, take what exceeds its budgets by the least

    def __post_init__(self) -> None:
        _ = self.work
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy = {self.strategy!r} must be one of {', '.join(STRATEGIES)}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective = {self.objective!r} must be one of {', '.join(OBJECTIVES)}")

    @property
    def work(self) -> Workload:
        """What the ring is asked to do."""
        return Workload(self.context, self.concurrency, self.rows)


def make_plan(
    model: ModelProfile, nodes: Sequence[NodeProfile], links: Sequence[Link], options: PlanOptions
) -> Plan | Refusal:
    """The plan that `options.strategy` asks for, or why no split fits.

    A forced plan that does not fit has the refusal in it, and is the best for the objective among the splits
    that exceed their budgets by the least in all. Raises ForcedLayersError where the nodes' forced layers
    overlap, leave a gap or exceed the model.
    """
    solver = _Solver(CostModel(model, nodes, links, options.work), options)
    stages = solver.solve()
    refusal = None
    if stages is None:
        refusal = explain(solver.cost, solver.overflow(), options.legal_cuts, keeps_order=options.keeps_order)
        stages = solver.forced_stages() if options.is_forced else None
        if stages is None:
            return refusal
    return replace(_as_plan(solver.cost, stages, options), notes=tuple(solver.notes), refusal=refusal)


class _Solver:
    def __init__(self, cost: CostModel, options: PlanOptions) -> None:
        self.cost, self.options = cost, options
        self.usable = [i for i, node in enumerate(cost.nodes) if node.use]
        self.forced = check_forced(cost.nodes, cost.model.num_layers)
        self.rings = RingSearch(cost, options.legal_cuts, self.forced, keeps_order=options.keeps_order)
        self.notes: list[str] = []

    def solve(self) -> list[Stage] | None:
        """The stages of the best feasible plan; None where nothing fits."""
        match self.options.strategy:
            case "optimal":
                return self._optimal()
            case "balanced":
                cost = self.cost
                return self._balanced() or self.rings.widest(lambda *stage: cost.decode_ms(*stage) ** 2)
            case _:
                return self._proportional(self._ideal_shares())

    def overflow(self) -> list[Stage] | None:
        """The stages that exceed their budgets by the least in all; None where the cuts allow no stages."""
        return self.rings.least_overflow()

    def forced_stages(self) -> list[Stage] | None:
        """Of the splits that exceed their budgets by the least in all, the best one."""
        options = self.options
        rings = RingSearch(
            self.cost,
            options.legal_cuts,
            self.forced,
            keeps_order=options.keeps_order,
            is_over_allowed=True,
        )
        best = rings.fastest(options.objective)
        if best is not None and best.gap:
            self.notes.append(f"note: with {len(self.usable)} different nodes not every order was tried")
        return best.stages if best else None

    # -- strategies ---------------------------------------------------------------------------------------
    def _optimal(self) -> list[Stage] | None:
        best = self.rings.fastest(self.options.objective)
        if best is None:
            return None
        if best.gap >= MIN_TOLD_GAP:
            self.notes.append(
                f"note: with {len(self.usable)} different nodes not every order was tried: another would be "
                f"better by {best.gap:.1%} at most"
            )
        return best.stages

    def _balanced(self) -> list[Stage] | None:
        """Least time of the slowest stage over all nodes; among those the most even ones."""
        cost = self.cost

        def stage_cost(i: int, start: int, stop: int) -> Cost | None:
            return (-1.0, cost.decode_ms(i, start, stop)) if self._fits(i, start, stop) else None

        found = cheapest(self._problem(stage_cost, combine=count_then_max))
        if found is None:
            return None
        limit_ms = found[0][1]

        def square(i: int, start: int, stop: int) -> Cost | None:
            decode_ms = cost.decode_ms(i, start, stop)
            return (-1.0, decode_ms**2) if decode_ms <= limit_ms and self._fits(i, start, stop) else None

        even = cheapest(self._problem(square))
        return even[1] if even else found[1]

    def _proportional(self, shares: list[float]) -> list[Stage] | None:
        """Least sum of squared distances between each node's part and its ideal share, over all nodes."""

        def distance(i: int, start: int, stop: int) -> float:
            return (self._part(start, stop) - shares[i]) ** 2

        def stage_cost(i: int, start: int, stop: int) -> Cost | None:
            return (-1.0, distance(i, start, stop)) if self._fits(i, start, stop) else None

        found = cheapest(self._problem(stage_cost))
        return found[1] if found else self.rings.widest(distance)

    def _ideal_shares(self) -> list[float]:
        """Each node's part of the model, from 0 to 1."""
        match self.options.strategy:
            case "memory_proportional":
                sizes = [float(node.budget_bytes) for node in self.cost.nodes]
            case "compute_proportional":
                sizes = [node.speeds.flops_ms for node in self.cost.nodes]
            case _:
                sizes = [1.0 for _ in self.cost.nodes]
        amounts = [size if node.use else 0.0 for size, node in zip(sizes, self.cost.nodes, strict=True)]
        total = sum(amounts) or 1.0
        return [amount / total for amount in amounts]

    def _part(self, start: int, stop: int) -> float:
        """The stage's part of the model: of its bytes, of its multiplications, or of its layers."""
        model = self.cost.model
        match self.options.strategy:
            case "memory_proportional":
                whole = self.cost.weight_bytes(0, model.num_layers) + self.cost.kv_bytes(0, model.num_layers)
                return (self.cost.weight_bytes(start, stop) + self.cost.kv_bytes(start, stop)) / whole
            case "compute_proportional":
                return self.cost.active_params(start, stop) / self.cost.active_params(0, model.num_layers)
            case _:
                return (stop - start) / model.num_layers

    # -- parts --------------------------------------------------------------------------------------------
    def _fits(self, i: int, start: int, stop: int) -> bool:
        return self._may_own(i, start, stop) and self.cost.overflow_bytes(i, start, stop) == 0

    def _may_own(self, i: int, start: int, stop: int) -> bool:
        """False where layers are forced onto another node, or others onto this one."""
        if i in self.forced:
            return self.forced[i] == (start, stop)
        return all(stop <= a or b <= start for a, b in self.forced.values())

    def _problem(
        self,
        stage_cost: Callable[[int, int, int], Cost | None],
        combine: Callable[[Cost, Cost], Cost] = add,
    ) -> Problem:
        keeps_order = self.options.keeps_order  # then forced nodes take their turn as all others
        return Problem(
            num_layers=self.cost.model.num_layers,
            free=[i for i in self.usable if keeps_order or i not in self.forced],
            forced={} if keeps_order else self.forced,
            stage_cost=stage_cost,
            hop_cost=lambda a, b: (0.0, 0.0),
            legal_cuts=self.options.legal_cuts,
            combine=combine,
        )


def _as_plan(cost: CostModel, stages: Sequence[Stage], options: PlanOptions) -> Plan:
    model, num_layers = cost.model, cost.model.num_layers
    assignments = tuple(_assignment(cost, number, stage) for number, stage in enumerate(stages))
    used = {part.rank for part in assignments}
    full_bytes = cost.weight_bytes(0, num_layers)
    largest_bytes = max(part.weight_bytes for part in assignments)
    return Plan(
        model=model.name,
        strategy=options.strategy,
        objective=options.objective,
        num_layers=num_layers,
        context=options.context,
        concurrency=options.concurrency,
        assignments=assignments,
        unused_nodes=tuple(node.name for node in cost.nodes if node.rank not in used),
        predicted=Predicted(
            decode_tok_s=1e3 / cost.path_ms(stages),
            ttft_s=cost.ttft_ms(stages) / 1e3,
            throughput_tok_s=cost.throughput_tok_s(stages),
        ),
        memory=MemorySummary(full_bytes, largest_bytes, full_bytes - largest_bytes),
    )


def _assignment(cost: CostModel, number: int, stage: Stage) -> Assignment:
    i, start, stop = stage.index, stage.start, stage.stop
    node = cost.nodes[i]
    return Assignment(
        rank=node.rank,
        node=node.name,
        stage=number,
        start=start,
        stop=stop,
        embed=start == 0,
        head=stop == cost.model.num_layers,
        weight_bytes=cost.weight_bytes(start, stop),
        kv_bytes=cost.kv_bytes(start, stop),
        activation_bytes=cost.activation_bytes(i, start, stop),
        reserve_bytes=node.reserve_bytes,
        budget_bytes=node.budget_bytes,
        decode_ms=cost.decode_ms(i, start, stop),
        prefill_ms=cost.prefill_ms(i, start, stop),
    )
