"""From a model, its nodes and their links to a plan, or to a refusal with numbers. Pure.

Every strategy searches the feasible plans only, so none refuses what another would accept: `optimal`
takes the one with the least predicted cost, in any order of the nodes, and may leave nodes idle; the others
use every node that can hold a layer and come as close to their ideal split as memory lets them. They keep
the order of the configuration, unless only another one fits. Where nothing fits, the options may ask for the
split that exceeds its budgets by the least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.cost import CostModel, Link, Stage
from planner.draft_bytes import advise_without, drafter_on, refuse_drafter, without_drafter
from planner.fitting import do_fit
from planner.forced import check_forced
from planner.kv_profile import PREFILL_CHUNK_TOKENS
from planner.model_profile import ModelProfile
from planner.named import balanced, proportional
from planner.node_profile import NodeProfile
from planner.optimal import BestRing, RingSearch
from planner.plan import Assignment, MemorySummary, Plan, Predicted, Refusal
from planner.prefill_chunk import LARGER, can_cross, choose_alone, knows_speeds, with_chunk
from planner.refusal import explain
from planner.workload import Workload

STRATEGIES = ("optimal", "balanced", "memory_proportional", "compute_proportional", "uniform")
OBJECTIVES = ("latency", "throughput", "ttft")

MAX_ROUNDS = 2  # of searches from each start, where rows share frames
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
    rows: int = 1  # requests whose tokens one frame carries together, as the search takes it
    max_rows: int = 1  # that one frame may carry: above `rows`, predictions are those of the even share
    keeps_order: bool = False  # stages stand in the order of the nodes
    is_even: bool = True  # of equally good plans, one whose slowest stage is faster
    is_forced: bool = False  # where nothing fits, take what exceeds its budgets by the least
    chunk_tokens: int | None = PREFILL_CHUNK_TOKENS  # of a prompt in one frame, at most; None: chosen

    def __post_init__(self) -> None:
        _ = self.work
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy = {self.strategy!r} must be one of {', '.join(STRATEGIES)}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective = {self.objective!r} must be one of {', '.join(OBJECTIVES)}")

    @property
    def work(self) -> Workload:
        """What the ring is asked to do; of a chunk that is chosen, with the usual one."""
        tokens = PREFILL_CHUNK_TOKENS if self.chunk_tokens is None else self.chunk_tokens
        return Workload(self.context, self.concurrency, self.rows, self.max_rows, tokens)

    def searched(self, plan: Plan) -> PlanOptions:
        """The options with the chunk for which the shards of `plan` were searched.

        For the objective ttft it is the plan's own. For the others a larger chunk than the usual one only
        takes memory, and that is what the shards left.
        """
        is_own = plan.objective == "ttft" and plan.strategy == "optimal"
        return replace(self, chunk_tokens=plan.chunk_tokens) if self.chunk_tokens is None and is_own else self


def make_plan(
    model: ModelProfile, nodes: Sequence[NodeProfile], links: Sequence[Link], options: PlanOptions
) -> Plan | Refusal:
    """The plan that `options.strategy` asks for, or why no split fits.

    A forced plan that does not fit has the refusal in it, and is the best for the objective among the splits
    that exceed their budgets by the least in all. Raises ForcedLayersError where the nodes' forced layers
    overlap, leave a gap or exceed the model.
    """
    if (refusal := refuse_drafter(nodes)) is not None:
        return refusal
    if options.max_rows > 1 and options.objective == "throughput":
        return _shared_plan(model, nodes, links, options)
    return _one_plan(model, nodes, links, options)


def _shared_plan(
    model: ModelProfile, nodes: Sequence[NodeProfile], links: Sequence[Link], options: PlanOptions
) -> Plan | Refusal:
    """How many rows go together hangs on the ring, and the best ring on the rows.

    Each is taken from the other until they agree, from a ring of one stage and from one of all nodes. The
    best of these plans wins, or that for one user where it is better.
    """
    lone = _one_plan(model, nodes, links, replace(options, objective="latency"))
    if isinstance(lone, Refusal):
        return lone
    tried: dict[int, Plan] = {}
    for num_stages in (1, sum(node.use for node in nodes)):
        rows = max(options.work.shares(num_stages + 1))
        for _ in range(MAX_ROUNDS):
            if rows in tried:
                break
            found = _one_plan(model, nodes, links, replace(options, rows=rows))
            if isinstance(found, Refusal):
                return found
            tried[rows] = found
            rows = max(options.work.shares(found.frames_in_flight))
    plans = [*tried.values(), replace(lone, objective=options.objective)]
    return max(plans, key=lambda plan: plan.predicted.throughput_tok_s)


def _one_plan(
    model: ModelProfile, nodes: Sequence[NodeProfile], links: Sequence[Link], options: PlanOptions
) -> Plan | Refusal:
    cost = CostModel(model, nodes, links, options.work)
    rings = rings_of(cost, options)
    best = best_ring_of(rings, options.strategy, options.objective, is_even=options.is_even)
    refusal = None
    if best is not None:
        cost, best = at_best_chunk(cost, best, options)
    else:
        refusal = explain(
            cost,
            rings.least_overflow(),
            options.legal_cuts,
            keeps_order=options.keeps_order,
            is_least=rings.knows_least_overflow,
            is_proven=rings.proves_refusals,
        )
        drafter = drafter_on(nodes)
        if drafter is not None and isinstance(
            make_plan(model, without_drafter(nodes), links, replace(options, is_forced=False)), Plan
        ):
            refusal = advise_without(refusal, drafter)
        if options.is_forced:
            best = rings_of(cost, options, is_over_allowed=True).fastest(options.objective)
        if best is None:
            return refusal
    return replace(_as_plan(cost, best.stages, options), notes=_notes(cost, best, refusal), refusal=refusal)


def rings_of(cost: CostModel, options: PlanOptions, *, is_over_allowed: bool = False) -> RingSearch:
    """The rings that the options allow. Raises ForcedLayersError."""
    return RingSearch(
        cost,
        options.legal_cuts,
        check_forced(cost.nodes, cost.model.num_layers),
        keeps_order=options.keeps_order,
        is_over_allowed=is_over_allowed,
    )


def best_ring_of(
    rings: RingSearch, strategy: str, objective: str, *, is_even: bool = False
) -> BestRing | None:
    """The ring that a strategy takes; None where nothing fits. is_even: see PlanOptions."""
    if strategy == "optimal":
        return rings.fastest(objective, is_even=is_even)
    stages = balanced(rings) if strategy == "balanced" else proportional(rings, strategy)
    return BestRing(stages) if stages else None


def at_best_chunk(cost: CostModel, best: BestRing, options: PlanOptions) -> tuple[CostModel, BestRing]:
    """A ring, found with the chunk of `cost`, with the chunk that the options leave open.

    Larger ones count where they fit and can cross. They change no shards: with a larger chunk fewer shards
    fit, and the best of all that fit with the usual one are still the best. But where the first token is the
    objective, each chunk has a best ring of its own.
    """
    if options.chunk_tokens is not None or not knows_speeds(cost, best.stages):
        return cost, best
    found = {cost.work.chunk_tokens: (cost, best)}
    for tokens in LARGER:
        larger = with_chunk(cost, tokens)
        ring = best if do_fit(larger, best.stages) else None
        is_timed = larger.work.mean_chunk_tokens != cost.work.mean_chunk_tokens
        if is_timed and options.objective == "ttft" and options.strategy == "optimal":
            ring = best_ring_of(rings_of(larger, options), "optimal", "ttft", is_even=options.is_even)
        if ring is not None and can_cross(larger, ring.stages) and knows_speeds(larger, ring.stages):
            found[tokens] = larger, ring
    return found[choose_alone({n: (made, ring.stages) for n, (made, ring) in found.items()})]


def predict(cost: CostModel, stages: Sequence[Stage]) -> Predicted:
    """How fast a ring is."""
    return Predicted(
        decode_tok_s=1e3 / cost.path_ms(stages),
        ttft_s=cost.ttft_ms(stages) / 1e3,
        throughput_tok_s=cost.throughput_tok_s(stages),
    )


def _notes(cost: CostModel, best: BestRing, refusal: Refusal | None) -> tuple[str, ...]:
    """What of the search a user should know."""
    if best.gap < MIN_TOLD_GAP:
        return ()
    num_nodes = sum(node.use for node in cost.nodes)
    note = f"note: with {num_nodes} different nodes not every order was tried"
    return (note if refusal else f"{note}: another would be better by {best.gap:.1%} at most",)


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
        predicted=predict(cost, stages),
        memory=MemorySummary(full_bytes, largest_bytes, full_bytes - largest_bytes),
        drafter=drafter_on(cost.nodes),
        chunk_tokens=cost.work.chunk_tokens,
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
