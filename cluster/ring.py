"""The data plane: an edge is one bidirectional stream from a rank to the next, for one epoch.

EdgeSender is its sending end, EdgeService receives all edges of a node. Frames go down the stream; WELCOME,
credits and the answers to heartbeats come up. Credit is counted in bytes of messages: what was sent and not
consumed yet stays within the window that the receiver named in WELCOME, but a frame larger than the window
may go when nothing is outstanding except what the receiver may still owe (CREDIT_BATCH_BYTES). The sender
beats every 200 ms and the receiver answers each beat at once, which proves both alive and measures the
round trip; after 1.0 s of silence an end gives up.
"""

from __future__ import annotations

from cluster.edge_sender import CREDIT_BATCH_BYTES, NOT_ASSIGNED, PROTOCOL, EdgeSender
from cluster.edge_service import WINDOW_BYTES, EdgeService, IncomingFrame
from cluster.heartbeat import BEAT_INTERVAL_S, SILENCE_LIMIT_S

__all__ = [
    "BEAT_INTERVAL_S",
    "CREDIT_BATCH_BYTES",
    "NOT_ASSIGNED",
    "PROTOCOL",
    "SILENCE_LIMIT_S",
    "WINDOW_BYTES",
    "EdgeSender",
    "EdgeService",
    "IncomingFrame",
]
