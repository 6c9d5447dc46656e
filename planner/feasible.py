"""Whether any order of many different nodes fits, by what each can reach. Pure.

For memory alone a stage may as well take all the layers that its node can hold: whatever follows has less
to do. So a set of nodes is worth the furthest boundary that some order of it reaches. Sets grow node by
node; one whose unused nodes cannot hold the rest, by any of several measures of layers, is dropped. Where
no more than the last of MAX_STATES sets are alive at once this is exact, beyond that those with the most to
spare stay, and a failure proves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.tables import Bools, Floats

Ints = NDArray[np.int64]
MAX_STATES = (100, 5000)  # tried in turn: few states find what is easy to place
MAX_ELEMENTS = 8_000_000  # of states x kinds x kinds


@dataclass(frozen=True, slots=True)
class Feasibility:
    """order: of nodes that hold everything, or None. is_proven: there is an order, or surely none."""

    order: tuple[int, ...] | None
    is_proven: bool


def reach_of(fits: Bools) -> Ints | None:
    """(B,) furthest boundary of a node's stage by its start, or the start itself.

    fits: (B, B). None where the node can hold some stage, but not a part of it: then nothing is proven here.
    """
    size = len(fits)
    starts = np.arange(size)
    stops = np.where(fits, starts[None, :], -1).max(axis=1)
    reach = np.maximum(stops, starts)
    is_prefix = fits.sum(axis=1) == reach - starts
    return reach if is_prefix.all() and (np.diff(reach) >= 0).all() else None


def find_order(reach: Mapping[int, Ints], forced: Sequence[tuple[int, int]], measures: Floats) -> Feasibility:
    """An order of the nodes that reaches the end.

    reach: (B,) by node. forced: boundaries [start, stop) that other nodes hold for sure. measures: (M, B)
    sums over the layers, from 0 up, of anything that layers have.
    """
    search = _Search(reach, forced, measures)
    for max_states in MAX_STATES:
        found = search.run(max_states)
        if found.is_proven:
            break
    return found


class _Search:
    def __init__(
        self, reach: Mapping[int, Ints], forced: Sequence[tuple[int, int]], measures: Floats
    ) -> None:
        self.size = measures.shape[1]
        jump = np.arange(self.size)
        for start, stop in sorted(forced, reverse=True):
            jump[start] = jump[stop]
        self.start = int(jump[0])
        groups: dict[bytes, list[int]] = {}
        for node, own in reach.items():
            step = jump[own]
            if (step > np.arange(self.size)).any():
                groups.setdefault(step.tobytes(), []).append(node)
        self.kinds = list(groups.values())
        steps = [np.frombuffer(key, dtype=jump.dtype) for key in groups]
        self.steps = np.array(steps, dtype=np.int64).reshape(len(steps), self.size)  # (K, B)
        # (M, B) what is left to hold from a boundary on; forced layers weigh nothing
        weights = np.diff(measures)
        for start, stop in forced:
            weights[:, start:stop] = 0.0
        sums = np.concatenate([np.zeros((len(measures), 1)), np.cumsum(weights, axis=1)], axis=1)
        self.rest = sums[:, -1:] - sums
        # (M, K, B) the most that a node holds from a boundary on
        held = sums[:, self.steps] - sums[:, None, :]
        self.held = np.maximum.accumulate(held[:, :, ::-1], axis=2)[:, :, ::-1]
        self.available = np.array([len(kind) for kind in self.kinds], dtype=np.int64)

    def run(self, max_states: int) -> Feasibility:
        """With so many sets at once."""
        end = self.size - 1
        if self.start == end:
            return Feasibility((), True)
        num_kinds = len(self.kinds)
        max_states = max(1, min(max_states, MAX_ELEMENTS // max(1, num_kinds) ** 2))
        rng = np.random.default_rng(0)
        salt = rng.integers(1, 2**62, num_kinds, dtype=np.int64)
        used = np.zeros((1, num_kinds), dtype=np.int64)
        at = np.array([self.start])
        history: list[tuple[Ints, Ints]] = []  # (state before, kind) of each state, level by level
        is_exact = True
        for _ in range(int(self.available.sum())):
            is_open = (used < self.available) & (at[:, None] < self.steps[:, at].T)
            state, kind = np.nonzero(is_open)
            if not len(state):
                break
            reached = self.steps[kind, at[state]]
            done = np.flatnonzero(reached == end)
            if len(done):
                return Feasibility(self._trace(history, int(state[done[0]]), int(kind[done[0]])), True)
            grown = used[state]
            grown[np.arange(len(kind)), kind] += 1
            kept = _distinct(grown, reached, salt)
            slack = self._slack(grown[kept], reached[kept])
            kept, slack = kept[slack >= 0], slack[slack >= 0]
            if len(kept) > max_states:
                is_exact = False
                kept = kept[np.argsort(-slack, kind="stable")[:max_states]]
            history.append((state[kept], kind[kept]))
            used, at = grown[kept], reached[kept]
        return Feasibility(None, is_exact)

    def _slack(self, used: Ints, at: Ints) -> Floats:
        """(S,) by how much the unused nodes could hold more than is left, as a share of it; the least of all
        measures. Sums are rounded, so an exact fit counts as one.
        """
        left = self.available - used  # (S, K)
        held = np.einsum("sk,mks->ms", left, self.held[:, :, at])
        rest = self.rest[:, at]
        share = np.divide(held, rest, out=np.full_like(held, np.inf), where=rest > 0) - 1
        return np.asarray(share.min(axis=0) + 1e-9)

    def _trace(self, history: list[tuple[Ints, Ints]], state: int, kind: int) -> tuple[int, ...]:
        """The nodes of a path, from its last kind back."""
        path = [kind]
        for before, kinds in reversed(history):
            path.append(int(kinds[state]))
            state = int(before[state])
        members = [iter(kind) for kind in self.kinds]
        return tuple(next(members[k]) for k in reversed(path))


def _distinct(used: Ints, at: Ints, salt: Ints) -> Ints:
    """Of the states with the same nodes the one that reaches furthest, by index."""
    with np.errstate(over="ignore"):
        code = used @ salt  # wraps around; equal codes are compared
    order = np.lexsort((-at, code))
    is_same = (code[order[1:]] == code[order[:-1]]) & (used[order[1:]] == used[order[:-1]]).all(axis=1)
    return np.sort(order[np.concatenate([[True], ~is_same])])
