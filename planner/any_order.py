"""The cheapest ring over any subset of nodes in any order, by exact dynamic programming. Pure.

A state is (how many nodes of each kind are used, the last one's kind, layers placed). Nodes are of one kind
where nothing tells them apart: same stages, same hops to all others. N different nodes and B boundaries give
2^N N B states and 2^N N B (N + B) steps, as in the dynamic program of Held and Karp (1962) for the travelling
salesman; N equal nodes only N B. Forced nodes stand at a fixed place and need no count.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from planner.pairs import up
from planner.tables import Floats

# Two costs whose relative distance is below this are equal: the sums of floats in another order.
TIE = 1e-9
MAX_STEPS = 1_500_000_000  # of the search below: a few seconds
MAX_KINDS = 20
_BLOCK = 1 << 20  # elements of one temporary array


@dataclass(frozen=True, slots=True)
class Placed:
    """Boundaries [start, stop) on a node."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Ring:
    """What may be placed where. Node indices are those of `hop`, of which the last row is the head."""

    size: int  # boundaries, B
    free: tuple[int, ...]  # nodes that may own layers, in the order that is preferred
    forced: tuple[tuple[int, int, int], ...]  # (node, start, stop), in order of start
    stage: Callable[[int], Floats]  # (B, B) cost of a node's stages, inf where not allowed; or pairs
    hop: Floats  # (N + 1, N + 1) cost from a node to a node, symmetric, inf where not allowed
    required: frozenset[int] = frozenset()  # free nodes that must own layers; only in a search of every order

    @property
    def head(self) -> int:
        return len(self.hop) - 1

    def total(self, placed: Sequence[Placed]) -> float:
        """The sum of stages and hops."""
        ends = [self.head, *(p.index for p in placed), self.head]
        hops = sum(float(self.hop[a, b]) for a, b in itertools.pairwise(ends))
        return hops + sum(float(self.stage(p.index)[p.start, p.stop]) for p in placed)


def kinds_of(
    free: Sequence[int],
    hops: Sequence[Floats],
    key_of: Callable[[int], object],
    max_kinds: int = MAX_KINDS,
) -> list[list[int]] | None:
    """The free nodes by kind, in order; None where there are more kinds than can be searched.

    Nodes with equal keys have equal stages. hops: (N + 1, N + 1) each, all of which must be alike.
    """
    kinds: list[list[int]] = []
    for i in free:
        kind = next((k for k in kinds if key_of(k[0]) == key_of(i) and _is_alike(hops, k[0], i)), None)
        if kind is not None:
            kind.append(i)
        elif len(kinds) == max_kinds:
            return None
        else:
            kinds.append([i])
    return kinds


def _is_alike(hops: Sequence[Floats], i: int, j: int) -> bool:
    others = np.ones(len(hops[0]), dtype=np.bool_)
    others[[i, j]] = False
    return all(np.array_equal(hop[i][others], hop[j][others]) for hop in hops)


def num_steps(ring: Ring, kinds: Sequence[Sequence[int]]) -> int:
    """About how many additions `cheapest_in_any_order` makes."""
    num_states = prod(len(kind) + 1 for kind in kinds)
    return num_states * len(kinds) * ring.size * (ring.size + len(kinds) + len(ring.forced))


def cheapest_in_any_order(
    ring: Ring, kinds: Sequence[Sequence[int]], *, is_wide: bool = False, tie: float = TIE
) -> tuple[float, list[Placed]] | None:
    """The least sum of stages and hops, and a ring that has it; None where none is allowed.

    Of equally cheap ones that with the fewest stages, then the earliest nodes. is_wide: the cheapest of those
    with the most stages.
    """
    return _Search(ring, kinds, tie).best(is_wide)


