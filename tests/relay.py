"""A TCP relay that shapes what passes it: delay, rate, stall and cut, each direction on its own.

It stands in for a link: connect to `address` instead of to `target`. One thread of its own moves all bytes;
the methods may be called from any thread. Nothing here needs netem, and no packet is lost: TCP loses none.

    python -m tests.relay 127.0.0.1:50051,delay_ms=5,bytes_s=1e6     relays in a process of their own

A byte that comes at t leaves at max(t, when the line is free) + its time on the line + the delay: pieces are
forwarded whole and in order, so a message is complete when its last byte has had its time. What the relay
costs itself (tests/benchmarks/relay_cost.py, two busy x86-64 processors): 0.03 to 0.04 ms a round trip, no
more than 1.4 GB/s, and a delay is late by about 0.1 ms, which the system takes to wake a sleeper.
"""

from __future__ import annotations

import argparse
import contextlib
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

PIECE_BYTES = 256 << 10
FREE_BYTES = 64 << 20  # that wait in a direction without a rate
SPARE_BYTES = 256 << 10  # that wait in one with a rate, beside those under way
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


@dataclass(frozen=True, slots=True)
class Shape:
    """One direction of a link; bytes_s 0: no limit."""

    delay_ms: float = 0.0
    bytes_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Way:
    """One direction of all connections, which share its line."""

    shape: Shape = Shape()
    is_stalled: bool = False
    free_at: float = 0.0
    num_bytes: int = 0

    @property
    def max_waiting_bytes(self) -> int:
        shape = self.shape
        return int(shape.bytes_s * shape.delay_ms / 1e3) + SPARE_BYTES if shape.bytes_s else FREE_BYTES

    def due(self, now: float, nbytes: int) -> float:
        if self.shape.bytes_s:
            self.free_at = max(now, self.free_at) + nbytes / self.shape.bytes_s
            now = self.free_at
        return now + self.shape.delay_ms / 1e3


@dataclass(slots=True, eq=False)
class _Lane:
    """One direction of one connection."""

    way: _Way
    source: socket.socket
    sink: socket.socket
    waiting: deque[tuple[float, memoryview]] = field(default_factory=deque)  # with when they may leave
    waiting_bytes: int = 0
    has_ended: bool = False  # the source will send no more
    is_done: bool = False  # and the sink has it all

    @property
    def can_read(self) -> bool:
        return not self.has_ended and self.waiting_bytes < self.way.max_waiting_bytes

    @property
    def due(self) -> float | None:
        """When the next piece leaves; None: there is none, or the direction is stalled."""
        return self.waiting[0][0] if self.waiting and not self.way.is_stalled else None

    def read(self) -> None:
        data = self.source.recv(PIECE_BYTES)
        if not data:
            self.has_ended = True
            return
        self.waiting.append((self.way.due(time.perf_counter(), len(data)), memoryview(data)))
        self.waiting_bytes += len(data)

    def write(self) -> None:
        """Sends what is due, as far as the sink takes it, and the end behind it."""
        while (due := self.due) is not None and due <= time.perf_counter():
            _, piece = self.waiting[0]
            try:
                sent = self.sink.send(piece)
            except BlockingIOError:
                return
            self.way.num_bytes += sent
            self.waiting_bytes -= sent
            if sent < len(piece):
                self.waiting[0] = due, piece[sent:]
                return
            self.waiting.popleft()
        if self.has_ended and not self.waiting and not self.way.is_stalled:
            self.is_done = True
            with contextlib.suppress(OSError):
                self.sink.shutdown(socket.SHUT_WR)


