"""What keeps each stage of a plan at its layers: the best change of its ends, and what forbids it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from planner.cost import CostModel, Stage
from planner.sizes import gb

Constraint = Literal[
    "only_node", "forced", "no_neighbour", "memory", "legal_cut", "others_full", "speed", "strategy"
]
SMALL_MS = 0.005  # a change that is not told, as it rounds to none
UNITS = {"latency": "ms a token", "throughput": "ms a token", "ttft": "ms to the first token"}


def objective_ms(cost: CostModel, stages: Sequence[Stage], objective: str) -> float:
    """What the optimal strategy makes least: ms of a token, or of the first one."""
    match objective:
        case "throughput":
            return 1e3 / cost.throughput_tok_s(stages)
        case "ttft":
            return cost.ttft_ms(stages)
        case _:
            return cost.path_ms(stages)


@dataclass(frozen=True, slots=True)
class Move:
    """Layers [start, stop) at the end of a stage given to the stage beside it."""

    start: int
    stop: int
    giver: int  # index of a node
    taker: int
    missing_bytes: int  # by how much the taker would exceed its budget
    change_ms: float  # of the objective; below 0 is better
    is_legal: bool  # the model may be cut there

    @property
    def layers(self) -> str:
        """In words."""
        return f"layer {self.start}" if self.stop - self.start == 1 else f"layers {self.start}:{self.stop}"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a node has its layers and no others. `moves`: every way to move an end of its stage."""

    index: int
    constraint: Constraint
    text: str
    free_bytes: int
    moves: tuple[Move, ...]


def reasons(
    cost: CostModel, stages: Sequence[Stage], objective: str, legal_cuts: frozenset[int] | None
) -> list[Reason]:
    """One for each stage, in ring order."""
    moves = list(_moves(cost, stages, objective, legal_cuts))
    return [_reason(cost, stage, objective, moves, len(stages)) for stage in stages]


# -- moves ------------------------------------------------------------------------------------------------
def _moves(
    cost: CostModel, stages: Sequence[Stage], objective: str, legal_cuts: frozenset[int] | None
) -> Iterator[Move]:
    """Each cut moved to the next legal one on either side, and by one layer where that is none."""
    now_ms = objective_ms(cost, stages, objective)
    for at in range(1, len(stages)):
        before, after = stages[at - 1], stages[at]
        if any(cost.nodes[s.index].layers is not None for s in (before, after)):
            continue
        up, down = range(before.stop + 1, after.stop + 1), range(before.stop - 1, before.start - 1, -1)
        for way in (up, down):
            legal = next(cut for cut in way if legal_cuts is None or cut in legal_cuts or cut == way[-1])
            for cut in dict.fromkeys((way[0], legal)):
                changed = _with_cut(stages, at, cut)
                giver, taker = (after, before) if cut > before.stop else (before, after)
                yield Move(
                    start=min(cut, before.stop),
                    stop=max(cut, before.stop),
                    giver=giver.index,
                    taker=taker.index,
                    missing_bytes=sum(cost.overflow_bytes(s.index, s.start, s.stop) for s in changed),
                    change_ms=objective_ms(cost, changed, objective) - now_ms,
                    is_legal=cut == legal,
                )


def _with_cut(stages: Sequence[Stage], at: int, cut: int) -> list[Stage]:
    """The cut between the stages at - 1 and at, moved to the layer `cut`; a stage may lose all its layers."""
    before, after = stages[at - 1], stages[at]
    pair = [Stage(before.index, before.start, cut), Stage(after.index, cut, after.stop)]
    return [s for s in (*stages[: at - 1], *pair, *stages[at + 1 :]) if s.start < s.stop]


