"""What no ring can be below: each node may have several stages, but pays for its use. Pure.

The Lagrangian relaxation of "each node at most once": a price per node is added to each of its stages, the
cheapest walk through nodes and layers is found without looking back, and all prices are taken off again. For
any prices that is a lower bound (Held and Karp 1971); subgradient steps raise it. Prices start at what a
node's memory saves over the slowest node that is needed. Stages are kept as bands, as no node holds more
than its width of layers, and nodes with equal hops share them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.any_order import Ring, kinds_of
from planner.bands import band_by_start, width_of
from planner.goals import Goal
from planner.tables import Floats

MAX_BAND_ELEMENTS = 1 << 24  # of all nodes' stages
MAX_KINDS = 64  # of nodes by their hops
NUM_ROUNDS = 40  # of prices, for the sum
NUM_SPLITS, SPLIT_ROUNDS = 10, 8  # of the range of beats


@dataclass(frozen=True, slots=True)
class _Walk:
    """The cheapest walk under some prices, and how often it uses each node."""

    total: float
    uses: Floats  # (N,)


class Relaxation:
    """All rings of a goal, relaxed. `nodes` in the order of the arrays; prices are (N,) ms."""

    def __init__(self, ring: Ring, goal: Goal, kinds: list[list[int]], bands: tuple[Floats, Floats]) -> None:
        self.nodes, self.size = [i for kind in kinds for i in kind], ring.size
        self._kind = np.repeat(np.arange(len(kinds)), [len(kind) for kind in kinds])  # (N,) by node
        self._first = np.array([0, *np.cumsum([len(kind) for kind in kinds])[:-1]])
        self._band, self._busy = bands  # (B, W, N) by start
        self.width = self._band.shape[1]
        self._hop, self._busy_hop = (_by_kind(hop, kinds, ring.head) for hop in (ring.hop, goal.busy_hop))
        self.prices = np.zeros(len(self.nodes))

    def bound(self, limit_ms: float, upper: float, num_rounds: int) -> float:
        """The best bound on the sum of rings that nothing keeps busy for longer than `limit_ms`.

        upper: about the sum of a good ring, for the length of the steps. The prices stay for the next call.
        """
        band = np.where(self._busy <= limit_ms, self._band, np.inf)
        hop = np.where(self._busy_hop <= limit_ms, self._hop, np.inf)
        best, prices, step = -np.inf, self.prices, 0.3
        momentum, num_stalled = np.zeros(len(prices)), 0
        for _ in range(num_rounds):
            walk = self._walk(band, hop, prices)
            if walk is None:
                return np.inf
            value = walk.total - float(prices.sum())
            if value > best:
                best, self.prices, num_stalled = value, prices, 0
            else:
                num_stalled += 1
                if num_stalled == 3:
                    step, num_stalled, prices = step * 0.6, 0, self.prices
            slope = walk.uses - 1.0
            slope[(prices <= 0) & (slope < 0)] = 0.0
            momentum = 0.7 * slope + 0.3 * momentum
            length = float(momentum @ momentum)
            if not slope.any() or length == 0.0:
                break
            prices = np.maximum(0.0, prices + step * max(upper - value, 0.0) / length * momentum)
        return best

    def _walk(self, band: Floats, hop: Floats, prices: Floats) -> _Walk | None:
        size, width, head = self.size, self.width, len(self._first)
        value = np.full((size, len(prices)), np.inf)  # at a boundary, the last stage on a node
        arrive = np.full((size, len(prices)), np.inf)  # before a stage on a node
        least = np.full((size, head), np.inf)  # of each kind at a boundary
        for at in range(size - 1):
            if at:
                least[at] = np.minimum.reduceat(value[at], self._first)
                before = (least[at][:, None] + hop[:head, :head]).min(axis=0)
            else:
                before = hop[head, :head]
            arrive[at] = before[self._kind] + prices
            stops = slice(at + 1, min(at + 1 + width, size))
            reached = arrive[at] + band[at, : stops.stop - stops.start]
            np.minimum(value[stops], reached, out=value[stops])
        ends = value[-1] + hop[self._kind, head]
        total = float(ends.min())
        if not np.isfinite(total):
            return None
        uses, at, node = np.zeros(len(prices)), size - 1, int(ends.argmin())
        while True:
            uses[node] += 1
            starts = np.arange(max(0, at - width), at)
            ways = arrive[starts, node] + band[starts, at - 1 - starts, node]
            at = int(starts[ways.argmin()])
            if at == 0:
                return _Walk(total, uses)
            kind = int((least[at] + hop[:head, self._kind[node]]).argmin())
            members = np.flatnonzero(self._kind == kind)
            node = int(members[value[at, members].argmin()])


def _bands(ring: Ring, goal: Goal, nodes: list[int]) -> tuple[Floats, Floats] | None:
    """Of the stages and of what keeps them busy; None where they are too large."""
    bands, largest = [], 1
    for i in nodes:
        table = ring.stage(i)
        width = width_of(table)
        largest = max(largest, width)
        if len(nodes) * ring.size * largest > MAX_BAND_ELEMENTS:
            return None
        own = band_by_start(table, width)
        bands.append(
            (own, own if goal.stage is goal.busy_stage else band_by_start(goal.busy_stage(i), width))
        )
    stage, busy = np.full((2, ring.size, largest, len(nodes)), np.inf)
    for number, (own, own_busy) in enumerate(bands):
        stage[:, : own.shape[1], number], busy[:, : own.shape[1], number] = own, own_busy
    return stage, busy


def _by_kind(hop: Floats, kinds: list[list[int]], head: int) -> Floats:
    """(H + 1, H + 1): from a kind to a kind, and the head; a node never follows itself."""
    first = np.array([*(kind[0] for kind in kinds), head])
    found: Floats = hop[np.ix_(first, first)].copy()
    for h, kind in enumerate(kinds):
        found[h, h] = hop[kind[0], kind[1]] if len(kind) > 1 else np.inf
    return found


def relax(ring: Ring, goal: Goal) -> Relaxation | None:
    """None where there are too many nodes."""
    nodes = [*ring.free, *(node for node, _, _ in ring.forced)]
    kinds = kinds_of(nodes, [ring.hop, goal.busy_hop], lambda _: None, MAX_KINDS)
    if kinds is None:
        return None
    bands = _bands(ring, goal, [i for kind in kinds for i in kind])
    return Relaxation(ring, goal, kinds, bands) if bands is not None else None


def least_value(
    relaxation: Relaxation, goal: Goal, good: tuple[float, float], least: tuple[float, float]
) -> float:
    """A value that no ring of the goal is below.

    good: sum and beat of a good ring. least: a sum and a beat that no ring is below, from elsewhere.
    """
    (total, beat_ms), (least_sum, least_beat_ms) = good, least
    least_sum = max(least_sum, relaxation.bound(np.inf, total, NUM_ROUNDS))
    if goal.value is None:
        return least_sum
    target = goal.value(total, beat_ms)
    # (least sum of rings whose beat is in it, from, to)
    ranges = [(least_sum, least_beat_ms, np.inf)]
    for _ in range(NUM_SPLITS):
        weakest = min(ranges, key=lambda r: goal_value(goal, r))
        if goal_value(goal, weakest) >= target:
            break
        own, low, high = weakest
        middle = (low + high) / 2 if np.isfinite(high) else max(beat_ms, low * 1.5)
        if goal.value(own, middle) <= goal.value(own, low):
            break  # the sum alone decides
        ranges.remove(weakest)
        below = max(own, relaxation.bound(middle, total, SPLIT_ROUNDS))
        ranges += [(below, low, middle), (own, middle, high)]
    return min(goal_value(goal, r) for r in ranges)


def goal_value(goal: Goal, beats: tuple[float, float, float]) -> float:
    """What rings are not below whose beat lies in a range: (their least sum, from, to)."""
    assert goal.value is not None
    return goal.value(beats[0], beats[1])
