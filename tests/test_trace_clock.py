"""Clocks that run apart: the bounds hold the truth, and frames tighten them."""

from __future__ import annotations

import itertools
import random

import pytest

from cluster.trace_clock import DRIFT, Clock, Exchange, Moment, aligned


class Node:
    """Its clock is `ahead` of ours at 0 and runs faster by `drift`."""

    def __init__(self, ahead: float, drift: float, seed: int) -> None:
        self.ahead, self.drift, self._draw = ahead, drift, random.Random(seed)

    def reads(self, at: float) -> float:
        return at + self.ahead + self.drift * at

    def exchange(self, at: float) -> Exchange:
        there, back = self._draw.uniform(1e-4, 9e-4), self._draw.uniform(1e-4, 2e-3)
        received = at + there
        return Exchange(at, self.reads(received), self.reads(received + 1e-5), received + 1e-5 + back)

    def clock(self, *moments: float) -> Clock:
        told = [Moment.of([self.exchange(at + i * 4e-3) for i in range(12)]) for at in moments]
        return Clock(told[0], told[-1] if len(told) > 1 else None)


@pytest.mark.parametrize("seed", range(5))
def test_the_truth_lies_within_the_uncertainty(seed: int) -> None:
    node = Node(random.Random(seed).uniform(-1e6, 1e6), random.Random(seed).uniform(-5e-5, 5e-5), seed)
    clock = node.clock(0.0, 20.0)
    for at in (0.1, 7.0, 13.0, 19.9):
        assert abs(clock.ours(node.reads(at)) - at) <= clock.measured_uncertainty(node.reads(20.0)) + 1e-7
    assert clock.measured_uncertainty(node.reads(20.0)) < 1.5e-3
    assert clock.drift == pytest.approx(node.drift, abs=1e-4)


def test_a_clock_that_was_compared_once_grows_unsure() -> None:
    node = Node(5.0, 8e-5, 1)
    clock = node.clock(0.0)
    assert clock.drift is None
    late = clock.measured_uncertainty(node.reads(30.0))
    assert late == pytest.approx(clock.measured_uncertainty(node.reads(0.0)) + 30 * DRIFT, rel=0.02)
    assert abs(clock.ours(node.reads(30.0)) - 30.0) <= late


@pytest.mark.parametrize("seed", range(5))
def test_no_frame_arrives_before_it_was_sent(seed: int) -> None:
    draw = random.Random(seed)
    nodes = {rank: Node(draw.uniform(-9, 9), 0.0, seed * 7 + rank) for rank in range(3)}
    clocks = {rank: node.clock(0.0, 5.0) for rank, node in nodes.items()}
    way_s = 6e-5
    ways = {}
    for sender, receiver in itertools.pairwise([0, 1, 2, 0]):
        sent, arrived = nodes[sender].reads(2.0), nodes[receiver].reads(2.0 + way_s)
        ways[sender, receiver] = clocks[receiver].ours(arrived) - clocks[sender].ours(sent)
    until = {rank: node.reads(5.0) for rank, node in nodes.items()}
    better = aligned(clocks, until, ways)
    for (sender, receiver), least in ways.items():
        moved = least + better[receiver].correction - better[sender].correction
        assert moved >= -1e-12
    for rank, clock in better.items():
        assert clock.uncertainty <= clocks[rank].measured_uncertainty(until[rank]) + 1e-12
        assert abs(clock.ours(nodes[rank].reads(2.0)) - 2.0) <= clock.uncertainty + 1e-9


def test_bounds_that_contradict_each_other_move_nothing() -> None:
    clocks = {rank: Clock(Moment(0.0, 0.0, 1e-4), Moment(1.0, 0.0, 1e-4)) for rank in range(2)}
    kept = aligned(clocks, {0: 1.0, 1: 1.0}, {(0, 1): -1.0})
    assert [clock.correction for clock in kept.values()] == [0.0, 0.0]
    assert [clock.uncertainty for clock in kept.values()] == [1e-4, 1e-4]


def test_exchanges_that_contradict_each_other_leave_the_shortest() -> None:
    moment = Moment.of([Exchange(0, 0.5, 0.5, 1.0), Exchange(2.0, 9.0, 9.0, 2.1)])
    assert (moment.ahead, moment.uncertainty) == (pytest.approx(6.95), pytest.approx(0.05))