# -- reasons ----------------------------------------------------------------------------------------------
def _reason(cost: CostModel, stage: Stage, objective: str, moves: Sequence[Move], num_stages: int) -> Reason:
    own = tuple(move for move in moves if stage.index in (move.giver, move.taker))
    constraint, text = _binding(cost, stage, own, UNITS[objective], num_stages)
    free_bytes = cost.nodes[stage.index].budget_bytes - cost.need_bytes(stage.index, stage.start, stage.stop)
    return Reason(stage.index, constraint, text, free_bytes, own)


def _binding(
    cost: CostModel, stage: Stage, own: Sequence[Move], unit: str, num_stages: int
) -> tuple[Constraint, str]:
    """What binds, the first that does: a wish that something forbids, then a full budget, then speed.

    A stage of a plan that is forced may exceed its budget.
    """
    node, names = cost.nodes[stage.index], [node.name for node in cost.nodes]
    if over_bytes := cost.overflow_bytes(stage.index, stage.start, stage.stop):
        return "memory", f"exceeds its budget by {gb(over_bytes)}"
    if node.layers is not None:
        return "forced", f"its layers are forced to {stage.start}:{stage.stop}"
    if num_stages == 1:
        return "only_node", "has every layer: no ring of more nodes is better"
    if not own:
        return "no_neighbour", "has all that the forced layers beside it leave"
    takes = sorted((m for m in own if m.taker == stage.index and m.is_legal), key=lambda m: m.change_ms)
    gives = sorted((m for m in own if m.giver == stage.index and m.is_legal), key=lambda m: m.change_ms)
    wish, gift = (next((m for m in way if m.change_ms < -SMALL_MS), None) for way in (takes, gives))
    kept = next((m for m in own if not m.is_legal and m.change_ms < -SMALL_MS and not m.missing_bytes), None)
    if kept is not None:
        way = f"from {names[kept.giver]}" if kept.taker == stage.index else f"to {names[kept.taker]}"
        return "legal_cut", f"{kept.layers} {way} would save {_saved(kept, unit)}, but no cut is legal there"
    if wish is not None and wish.missing_bytes:
        return "memory", f"full: {_lacks(wish, names)}, which would save {_saved(wish, unit)} here"
    if takes and all(m.missing_bytes for m in takes):
        return "memory", f"full: {_lacks(min(takes, key=lambda m: m.missing_bytes), names)}"
    if gift is not None and gift.missing_bytes:
        taker = names[gift.taker]
        return "others_full", (
            f"has what is left: {gift.layers} on {taker} would save {_saved(gift, unit)}, but {taker} is full"
        )
    better = wish or gift
    if better is not None:
        place = f"{better.layers} on {names[better.taker]}"
        return "strategy", f"the strategy has it so: {place} would save {_saved(better, unit)}"
    return _speed(names, [m for m in (*takes, *gives) if not m.missing_bytes], stage, unit)


def _lacks(move: Move, names: Sequence[str]) -> str:
    return f"{gb(move.missing_bytes)} too little for {move.layers} of {names[move.giver]}"


def _saved(move: Move, unit: str) -> str:
    return f"{-move.change_ms:.2f} {unit}"


def _speed(names: Sequence[str], fitting: Sequence[Move], stage: Stage, unit: str) -> tuple[Constraint, str]:
    """No move that fits is better; what the stage could take comes first."""
    if not fitting:
        return "others_full", "has what is left: the nodes beside it are full"
    move = fitting[0]
    is_take = move.taker == stage.index
    doing = (
        f"taking {move.layers} of {names[move.giver]}"
        if is_take
        else f"giving {move.layers} to {names[move.taker]}"
    )
    if move.change_ms < SMALL_MS:
        return "speed", f"best as it is: {doing} would change nothing"
    return "speed", f"best as it is: {doing} would cost {move.change_ms:.2f} {unit}"


def told(value_ms: float, objective: str) -> str:
    """The value of an objective as a plan tells it, but with three digits: tok/s, or s to the first token."""
    value, unit = (value_ms / 1e3, "s") if objective == "ttft" else (1e3 / value_ms, "tok/s")
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
