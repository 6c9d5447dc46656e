"""What a small frame takes over an edge through a relay without delay, before any ring runs."""

from __future__ import annotations

import statistics
import time

from tests.edges import WAIT_S, Receiver, Sender, raw, step
from tests.relay import RelayProcess, Shape

REST_S = 0.01  # before each, as a ring rests
NUM_FRAMES = 60
PAYLOAD_BYTES = 2048


def hop_ms() -> float:
    """The median of one way, from send() to the thread that waits for the frame."""
    receiver = Receiver()
    try:
        with RelayProcess([(receiver.port, Shape())]) as relays:
            sender = Sender(f"127.0.0.1:{relays.ports[0]}")
            try:
                sender.up()
                return statistics.median(_one_ms(sender, receiver, seq) for seq in range(1, NUM_FRAMES))
            finally:
                sender.edge.close()
    finally:
        receiver.close()


def _one_ms(sender: Sender, receiver: Receiver, seq: int) -> float:
    frame, payload = step(seq), raw(PAYLOAD_BYTES)
    time.sleep(REST_S)
    started = time.perf_counter()
    sender.edge.send(frame, [payload])
    incoming = receiver.frames.get(timeout=WAIT_S)
    took_ms = (time.perf_counter() - started) * 1e3
    incoming.consume()
    return took_ms
