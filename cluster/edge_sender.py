"""The sending end of an edge.

A peer may have several places where it listens: they are tried in turn, the best first, and none but the
last one, which the config names, can refuse the edge for good.
`send` never blocks, on any thread. An edge thread connects, greets, reads replies and makes all callbacks.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import grpc
from google.protobuf.message import DecodeError

from cluster.call_trouble import connection_trouble
from cluster.heartbeat import BEAT_INTERVAL_S, SILENCE_LIMIT_S, TICK_S, heartbeat
from cluster.peer_links import Place
from cluster.rpc import open_channel, token_metadata
from cluster.stream import Stream, StreamEnded, open_stream
from cluster.tls import Credentials
from cluster.tls_trouble import handshake_trouble
from cluster.trace_recorder import Kind, recorder
from proto import ring_pb2
from proto.codec import Tensor, encode

EDGE_METHOD = "/macrame.v1.Ring/Edge"
NOT_ASSIGNED = "not assigned to this epoch yet"
PROTOCOL = 1
CREDIT_BATCH_BYTES = 64 << 10  # a receiver owes at most so much before it sends a credit
MAX_WAITING_BYTES = 512 << 20  # of frames that wait for credit
CONNECT_LIMIT_S = 2.0  # for connection and WELCOME, then the attempt begins anew
CLOSE_LIMIT_S = 0.8
RETRY_S, MAX_RETRY_S = 0.05, 0.5
NUM_ROUND_TRIPS = 64
_FINAL_CODES = frozenset(
    (
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
    )
)
# Codes with which gRPC itself ends a stream whose connection is gone.
_TRANSPORT_CODES = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    )
)

_Mark = tuple[
    int, int, float
]  # of a frame, while it is traced: its number, its kind, and when it was in bytes


class EdgeSender:
    """One edge of one epoch, from connecting to the end; after on_down or on_refused it is over.

    It retries until the peer is there and assigned to the epoch. Callbacks run one at a time on the edge
    thread and none begins after close(): on_up() once the peer said WELCOME and on_down(reason) when that
    is over, or on_refused(reason) alone. `beat` is asked on the timer thread and must be quick; `places` on
    the edge thread, at each start and whenever all that it gave were tried. `place` is the one in use.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials | str | None,
        hello: ring_pb2.Hello,
        *,
        peer: str | None = None,
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        on_refused: Callable[[str], None],
        beat: Callable[[], ring_pb2.Beat],
        on_beat: Callable[[ring_pb2.Beat], None] | None = None,
        places: Callable[[], Sequence[Place]] | None = None,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        self._silence_limit_s = silence_limit_s
        self._places = places or (lambda: (Place(address),))
        self._configured, self.place = address, Place(address)
        self._name, self._credentials = peer, Credentials.of(credentials)
        self._metadata = token_metadata(self._credentials.token)
        self._hello = ring_pb2.Hello()
        self._hello.CopyFrom(hello)
        self._hello.protocol = PROTOCOL
        self._on_up, self._on_down, self._on_refused = on_up, on_down, on_refused
        self._beat, self._on_beat = beat, on_beat
        self._is_told_to_wait = False  # by the peer that the last attempt was made at
        self._closing = threading.Event()
        self._waiting_for = f"{self._peer}: connecting"
        self._lock = threading.Lock()  # guards what follows
        self._stream: Stream | None = None
        self._outbox: Stream | None = None  # the stream, while the edge is up
        self._waiting: deque[tuple[list[bytes], int, _Mark | None]] = deque()  # frames without credit yet
        self._waiting_bytes = 0
        self._window_bytes = 0
        self._outstanding_bytes = 0  # sent, and no credit for them yet
        self._broken = ""  # why we gave the stream up
        self._silent_s = 0.0
        self._since_beat_s = 0.0
        self._beats_sent: deque[float] = deque()  # perf_counter() of those not answered yet
        self._round_trips_ms: deque[float] = deque(maxlen=NUM_ROUND_TRIPS)
        self._thread = threading.Thread(target=self._run, name=f"edge to {self._peer}", daemon=True)
        self._thread.start()

    @property
    def _peer(self) -> str:
        return f"rank {self._hello.to_rank} at {self.place.address}"

    @property
    def to_rank(self) -> int:
        return int(self._hello.to_rank)

    @property
    def is_up(self) -> bool:
        """Frames can be sent."""
        return self._outbox is not None

    @property
    def waiting_for(self) -> str:
        """What a connecting edge waits for, for people; empty once it is up."""
        return "" if self.is_up else self._waiting_for

    def recent_hop_ms(self) -> list[float]:
        """One way times: half of each of the latest heartbeats' round trips."""
        with self._lock:
            return [round_trip_ms / 2 for round_trip_ms in self._round_trips_ms]

    def send(self, frame: ring_pb2.Frame, tensors: Sequence[Tensor] = ()) -> bool:
        """Queue a frame; False, and nothing happens, while the edge is not up. Never blocks.

        Raises WireError for a frame that the format cannot carry.
        """
        began = time.perf_counter() if recorder.on else 0.0
        messages = encode(frame, tensors)
        nbytes = sum(map(len, messages))
        mark = self._encoded(frame, nbytes, began) if began else None
        with self._lock:
            outbox = self._outbox
            if outbox is None:
                return False
            if not self._waiting and self._may_go(nbytes):
                self._outstanding_bytes += nbytes
                _hand_over(messages, nbytes, outbox, self.to_rank, mark)
                return True
            self._waiting.append((messages, nbytes, mark))
            self._waiting_bytes += nbytes
            if self._waiting_bytes > MAX_WAITING_BYTES:
                self._give_up(f"{self._peer} does not keep up: {self._waiting_bytes} bytes wait to be sent")
                return False
        return True

    def close(self) -> None:
        """End the edge and its threads, within a second; may be called twice, and from a callback."""
        self._closing.set()
        with self._lock:
            self._give_up("closed")
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_LIMIT_S)

    def tick(self, elapsed_s: float) -> None:
        """Timer thread: send a beat when one is due, and give up a peer that is silent."""
        with self._lock:
            self._silent_s += elapsed_s
            self._since_beat_s += elapsed_s
            outbox = self._outbox
            limit_s = CONNECT_LIMIT_S if outbox is None else self._silence_limit_s
            if self._silent_s >= limit_s:
                self._give_up(f"{self._peer} has been silent for {limit_s:.1f} s")
            if self._broken or outbox is None or self._since_beat_s < BEAT_INTERVAL_S - TICK_S / 2:
                return
            self._since_beat_s = 0.0
        beat = self._beat()
        with self._lock:
            outbox.put(
                ring_pb2.Frame(kind=ring_pb2.BEAT, epoch=self._hello.epoch, beat=beat).SerializeToString()
            )
            self._beats_sent.append(time.perf_counter())

    # -- called with the lock held -----------------------------------------------------------------------
    def _may_go(self, nbytes: int) -> bool:
        """Within the window, or nothing outstanding but what the receiver may still owe."""
        return (
            self._outstanding_bytes + nbytes <= self._window_bytes
            or self._outstanding_bytes <= CREDIT_BATCH_BYTES
        )

    def _give_up(self, reason: str) -> None:
        if not self._broken:
            self._broken = reason
        if self._stream is not None:
            self._stream.cancel()

    # -- edge thread -------------------------------------------------------------------------------------
    def _run(self) -> None:
        pause_s = RETRY_S
        while not self._closing.is_set():
            for place in self._places():
                self.place = place
                if self._stay():
                    return
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, MAX_RETRY_S)

    def _stay(self) -> bool:
        """Attempts at the present place; True once the edge is over, False where another place is due.

        A channel whose connecting failed is not used again: gRPC would go on connecting while no stream waits
        for it, and then notices a connection only every 5 s.
        """
        channel = open_channel(self.place.address, self._credentials, self._name, self._silence_limit_s)
        pause_s = RETRY_S
        try:
            while not self._closing.is_set():
                stream = open_stream(channel, EDGE_METHOD, self._metadata)
                try:
                    outcome = self._attempt(stream)
                    if outcome is not None:
                        if not self._closing.is_set():
                            outcome()
                        return True
                finally:
                    stream.drain()  # takes up to the ping timeout where a frozen peer has left a full pipe
                if not self._is_told_to_wait:
                    return False
                self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, MAX_RETRY_S)
            return True
        finally:
            channel.close()

    def _attempt(self, stream: Stream) -> Callable[[], None] | None:
        """From HELLO to the stream's end; the callback that is due then, or None to try again."""
        stream.put(ring_pb2.Frame(kind=ring_pb2.HELLO, hello=self._hello).SerializeToString())
        with self._lock:
            self._stream, self._silent_s = stream, 0.0
            self._broken = "closed" if self._closing.is_set() else ""
            if self._broken:
                stream.cancel()
        heartbeat.watch(self)
        was_up = False
        try:
            for message in stream:
                if was_up:
                    self._take(message)
                else:
                    self._welcome(message, stream)
                    was_up = True
            raise AssertionError("a stream ends with StreamEnded")
        except StreamEnded as ended:
            return self._outcome(ended.code, ended.details, was_up)
        finally:
            heartbeat.unwatch(self)
            with self._lock:
                self._stream = self._outbox = None
                self._waiting.clear()
            stream.cancel()

    def _outcome(self, code: grpc.StatusCode, details: str, was_up: bool) -> Callable[[], None] | None:
        if was_up:
            if self._broken:
                reason = self._broken
            elif code in _TRANSPORT_CODES:
                reason = f"the connection to {self._peer} broke"
            else:
                reason = f"{self._peer} ended the edge: {details or 'it is closing'}"
            return lambda: self._on_down(reason)
        self._is_told_to_wait = details == NOT_ASSIGNED
        if code in _FINAL_CODES and self.place.address == self._configured:
            reason = f"{self._peer} refused the edge: {details}"
            return lambda: self._on_refused(reason)
        trouble = self._handshake_trouble(details) if code is grpc.StatusCode.UNAVAILABLE else ""
        self._waiting_for = trouble or f"{self._peer}: {self._broken or self._why(code, details)}"
        return None

    @staticmethod
    def _why(code: grpc.StatusCode, details: str) -> str:
        """A peer's own sentences stay as they are; gRPC's do not."""
        return connection_trouble(details) if code in _TRANSPORT_CODES else details or "no answer"

    def _handshake_trouble(self, details: str) -> str:
        if self._broken:
            return ""
        return handshake_trouble(self.place.address, self._credentials, self._peer, self._name, details)

    def _welcome(self, message: bytes, stream: Stream) -> None:
        reply = _parse(message)
        with self._lock:
            if not reply.HasField("welcome"):
                self._give_up(f"{self._peer} answered HELLO with something else than WELCOME")
                return
            self._window_bytes = reply.welcome.window_bytes
            self._outstanding_bytes = self._waiting_bytes = 0
            self._silent_s = self._since_beat_s = 0.0
            self._outbox = stream
        self._on_up()

    def _take(self, message: bytes) -> None:
        """A reply: any of them proves the peer alive."""
        self._silent_s = 0.0
        reply = _parse(message)
        body = reply.WhichOneof("body")
        if body == "beat":
            with self._lock:
                if self._beats_sent:
                    self._round_trips_ms.append((time.perf_counter() - self._beats_sent.popleft()) * 1e3)
            if self._on_beat is not None:
                self._on_beat(reply.beat)
        elif body == "credit":
            self._take_credit(reply.credit.bytes)
        else:
            with self._lock:
                self._give_up(
                    f"{self._peer} ended the edge: {reply.abort.reason}"
                    if body == "abort"
                    else f"{self._peer} sent a reply that is none"
                )

    def _take_credit(self, nbytes: int) -> None:
        with self._lock:
            if nbytes > self._outstanding_bytes:
                self._give_up(f"{self._peer} gave credit for {nbytes} bytes of {self._outstanding_bytes}")
                return
            self._outstanding_bytes -= nbytes
            outbox = self._outbox
            while outbox is not None and self._waiting and self._may_go(self._waiting[0][1]):
                messages, frame_bytes, mark = self._waiting.popleft()
                self._waiting_bytes -= frame_bytes
                self._outstanding_bytes += frame_bytes
                _hand_over(messages, frame_bytes, outbox, self.to_rank, mark)

    def _encoded(self, frame: ring_pb2.Frame, nbytes: int, began: float) -> _Mark:
        """For the trace: it is in bytes now."""
        now = time.perf_counter()
        recorder.add(Kind.ENCODED, frame.seq, began, now, peer=self.to_rank, numbers=(nbytes, frame.kind))
        return frame.seq, frame.kind, now


def _hand_over(
    messages: Sequence[bytes], nbytes: int, stream: Stream, to_rank: int, mark: _Mark | None
) -> None:
    """To gRPC. The other side may have them before this returns, so their way begins with it."""
    now = 0.0 if mark is None else time.perf_counter()
    for message in messages:
        stream.put(message)
    if mark is not None:
        seq, kind, since = mark
        recorder.add(Kind.SENT, seq, since, now, peer=to_rank, numbers=(nbytes, kind))


def _parse(message: bytes) -> ring_pb2.EdgeReply:
    """The reply; an empty one, which no peer sends, for bytes that are none."""
    with contextlib.suppress(DecodeError):
        return ring_pb2.EdgeReply.FromString(message)
    return ring_pb2.EdgeReply()
