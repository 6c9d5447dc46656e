"""What a change of the cluster would gain: the changed cluster is planned anew. Pure.

The number of plans is bounded by what they take, and nothing is told that was not planned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from planner.cost import HEAD_RANK, CostModel, Link, Stage
from planner.kinds import steps_of
from planner.moves import objective_ms
from planner.node_profile import GB, NodeProfile
from planner.plan import Plan
from planner.solver import PlanOptions, make_plan, rings_of

MAX_STEPS = 240_000_000  # of all plans together: below half a second
MAX_QUICK_STEPS = 170_000_000  # of those that are told in short
MAX_QUICK_NODES = 3  # of more memory, one by one
MIN_GAIN = 0.01  # of the objective, to be told in short
STEPS_OF_A_PLAN = 1_000_000  # what a plan takes besides its search
MIN_SAVING = 0.001  # of the objective, in the ring as it is, for a faster link to be planned
NO_GAIN = 1e-9  # the same value, summed in another order
THUNDERBOLT_MS = 0.3  # one way over TCP, the best of the usual 0.3-1 ms
FASTER = 10.0

Kind = Literal["memory", "node", "link"]


@dataclass(frozen=True, slots=True)
class Change:
    """A changed cluster, and what was changed in words."""

    kind: Kind
    what: str
    nodes: Sequence[NodeProfile]
    links: Sequence[Link]
    values: dict[str, Any]  # for JSON


@dataclass(frozen=True, slots=True)
class Gain:
    """What a change makes of the objective, ms: a token's, or the first token's."""

    change: Change
    before_ms: float
    after_ms: float

    @property
    def share(self) -> float:
        """Of the time that it saves."""
        return 1 - self.after_ms / self.before_ms


class Work:
    """How much more may be searched. plan_steps: what the plan took, as another ring of its cluster does."""

    def __init__(self, plan_steps: int, *, is_quick: bool = False) -> None:
        self.plan_steps, self.is_quick = plan_steps, is_quick
        self.left = MAX_QUICK_STEPS if is_quick else MAX_STEPS
        self.is_short = False  # something was left out

    def take(self, steps: int | None) -> bool:
        """Whether so much may be searched, which then counts. None: not every order can be."""
        if steps is None or steps + STEPS_OF_A_PLAN > self.left:
            self.is_short = True
            return False
        self.left -= steps + STEPS_OF_A_PLAN
        return True

    def take_plan(self) -> bool:
        """As much as the plan took."""
        return self.take(self.plan_steps)


class WhatIf:
    """The questions about one plan, of which `stages` are the ring and `cost` the cluster."""

    def __init__(self, cost: CostModel, options: PlanOptions, stages: Sequence[Stage], work: Work) -> None:
        self.cost, self.options, self.stages, self.work = cost, options, stages, work
        self.before_ms = objective_ms(cost, stages, options.objective)

    def gains(self, full_nodes: Sequence[int], *, is_quick: bool) -> list[Gain]:
        """All that were planned, the largest gain first.

        full_nodes: those that want more memory, by index, the most promising first. is_quick: only what is
        told in short: the best node, the link that saves most, and more memory where it may matter.
        """
        nodes, links = list(self._more_nodes()), list(self._faster_links())
        if is_quick:  # a link without latency is the limit, and not for sale
            nodes, links = nodes[:1], [link for link in links if link.values["latency_ms"]][:1]
        found = [self.gain(change) for change in (*nodes, *links)]
        found += self._of_more_memory(full_nodes, is_quick=is_quick)
        return sorted((gain for gain in found if gain is not None), key=lambda gain: gain.after_ms)

    def gain(self, change: Change) -> Gain | None:
        """None where there is no room for it."""
        model, options = self.cost.model, self.options
        cost = CostModel(model, change.nodes, change.links, self.cost.work)
        search = rings_of(cost, options)
        if not self.work.take(steps_of(search, options.objective)):
            return None
        plan = make_plan(model, change.nodes, change.links, replace(options, is_even=False))
        if not isinstance(plan, Plan) or not plan.fits:  # what fits fits a better cluster too
            return None
        return Gain(change, self.before_ms, plan_ms(plan, options.objective))

    # -- memory -------------------------------------------------------------------------------------------
    def _of_more_memory(self, full_nodes: Sequence[int], *, is_quick: bool) -> list[Gain | None]:
        """Of one GB more on each node; of all at once alone, where not even that helps."""
        kinds = self._kinds(full_nodes)
        if len(kinds) < 3:
            return [self.gain(self._more_memory(i)) for i in kinds]
        every = self.gain(self._more_memory(None))
        if every is None or every.share < (MIN_GAIN if is_quick else NO_GAIN):
            return [every]
        few = kinds[:MAX_QUICK_NODES] if is_quick else kinds
        return [every, *(self.gain(self._more_memory(i)) for i in few)]

    def _kinds(self, full_nodes: Sequence[int]) -> list[int]:
        """One node of each kind that may own layers, by index: full ones first, then others with layers."""
        nodes, used = self.cost.nodes, {stage.index for stage in self.stages}
        order = {i: at for at, i in enumerate(full_nodes)}
        kinds: dict[object, int] = {}
        for i in sorted(range(len(nodes)), key=lambda i: (order.get(i, len(nodes)), i not in used, i)):
            if nodes[i].use and nodes[i].layers is None:
                kinds.setdefault((self.cost.node_key(i), self._links_of(i)), i)
        return list(kinds.values())

    def _more_memory(self, index: int | None) -> Change:
        """On one node, or on all in use."""
        nodes = self.cost.nodes
        changed = [
            with_more_memory(node) if node.use and index in (None, i) else node
            for i, node in enumerate(nodes)
        ]
        name = None if index is None else nodes[index].name
        values = {"node": name, "more_bytes": GB}
        return Change("memory", f"1 GB more on {name or 'every node'}", changed, self.cost.links, values)

    def _links_of(self, index: int) -> object:
        """Different for nodes whose links are."""
        node, nodes = self.cost.nodes[index], self.cost.nodes
        is_linked = any(node.rank in link.ranks for link in self.cost.links)
        is_alone = sum(other.host == node.host for other in nodes) == 1
        return -1 if node.rank != HEAD_RANK and is_alone and not is_linked else index

    # -- nodes --------------------------------------------------------------------------------------------
    def _more_nodes(self) -> Iterator[Change]:
        """One more like the fastest, and one more like the smallest."""
        nodes = self.cost.nodes
        free = [i for i, node in enumerate(nodes) if node.use]
        best = max(free, key=lambda i: (nodes[i].speeds.read_bytes_ms, nodes[i].budget_bytes))
        small = min(free, key=lambda i: (nodes[i].budget_bytes, nodes[i].speeds.read_bytes_ms))
        for i in (best,) if self.cost.node_key(best) == self.cost.node_key(small) else (best, small):
            changed, links = with_twin(nodes, self.cost.links, i)
            values = {"like": nodes[i].name}
            yield Change("node", f"another node like {nodes[i].name}", changed, links, values)

    # -- links --------------------------------------------------------------------------------------------
    def _faster_links(self) -> Iterator[Change]:
        """The links of the ring, each by what can be faster about it, the largest saving first."""
        ranks = [HEAD_RANK, *(self.cost.nodes[s.index].rank for s in self.stages), HEAD_RANK]
        pairs = {tuple(sorted(pair)) for pair in itertools.pairwise(ranks) if pair[0] != pair[1]}
        changes = [change for a, b in sorted(pairs) for change in self._faster(a, b)]
        saved = {id(change): self.before_ms - self._with(change) for change in changes}
        least_ms = MIN_SAVING * self.before_ms
        by_saving = sorted(changes, key=lambda change: -saved[id(change)])
        yield from (change for change in by_saving if saved[id(change)] >= least_ms)

    def _faster(self, a: int, b: int) -> Iterator[Change]:
        names = {node.rank: node.name for node in self.cost.nodes}
        ends = [names.get(rank, "the head") for rank in (a, b)]
        latency_ms, gbit_s = self.cost.link_between(a, b)
        for what, new_ms, new_gbit_s in (
            (f"a Thunderbolt link ({THUNDERBOLT_MS} ms)", min(THUNDERBOLT_MS, latency_ms), gbit_s),
            ("a link without latency", 0.0, gbit_s),
            (f"{FASTER:.0f} times the bandwidth", latency_ms, gbit_s * FASTER),
        ):
            if (new_ms, new_gbit_s) != (latency_ms, gbit_s):
                links = with_link(self.cost.links, Link(frozenset((a, b)), new_ms, new_gbit_s))
                values = {"between": ends, "latency_ms": new_ms, "bandwidth_gbit_s": new_gbit_s}
                words = f"{what} between {' and '.join(ends)}"
                yield Change("link", words, self.cost.nodes, links, values)

    def _with(self, change: Change) -> float:
        """The objective of the ring as it is, in the changed cluster."""
        cost = CostModel(self.cost.model, change.nodes, change.links, self.cost.work)
        return objective_ms(cost, self.stages, self.options.objective)


def plan_ms(plan: Plan, objective: str) -> float:
    """What the plan predicts of its objective."""
    match objective:
        case "throughput":
            return 1e3 / plan.predicted.throughput_tok_s
        case "ttft":
            return 1e3 * plan.predicted.ttft_s
        case _:
            return 1e3 / plan.predicted.decode_tok_s


def with_more_memory(node: NodeProfile, nbytes: int = GB) -> NodeProfile:
    """The node with a budget that is larger by so much."""
    cap_bytes = None if node.cap_bytes is None else node.cap_bytes + nbytes
    return replace(
        node,
        memory_bytes=node.memory_bytes + nbytes,
        ceiling_bytes=node.ceiling_bytes + nbytes,
        cap_bytes=cap_bytes,
    )


def with_twin(
    nodes: Sequence[NodeProfile], links: Sequence[Link], index: int
) -> tuple[list[NodeProfile], list[Link]]:
    """One node more like that at `index`, on a host of its own and with the same links to the others."""
    like, rank = nodes[index], 1 + max(node.rank for node in nodes)
    twin = replace(like, rank=rank, name=f"{like.name}+1", host=f"{like.host}+1", layers=None, num_sharing=1)
    own = [
        replace(link, ranks=link.ranks - {like.rank} | {rank})
        for link in links
        if like.rank in link.ranks and len(link.ranks) == 2
    ]
    return [*nodes, twin], [*links, *own]


def with_link(links: Sequence[Link], link: Link) -> list[Link]:
    """The links with one of them in the place of what there was."""
    return [*(other for other in links if other.ranks != link.ranks), link]
