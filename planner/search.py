"""The cheapest way to cut layers over nodes in their fixed order, by exact dynamic programming. Pure.

A state is (layers placed, next node allowed, last node used); nodes may be left out. With N nodes and L
layers there are O(N L) states, and O(N L (N + L)) steps. Costs are tuples compared in order, so that a
first component can rank above all others; parts that do not add up, such as a maximum, are folded in by
`combine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from planner.cost import Stage

Cost = tuple[float, ...]


def add(a: Cost, b: Cost) -> Cost:
    """Component by component."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def count_then_max(a: Cost, b: Cost) -> Cost:
    """(count, value): counts add up, of the values the larger stays."""
    return (a[0] + b[0], max(a[1], b[1]))


@dataclass(frozen=True, slots=True)
class Problem:
    """What may be cut where, and what that costs.

    `stage_cost(node, start, stop)` is None for a stage that is not allowed; `hop_cost(a, b)` has None for
    the head. `forced` gives nodes that own exactly that range; `free` are the others that may own layers,
    in ring order.
    """

    num_layers: int
    free: Sequence[int]
    stage_cost: Callable[[int, int, int], Cost | None]
    hop_cost: Callable[[int | None, int | None], Cost]
    forced: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    legal_cuts: frozenset[int] | None = None  # layers at which a stage may start; None: all
    combine: Callable[[Cost, Cost], Cost] = add


@dataclass(frozen=True, slots=True)
class _Step:
    cost: Cost
    stage: Stage | None  # the last one placed
    before: _Step | None


def cheapest(problem: Problem) -> tuple[Cost, list[Stage]] | None:
    """The cheapest stages that tile all layers, and their cost; None where there are none.

    Of equally cheap ones the first found stays: fewer stages first, then earlier nodes.
    """
    num_layers, free, combine = problem.num_layers, problem.free, problem.combine
    forced_at = {start: (node, stop) for node, (start, stop) in problem.forced.items()}
    limits = [min((s for s in forced_at if s > at), default=num_layers) for at in range(num_layers)]
    # states[at][(next free position, last node)]
    states: list[dict[tuple[int, int | None], _Step]] = [{} for _ in range(num_layers + 1)]
    zero = tuple(0.0 for _ in problem.hop_cost(None, None))
    states[0][0, None] = _Step(zero, None, None)

    def offer(at: int, key: tuple[int, int | None], cost: Cost, stage: Stage, before: _Step) -> None:
        old = states[at].get(key)
        if old is None or cost < old.cost:
            states[at][key] = _Step(cost, stage, before)

    def place(at: int, node: int, stops: range, position: int, arrivals: list[tuple[Cost, _Step]]) -> None:
        if not arrivals:
            return
        cost, before = min(arrivals, key=lambda arrival: arrival[0])
        for stop in stops:
            if stop < num_layers and problem.legal_cuts is not None and stop not in problem.legal_cuts:
                continue
            own = problem.stage_cost(node, at, stop)
            if own is not None:
                offer(stop, (position, node), combine(cost, own), Stage(node, at, stop), before)

    for at in range(num_layers):
        reached = list(states[at].items())
        if at in forced_at:
            node, stop = forced_at[at]
            for position in sorted({key[0] for key, _ in reached}):
                arrivals = [
                    (combine(step.cost, problem.hop_cost(last, node)), step)
                    for (at_position, last), step in reached
                    if at_position == position
                ]
                place(at, node, range(stop, stop + 1), position, arrivals)
            continue
        for position, node in enumerate(free):
            arrivals = [
                (combine(step.cost, problem.hop_cost(last, node)), step)
                for (next_position, last), step in reached
                if next_position <= position
            ]
            place(at, node, range(at + 1, limits[at] + 1), position + 1, arrivals)
    ends = [
        (combine(step.cost, problem.hop_cost(last, None)), step)
        for (_, last), step in states[num_layers].items()
    ]
    if not ends:
        return None
    cost, step = min(ends, key=lambda end: end[0])
    return cost, _stages(step)


def _stages(step: _Step) -> list[Stage]:
    stages = []
    at: _Step | None = step
    while at is not None and at.stage is not None:
        stages.append(at.stage)
        at = at.before
    return stages[::-1]
