"""The near end of a link's measurement: one stream to one address, round trips first, then bandwidth.

The same kind of stream, channel options and frames as an edge (cluster/edge_sender.py). `measure` runs in the
thread that calls it; the timer thread ends a stream that stalls.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError

from cluster.edge_sender import PROTOCOL
from cluster.heartbeat import heartbeat
from cluster.link_service import PROBE_METHOD
from cluster.rpc import open_channel, split_address, token_metadata
from cluster.stream import Stream, StreamEnded, open_stream
from cluster.tls import Credentials
from proto import ring_pb2
from proto.codec import PART_BYTES, Tensor, encode

GREETING_LIMIT_S = 3.0  # for connection and WELCOME
SILENCE_LIMIT_S = 3.0
LIMIT_S = 15.0  # for everything
NUM_WARMUP = 3  # round trips that do not count: threads wake up, and TCP gets to know the way
NUM_ROUND_TRIPS = 300
MIN_ROUND_TRIPS = 5
ROUND_TRIPS_S = 1.5
ECHO_BYTES = 256  # so few that they cost no time on the line
MIN_BULK_BYTES = 16 << 10  # the first frames: a slow link is found out before it is filled
BULK_S = 1.0  # and at least BULK_ROUND_TRIPS, but no more than MAX_BULK_S
BULK_ROUND_TRIPS, MAX_BULK_S = 12, 4.0
MAX_BULK_BYTES = 64 << 20
MAX_WINDOW_BYTES = 8 << 20
COUNTED_SHARE = 0.6  # of the bytes, the last ones: the stream finds its pace before
_UNREACHABLE = "No route to host"


class LinkError(Exception):
    """A link could not be measured; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """What a way does, from here to there; times are whole round trips."""

    round_trip_p50_ms: float
    round_trip_p99_ms: float
    num_round_trips: int
    bandwidth_gbit_s: float
    num_bytes: int


def measure(
    address: str, credentials: Credentials | str | None, hello: ring_pb2.Hello, *, peer: str | None = None
) -> LinkSpeed:
    """Measure the way to the node that listens at `address`; takes LIMIT_S at most. Raises LinkError.

    peer: the node's name, which its certificate must have.
    """
    shown = Credentials.of(credentials)
    if reason := why_no_connection(address):
        raise LinkError(reason)
    channel = open_channel(address, shown, peer)
    try:
        return _Probe(address, open_stream(channel, PROBE_METHOD, token_metadata(shown.token))).run(hello)
    finally:
        channel.close()


