"""Why a plan is as it is: what binds each node, why others are idle, and what would make it better. Pure.

Computed on demand only. Everything that is told to gain or to cost something was planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from planner.cost import CostModel, Link, Stage
from planner.fitting import Fitting
from planner.kinds import steps_of
from planner.model_profile import ModelProfile
from planner.moves import Reason, reasons, told
from planner.node_profile import NodeProfile
from planner.optimal import RingSearch
from planner.plan import Plan
from planner.remedies import Remedy, remedies
from planner.solver import PlanOptions, rings_of
from planner.unused import Kind, Unused, plain_unused, unused
from planner.variants import Checkpoint
from planner.what_if import MIN_GAIN, Gain, WhatIf, Work

MAX_LINES = 12  # of nodes, in the short form
MAX_GAINS = 2


@dataclass(frozen=True, slots=True)
class Why:
    """The account of a plan. `names` of the nodes, by index."""

    objective: str
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    reasons: tuple[Reason, ...]  # in ring order
    unused: tuple[Unused, ...]
    gains: tuple[Gain, ...]  # the largest first
    note: str | None  # what was not planned, and why

    def lines(self, *, is_full: bool) -> list[str]:
        """Text: a line for each node and one or two for what would help, or everything."""
        own = [(self.names[r.index], r.text) for r in self.reasons]
        idle = [(self._listed(u.nodes), f"unused: {u.text}") for u in self.unused]
        rows = own + idle
        left = 0 if is_full else len(rows) - MAX_LINES
        if left > 1:
            rows = own[: MAX_LINES - len(idle[: MAX_LINES // 2])] + idle[: MAX_LINES // 2]
            left = len(own) + len(idle) - len(rows)
        width = max(len(name) for name, _ in rows)
        lines = ["why:", *(f"  {name.ljust(width)}  {text}" for name, text in rows)]
        if left > 1:
            lines.append(f"  and {left} more: --why")
        if is_full:
            told = ["what would help:", *(f"  {self._told(gain)}" for gain in self.gains)]
            lines += [*self._moves(), *(told if self.gains else [])]
        else:
            lines += self.best_gains()
        return lines + ([f"note: {self.note}"] if self.note else [])

    def as_dict(self) -> dict[str, Any]:
        """For the key `why` of JSON. Indices become ranks and names."""
        return {
            "objective": self.objective,
            "nodes": [self._reason(reason) for reason in self.reasons],
            "unused": [self._unused(answer) for answer in self.unused],
            "what_if": [self._gain(gain) for gain in self.gains],
            "note": self.note,
        }

    def best_gains(self) -> list[str]:
        """Lines: the best of each kind, or that none matters; a link without latency is not for sale."""
        gains = [gain for gain in self.gains if gain.change.values.get("latency_ms") != 0]
        chosen = _best_of_each([gain for gain in gains if gain.share >= MIN_GAIN])[:MAX_GAINS]
        if chosen:
            return ["what would help:", *(f"  {self._told(gain)}" for gain in chosen)]
        best: dict[str, str] = {}
        for gain in gains:
            best.setdefault(gain.change.kind, gain.change.what)
        tried = [best[kind] for kind in ("memory", "node", "link") if kind in best]
        words = " or ".join([", ".join(tried[:-1]), tried[-1]] if len(tried) > 1 else tried)
        return [f"what would help: {words} would gain less than {MIN_GAIN:.0%}"] if tried else []

    # -- text ---------------------------------------------------------------------------------------------
    def _moves(self) -> list[str]:
        """Every way to move a cut, in the order of the layers."""
        moves = sorted({m for r in self.reasons for m in r.moves}, key=lambda m: (m.start, m.stop, m.taker))
        lines = []
        for move in moves:
            what = f"{move.layers} from {self.names[move.giver]} to {self.names[move.taker]}"
            change = f"{move.change_ms:+.2f} ms"
            fits = f", lacks {move.missing_bytes} bytes" if move.missing_bytes else ""
            legal = "" if move.is_legal else ", no legal cut"
            lines.append(f"  {what}: {change}{fits}{legal}")
        return ["what moving a cut would change:", *lines] if lines else []

    def _told(self, gain: Gain) -> str:
        before, after = (told(ms, self.objective) for ms in (gain.before_ms, gain.after_ms))
        return f"{gain.change.what}: " + ("nothing" if before == after else f"from {before} to {after}")

    def _listed(self, indices: Sequence[int]) -> str:
        names = [self.names[i] for i in indices]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    # -- JSON ---------------------------------------------------------------------------------------------
    def _node(self, index: int) -> dict[str, Any]:
        return {"rank": self.ranks[index], "node": self.names[index]}

    def _reason(self, reason: Reason) -> dict[str, Any]:
        moves = [
            asdict(move) | {"giver": self.names[move.giver], "taker": self.names[move.taker]}
            for move in reason.moves
        ]
        return self._node(reason.index) | {
            "constraint": reason.constraint,
            "text": reason.text,
            "free_bytes": reason.free_bytes,
            "moves": moves,
        }

    def _unused(self, answer: Unused) -> dict[str, Any]:
        return asdict(answer) | {"nodes": [self._node(i) for i in answer.nodes]}

    def _gain(self, gain: Gain) -> dict[str, Any]:
        change = gain.change
        values = {"kind": change.kind, "what": change.what, **change.values}
        return values | {"before_ms": gain.before_ms, "after_ms": gain.after_ms, "text": self._told(gain)}


def explain_plan(
    plan: Plan,
    model: ModelProfile,
    nodes: Sequence[NodeProfile],
    links: Sequence[Link],
    options: PlanOptions,
    *,
    is_quick: bool = False,
) -> Why:
    """Why `plan`, which `make_plan` made of the same values. is_quick: no more than is told in short."""
    options = options.searched(plan)
    cost = CostModel(model, nodes, links, options.work)
    index = {node.rank: i for i, node in enumerate(nodes)}
    stages = [Stage(index[part.rank], part.start, part.stop) for part in plan.assignments]
    why = Why(
        objective=options.objective,
        names=tuple(node.name for node in nodes),
        ranks=tuple(node.rank for node in nodes),
        reasons=tuple(reasons(cost, stages, options.objective, options.legal_cuts)),
        unused=(),
        gains=(),
        note=None,
    )
    search = rings_of(cost, options)
    steps = None if options.strategy != "optimal" else steps_of(search, options.objective)
    if plan.refusal is None and steps is not None:
        return _with_other_plans(why, search, stages, options, Work(steps, is_quick=is_quick))
    kind: Kind = "does_not_fit"
    text, note = "no ring with it exceeds the budgets by less", None
    if plan.refusal is None and options.strategy != "optimal":
        text = f"the strategy {options.strategy} found no split that uses it too and fits"
        note = "what would help is told for the strategy optimal"
    elif plan.refusal is None:
        kind, text = "not_searched", "no ring with it was found to be better"
        note = "with so many different nodes not every order is searched, and what would help is not told"
    return replace(why, unused=tuple(plain_unused(search, stages, text, kind)), note=note)


def _with_other_plans(
    why: Why, search: RingSearch, stages: Sequence[Stage], options: PlanOptions, work: Work
) -> Why:
    """With what needs other plans: unused nodes, gains, and what was left out."""
    if options.keeps_order:
        text = "no ring with it in its place was found to be better"
        found = plain_unused(search, stages, text, "not_searched")
    else:
        found = unused(search, stages, options.objective, work.take_plan)
    wishes = {
        r.index: min((m.change_ms for m in r.moves if m.taker == r.index), default=0.0) for r in why.reasons
    }
    full = [r.index for r in why.reasons if r.constraint == "memory"]
    questions = WhatIf(search.cost, options, stages, work)
    gains = questions.gains(sorted(full, key=lambda i: wishes[i]), is_quick=work.is_quick)
    note = "not every change was planned, as that would take too long" if work.is_short else None
    return replace(why, unused=tuple(found), gains=tuple(gains), note=note)


def explain_refusal(
    model: ModelProfile,
    nodes: Sequence[NodeProfile],
    options: PlanOptions,
    checkpoint: Checkpoint | None = None,
) -> list[Remedy]:
    """What would make fit what `make_plan` refused, the least loss first."""
    cost = CostModel(model, nodes, (), options.work)
    stages = rings_of(cost, options).least_overflow()
    return remedies(Fitting(cost, options.legal_cuts, stages, options.keeps_order), checkpoint)


def _best_of_each(gains: Sequence[Gain]) -> list[Gain]:
    """The best of each kind of change, the best first; more memory on every node comes last."""
    best: dict[str, Gain] = {}
    for gain in sorted(gains, key=_is_everywhere):
        best.setdefault(gain.change.kind, gain)
    return sorted(best.values(), key=lambda gain: (_is_everywhere(gain), gain.after_ms))


def _is_everywhere(gain: Gain) -> bool:
    return gain.change.kind == "memory" and gain.change.values["node"] is None