class _Search:
    def __init__(self, ring: Ring, kinds: Sequence[Sequence[int]], tie: float) -> None:
        kinds = [sorted(kind, key=lambda i: i not in ring.required) for kind in kinds]
        self.ring, self.kinds, self.tie = ring, kinds, tie
        forced = [[node] for node, _, _ in ring.forced]
        first = [members[0] for members in (*kinds, *forced)]
        second = [members[1 % len(members)] for members in (*kinds, *forced)]
        self.num_kinds, self.head = len(kinds), len(first)  # the column of the head
        rows = np.array([*first, ring.head])
        self.hop = ring.hop[np.ix_(rows, rows)].copy()  # (K + 1, K + 1) by kind
        for k, (a, b) in enumerate(zip(first, second, strict=True)):
            self.hop[k, k] = ring.hop[a, b]
        self.stage = [ring.stage(members[0]) for members in (*kinds, *forced)]
        radix = [1]
        for kind in kinds:
            radix.append(radix[-1] * (len(kind) + 1))
        self.radix = radix[:-1]
        states = np.arange(radix[-1])
        # (states, kinds) nodes used of each kind
        self.counts = (
            np.stack(
                [states // r % (len(kind) + 1) for r, kind in zip(self.radix, kinds, strict=True)], axis=1
            )
            if kinds
            else np.zeros((1, 0), dtype=np.int64)
        )
        self.level = self.counts.sum(axis=1)
        # (states, K + 1, B) least cost with the last stage on a kind
        self.value = np.full((radix[-1], self.head + 1, ring.size), np.inf, self.hop.dtype)
        self.value[0, self.head, 0] = 0.0
        self._fill()

    def _fill(self) -> None:
        for level in range(int(self.level.max()) + 1):
            states = np.flatnonzero(self.level == level)
            for kind in range(self.num_kinds):
                mine = states[self.counts[states, kind] > 0]
                if len(mine):
                    self._extend(mine, kind)
            for k, (_, start, stop) in enumerate(self.ring.forced, self.num_kinds):
                arrive = (self.value[states, :, start] + self.hop[:, k]).min(axis=1)
                self.value[states, k, stop] = arrive + self.stage[k][start, stop]

    def _extend(self, states: np.ndarray[tuple[int], np.dtype[np.int64]], kind: int) -> None:
        """All stages of one more node of `kind`, after every state without it."""
        before = states - self.radix[kind]
        stage, size = self.stage[kind], self.ring.size
        block = max(1, _BLOCK // (size * max(size, self.head + 1)))
        for at in range(0, len(states), block):
            arrive = (self.value[before[at : at + block]] + self.hop[:, kind, None]).min(axis=1)
            self.value[states[at : at + block], kind] = (arrive[:, :, None] + stage).min(axis=1)

    def best(self, is_wide: bool) -> tuple[float, list[Placed]] | None:
        ends = self.value[:, :, -1] + self.hop[:, self.head]  # (states, K + 1)
        least = ends.min(axis=1)
        for k, kind in enumerate(self.kinds):
            least[self.counts[:, k] < len(self.ring.required.intersection(kind))] = np.inf
        if not np.isfinite(least).any():
            return None
        if is_wide:
            widest = self.level[np.isfinite(least)].max()
            least = np.where(self.level == widest, least, np.inf)
        cost = least.min()
        tied = np.flatnonzero(least <= up(cost, self.tie))
        state = min(tied.tolist(), key=lambda s: (int(self.level[s]), self._members(s)))
        return cost, self._trace(state, self._latest(ends[state]))

    def _trace(self, state: int, kind: int) -> list[Placed]:
        """The stages that lead to a state, from the last one back."""
        path: list[tuple[int, int, int]] = []  # (kind, start, stop)
        at = self.ring.size - 1
        while kind != self.head:
            if kind >= self.num_kinds:
                start = self.ring.forced[kind - self.num_kinds][1]
                arrive = self.value[state, :, start] + self.hop[:, kind]
            else:
                state -= self.radix[kind]
                ways = self.value[state] + self.hop[:, kind, None] + self.stage[kind][:, at]  # (K + 1, B)
                start = int(np.flatnonzero(ways.min(axis=0) <= up(ways.min(), self.tie))[0])
                arrive = ways[:, start]
            path.append((kind, start, at))
            at, kind = start, self._latest(arrive)
        members = [iter(kind) for kind in (*self.kinds, *([node] for node, _, _ in self.ring.forced))]
        return [Placed(next(members[k]), start, stop) for k, start, stop in reversed(path)]

    def _latest(self, costs: Floats) -> int:
        """Of the cheapest kinds the one whose nodes stand last, so that rings run in the order of nodes."""
        tied = np.flatnonzero(costs <= up(costs.min(), self.tie)).tolist()
        nodes = [*(kind[0] for kind in self.kinds), *(node for node, _, _ in self.ring.forced), -1]
        return max(tied, key=lambda k: nodes[k])

    def _members(self, state: int) -> list[int]:
        """The nodes that a state uses, in order."""
        counts = self.counts[state].tolist()
        return sorted(i for kind, n in zip(self.kinds, counts, strict=True) for i in kind[:n])