class _Probe:
    def __init__(self, address: str, stream: Stream) -> None:
        self._address, self._stream = address, stream
        self._limit_s = GREETING_LIMIT_S  # of silence
        self._silent_s = self._age_s = 0.0
        self._broken = ""  # why we gave up
        self._replies: Iterator[bytes] = iter(())

    def run(self, hello: ring_pb2.Hello) -> LinkSpeed:
        greeting = ring_pb2.Hello()
        greeting.CopyFrom(hello)
        greeting.protocol = PROTOCOL
        self._stream.put(ring_pb2.Frame(kind=ring_pb2.HELLO, hello=greeting).SerializeToString())
        self._replies = iter(self._stream)
        heartbeat.watch(self)
        try:
            window_bytes = self._welcome()
            self._limit_s = SILENCE_LIMIT_S
            times_ms = self._round_trips()
            round_trip_s = times_ms[len(times_ms) // 2] / 1e3
            gbit_s, num_bytes = self._bandwidth(min(window_bytes, MAX_WINDOW_BYTES), round_trip_s)
        except StreamEnded as ended:
            raise LinkError(self._why(ended)) from None
        finally:
            heartbeat.unwatch(self)
            self._stream.cancel()
            with contextlib.suppress(StreamEnded):
                for _ in self._replies:
                    pass
            self._stream.drain()
        return LinkSpeed(
            round_trip_p50_ms=times_ms[len(times_ms) // 2],
            round_trip_p99_ms=times_ms[int(len(times_ms) * 0.99)],
            num_round_trips=len(times_ms),
            bandwidth_gbit_s=gbit_s,
            num_bytes=num_bytes,
        )

    def tick(self, elapsed_s: float) -> None:
        """Timer thread: give up a peer that is silent, or so slow that no end is to be seen."""
        self._silent_s += elapsed_s
        self._age_s += elapsed_s
        if self._silent_s >= self._limit_s:
            self._give_up(f"{self._address} has been silent for {self._limit_s:g} s")
        elif self._age_s >= LIMIT_S:
            self._give_up(f"{self._address} is too slow to be measured in {LIMIT_S:g} s")

    def _give_up(self, reason: str) -> None:
        self._broken = self._broken or reason
        self._stream.cancel()

    # -- the calling thread ------------------------------------------------------------------------------
    def _next(self) -> ring_pb2.EdgeReply:
        """The next reply. Raises StreamEnded."""
        message = next(self._replies)
        self._silent_s = 0.0
        with contextlib.suppress(DecodeError):
            return ring_pb2.EdgeReply.FromString(message)
        return ring_pb2.EdgeReply()

    def _welcome(self) -> int:
        reply = self._next()
        if not reply.HasField("welcome"):
            raise LinkError(f"{self._address} answered HELLO with something else than WELCOME")
        return int(reply.welcome.window_bytes)

    def _credit(self, outstanding_bytes: int) -> int:
        reply = self._next()
        if not reply.HasField("credit") or not 0 < reply.credit.bytes <= outstanding_bytes:
            raise LinkError(
                f"{self._address} answered a measurement's frame with something else than its credit"
            )
        return int(reply.credit.bytes)

    def _round_trips(self) -> list[float]:
        """Milliseconds, sorted."""
        message = _message(os.urandom(ECHO_BYTES))
        times_ms: list[float] = []
        begin = time.perf_counter()
        for number in range(-NUM_WARMUP, NUM_ROUND_TRIPS):
            if number >= MIN_ROUND_TRIPS and time.perf_counter() - begin > ROUND_TRIPS_S:
                break
            sent_at = time.perf_counter()
            self._stream.put(message)
            self._credit(len(message))
            if number >= 0:
                times_ms.append((time.perf_counter() - sent_at) * 1e3)
        return sorted(times_ms)

    def _bandwidth(self, max_window_bytes: int, round_trip_s: float) -> tuple[float, int]:
        """Gbit/s and the bytes it took. The window grows with each credit, as TCP's does at the start.

        On a way of over 100 ms it has not grown enough in the time: then it is a lower bound.
        """
        limit_s = min(max(BULK_S, BULK_ROUND_TRIPS * round_trip_s), MAX_BULK_S)
        noise = os.urandom(PART_BYTES)  # a link that compresses gains nothing
        window, sent, credited, frame = 2 * MIN_BULK_BYTES, 0, 0, b""
        came: list[tuple[float, int]] = []  # when so many bytes had been credited
        begin = time.perf_counter()
        came.append((begin, 0))
        while True:
            is_enough = sent >= MAX_BULK_BYTES or (sent > 0 and time.perf_counter() - begin > limit_s)
            payload_bytes = min(max(window // 8, MIN_BULK_BYTES), PART_BYTES)
            while not is_enough and sent - credited + payload_bytes <= window and sent < MAX_BULK_BYTES:
                if payload_bytes > len(frame):  # grows seldom
                    frame = _message(noise[: 1 << (payload_bytes.bit_length() - 1)])
                self._stream.put(frame)
                sent += len(frame)
            if credited == sent:
                break
            nbytes = self._credit(sent - credited)
            credited += nbytes
            came.append((time.perf_counter(), credited))
            window = min(window + nbytes, max(max_window_bytes, 2 * MIN_BULK_BYTES))
        return _slope_gbit_s(came, round_trip_s), sent

    def _why(self, ended: StreamEnded) -> str:
        if self._broken:
            return self._broken
        if ended.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.OK):
            return f"the connection to {self._address} broke while it was measured"
        if ended.code is grpc.StatusCode.UNIMPLEMENTED:
            return f"{self._address} cannot be measured: install the same macrame on every node"
        return f"{self._address} refused: {ended.details}"


def _slope_gbit_s(came: Sequence[tuple[float, int]], round_trip_s: float) -> float:
    """Bytes over time of the last COUNTED_SHARE of the bytes, and of a round trip at least.

    The credits of a window come together, one round trip after those of the window before.
    """
    (begin_s, _), (end_s, total) = came[0], came[-1]
    good = [p for p in came[:-1] if p[1] <= (1 - COUNTED_SHARE) * total and end_s - p[0] >= round_trip_s]
    start_s, start = good[-1] if good else (begin_s, 0)
    return (total - start) * 8 / max(end_s - start_s, 1e-6) / 1e9


def _message(payload: bytes) -> bytes:
    frame = ring_pb2.Frame(kind=ring_pb2.STEP, is_batched=True)
    (message,) = encode(frame, [Tensor("uint8", (len(payload),), payload)])
    return message


def why_no_connection(address: str) -> str:
    """Why nobody can be reached there, in the system's words, which gRPC does not give; empty: it works."""
    host, port = split_address(address)
    try:
        socket.create_connection((host, port), timeout=GREETING_LIMIT_S).close()
    except TimeoutError:
        return f"{address} does not answer; is the machine on, and does a firewall let port {port} through?"
    except ConnectionRefusedError:
        return f"nobody listens at {address}; is the node running there?"
    except (OSError, UnicodeError) as error:
        return explain(address, error)
    return ""


def explain(address: str, error: Exception, platform: str = sys.platform) -> str:
    """A sentence for an error of connecting; on macOS it names the privacy setting that causes one."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    sentence = f"{address} cannot be reached: {reason}"
    if platform == "darwin" and _UNREACHABLE in reason:
        sentence += (
            " (errno 65): macOS gives this where a program may not use the local network; allow the terminal "
            "under System Settings > Privacy & Security > Local Network, or start the node from Terminal, "
            "over ssh or as a LaunchDaemon"
        )
    return sentence
