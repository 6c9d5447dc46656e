"""The one timer of a process: it beats, and does not blame peers for a stop of its own process."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue

from cluster import heartbeat
from tests.edges import WAIT_S, raw, receiving, sending, step
from tests.waiting import is_in_time


def test_beats_go_both_ways_and_measure_the_hop() -> None:
    with receiving() as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        begin = time.monotonic()
        for _ in range(5):
            assert receiver.beats.get(timeout=WAIT_S).progress == 7
            beat = sender.beats.get(timeout=WAIT_S)
            assert (beat.progress, beat.activity) == (11, "computing")
        assert time.monotonic() - begin > 0.5
        assert is_in_time(time.monotonic() - begin, 3.0)
        hops_ms = edge.recent_hop_ms()
        assert len(hops_ms) >= 5
        assert 0 < min(hops_ms) < 100


def test_a_long_computation_is_not_silence() -> None:
    """Nobody consumes and nothing is sent for longer than the limit: the edge stays."""
    with receiving() as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        edge.send(step(), [raw(10)])
        for _ in range(8):
            sender.beats.get(timeout=WAIT_S)
        assert edge.is_up
        receiver.frames.get(timeout=WAIT_S).consume()
        assert edge.send(step(2), [raw(10)])
        assert receiver.frames.get(timeout=WAIT_S).frame.seq == 2
        assert sender.downs.empty()


def test_a_stop_of_our_own_process_is_not_the_peers_silence() -> None:
    """The timer thread counts at most two ticks for one, however long it could not run."""
    counted: SimpleQueue[float] = SimpleQueue()

    class Slow:
        def tick(self, elapsed_s: float) -> None:
            counted.put(elapsed_s)
            threading.Event().wait(0.5)

    watched = Slow()
    timer = heartbeat.Heartbeat()
    timer.watch(watched)
    seconds = [counted.get(timeout=WAIT_S) for _ in range(3)]
    timer.unwatch(watched)
    assert max(seconds) <= 2 * heartbeat.TICK_S + 1e-9