class Relay:
    """Listens on a free loopback port and forwards to `target`; a context manager."""

    def __init__(
        self, target: tuple[str, int], *, to_target: Shape = Shape(), to_client: Shape = Shape()
    ) -> None:
        self.target = target
        self._lock = threading.Lock()  # guards everything below; the thread holds it but while it waits
        self._ways = (_Way(to_target), _Way(to_client))
        self._pairs: list[tuple[_Lane, _Lane]] = []
        self._is_cut = False
        self._is_closing = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._waker, self._wakened = socket.socketpair()
        self._wakened.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"relay to {target[1]}", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- any thread ---------------------------------------------------------------------------------------
    @property
    def bytes_to_target(self) -> int:
        """Forwarded so far."""
        with self._lock:
            return self._ways[0].num_bytes

    @property
    def bytes_to_client(self) -> int:
        """Forwarded so far."""
        with self._lock:
            return self._ways[1].num_bytes

    @property
    def num_connections(self) -> int:
        """Open now."""
        with self._lock:
            return len(self._pairs)

    def shape(self, *, to_target: Shape | None = None, to_client: Shape | None = None) -> None:
        """From now on; what waits already leaves when it was due. None: as it is."""
        with self._changing():
            for way, shape in zip(self._ways, (to_target, to_client), strict=True):
                if shape is not None:
                    way.shape, way.free_at = shape, 0.0

    def stall(self, *, to_target: bool = True, to_client: bool = True) -> None:
        """Forward nothing more in these directions; connections stay open, and new ones are taken."""
        with self._changing():
            self._ways[0].is_stalled |= to_target
            self._ways[1].is_stalled |= to_client

    def resume(self) -> None:
        """Forward again, what has waited first."""
        with self._changing():
            for way in self._ways:
                way.is_stalled = False

    def cut(self) -> None:
        """Reset all connections, and each new one, until `mend`; what is under way is lost."""
        with self._changing():
            self._is_cut = True
            for pair in self._pairs:
                _reset(pair)
            self._pairs.clear()

    def mend(self) -> None:
        """Take connections again."""
        with self._changing():
            self._is_cut = False

    def close(self) -> None:
        """Reset everything and end the thread."""
        with self._changing():
            self._is_closing = True
        self._thread.join()
        for pair in self._pairs:
            _reset(pair)
        for end in (self._listener, self._waker, self._wakened):
            end.close()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            yield
        self._waker.send(b"\0")

    # -- the relay's thread -------------------------------------------------------------------------------
    def _run(self) -> None:
        with self._lock:
            while not self._is_closing:
                readable, writable = self._wait()
                if self._wakened in readable:
                    self._wakened.recv(4096)
                if self._listener in readable:
                    self._accept()
                for pair in list(self._pairs):
                    self._move(pair, readable, writable)

    def _wait(self) -> tuple[set[socket.socket], set[socket.socket]]:
        """Until something can be moved; the lock is free meanwhile."""
        readers, writers = [self._listener, self._wakened], []
        now, timeout_s = time.perf_counter(), None
        for lane in (lane for pair in self._pairs for lane in pair):
            if lane.can_read:
                readers.append(lane.source)
            if (due := lane.due) is None:
                continue
            if due <= now:
                writers.append(lane.sink)
            else:
                timeout_s = due - now if timeout_s is None else min(timeout_s, due - now)
        self._lock.release()
        try:
            readable, writable, _ = select.select(readers, writers, (), timeout_s)
        except (OSError, ValueError):  # a socket was cut meanwhile
            return set(), set()
        finally:
            self._lock.acquire()
        return set(readable), set(writable)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            if self._is_cut:
                _reset_end(client)
                return
            try:
                server = socket.create_connection(self.target, timeout=2.0)
            except OSError:
                _reset_end(client)
                return
            for end in (client, server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs.append((_Lane(self._ways[0], client, server), _Lane(self._ways[1], server, client)))

    def _move(
        self, pair: tuple[_Lane, _Lane], readable: set[socket.socket], writable: set[socket.socket]
    ) -> None:
        try:
            for lane in pair:
                if lane.source in readable and lane.can_read:
                    with contextlib.suppress(BlockingIOError):
                        lane.read()
                elif lane.sink not in writable and lane.due is None and not lane.has_ended:
                    continue
                if not lane.is_done:
                    lane.write()
        except OSError:  # one side reset: so is the other
            _reset(pair)
            self._pairs.remove(pair)
            return
        if all(lane.is_done for lane in pair):
            for lane in pair:
                lane.source.close()
            self._pairs.remove(pair)


def _reset(pair: tuple[_Lane, _Lane]) -> None:
    for lane in pair:
        _reset_end(lane.source)


def _reset_end(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        end.close()


class RelayProcess:
    """Relays in a process of their own, which no other thread's work slows down; a context manager.

    `ports[i]` leads to `targets[i]`, a port of 127.0.0.1. Their shapes stay as they are given here, each for
    both directions, or for the way to the target alone.
    """

    def __init__(self, targets: Sequence[tuple[int, Shape]], *, is_one_way: bool = False) -> None:
        routes = [
            f"127.0.0.1:{port},delay_ms={shape.delay_ms},bytes_s={shape.bytes_s},one_way={int(is_one_way)}"
            for port, shape in targets
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.relay", *routes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
        )
        assert self._process.stdout is not None
        self.ports = [int(self._process.stdout.readline()) for _ in routes]

    def __enter__(self) -> RelayProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input ends it


def _relay(route: str) -> Relay:
    target, *options = route.split(",")
    host, _, port = target.rpartition(":")
    given = {key: float(value) for key, _, value in (option.partition("=") for option in options)}
    shape = Shape(given.pop("delay_ms", 0.0), given.pop("bytes_s", 0.0))
    back = Shape() if given.pop("one_way", 0.0) else shape
    if given:
        raise SystemExit(f"{route}: the options are delay_ms, bytes_s and one_way")
    return Relay((host, int(port)), to_target=shape, to_client=back)


def main() -> None:
    parser = argparse.ArgumentParser(description="TCP relays that shape what passes them.")
    parser.add_argument("routes", nargs="+", help="HOST:PORT[,delay_ms=N][,bytes_s=N][,one_way=1]")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        for route in args.routes:
            print(stack.enter_context(_relay(route)).port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
