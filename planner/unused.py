"""Why a node of the cluster owns no layers in a plan. Pure."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from planner.cost import Stage
from planner.kinds import frame_tokens, kinds_for
from planner.moves import SMALL_MS, UNITS, objective_ms, told
from planner.optimal import RingSearch
from planner.sizes import gb

Kind = Literal["excluded", "too_small", "no_layers_left", "does_not_fit", "links", "slower", "not_searched"]


@dataclass(frozen=True, slots=True)
class Unused:
    """Nodes with one answer, by index."""

    nodes: tuple[int, ...]
    kind: Kind
    text: str
    missing_bytes: int = 0  # of the smallest part
    cost_ms: float | None = None  # how much worse the best ring with it is
    links_ms: float | None = None  # of that, hops that the ring would not have without it


def unused(
    search: RingSearch, stages: Sequence[Stage], objective: str, may_search: Callable[[], bool]
) -> list[Unused]:
    """One for each kind of node without layers, where `stages` are the best ring.

    may_search: asked before each search.
    """
    used = {stage.index for stage in stages}
    free = search.ring.free
    kinds = kinds_for(search, objective) or [[i] for i in free]
    others = [[i] for i in range(len(search.cost.nodes)) if i not in free]
    found = []
    for kind in [*others, *kinds]:
        idle = tuple(i for i in kind if i not in used)
        if not idle:
            continue
        answer = _plain(search, idle)
        if answer is None and may_search():
            own = frozenset(used.intersection(kind)) | {idle[0]}
            answer = _compared(search, stages, objective, idle, own)
        found.append(
            answer or Unused(idle, "not_searched", "no ring with it is better; by how much was not searched")
        )
    return _merged(found)


def plain_unused(search: RingSearch, stages: Sequence[Stage], text: str, kind: Kind) -> list[Unused]:
    """What needs no search; `kind` and `text` for the other nodes."""
    used = {stage.index for stage in stages}
    idle = [(i,) for i in range(len(search.cost.nodes)) if i not in used]
    return _merged([_plain(search, i) or Unused(i, kind, text) for i in idle])


def _plain(search: RingSearch, idle: tuple[int, ...]) -> Unused | None:
    """What can be told without a search; None: nothing."""
    node, tables = search.cost.nodes[idle[0]], search.tables
    if not node.use:
        return Unused(idle, "excluded", "left out by the configuration or by --exclude")
    if not tables.may_own(idle[0]).any():
        return Unused(idle, "no_layers_left", "all layers are forced onto other nodes")
    missing_bytes = int(tables.overflow_bytes(idle[0]).min())
    if not missing_bytes:
        return None
    is_whole = len(tables.bounds) == search.cost.model.num_layers + 1 and not tables.forced
    what = "one layer" if is_whole else "the smallest part that it may own"
    text = f"too small: {what} with its KV and scratch lacks {gb(missing_bytes)}"
    return Unused(idle, "too_small", text, missing_bytes)


def _compared(
    search: RingSearch,
    stages: Sequence[Stage],
    objective: str,
    idle: tuple[int, ...],
    required: frozenset[int],
) -> Unused:
    """By the best ring in which the first of them has layers too."""
    cost, own = search.cost, copy.copy(search)
    own.ring = replace(search.ring, required=required)
    best = own.fastest(objective)
    if best is None:
        return Unused(idle, "does_not_fit", "no split that uses it fits")
    now_ms, with_ms = (objective_ms(cost, ring, objective) for ring in (stages, best.stages))
    tokens = frame_tokens(cost, objective)
    rest = [stage for stage in best.stages if stage.index != idle[0]]
    links_ms = cost.hops_ms(best.stages, tokens) - (cost.hops_ms(rest, tokens) if rest else 0.0)
    cost_ms = max(0.0, with_ms - now_ms)
    if cost_ms < 1e-9 * now_ms:
        return Unused(idle, "slower", "not needed: with it the prediction is the same", 0, 0.0, links_ms)
    slower = f"{cost_ms:.2f} {UNITS[objective]} slower with it at best, {told(with_ms, objective)}"
    if links_ms >= cost_ms:
        text = f"its hops, {links_ms:.2f} ms more, cost what it gains and more: {slower}"
        return Unused(idle, "links", text, 0, cost_ms, links_ms)
    text = f"{slower}, of which its hops take {links_ms:.2f} ms" if links_ms > SMALL_MS else slower
    return Unused(idle, "slower", text, 0, cost_ms, links_ms)


def _merged(found: Sequence[Unused]) -> list[Unused]:
    """Those with the same words together, in the order of the nodes."""
    by_text = sorted(found, key=lambda answer: answer.text)
    groups = [list(group) for _, group in itertools.groupby(by_text, key=lambda answer: answer.text)]
    merged = [
        replace(group[0], nodes=tuple(sorted(i for answer in group for i in answer.nodes)))
        for group in groups
    ]
    return sorted(merged, key=lambda answer: answer.nodes)
