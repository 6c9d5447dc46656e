"""What a relay of the tests costs: round trip added, bytes a second at most, how late a delay is.

    python -m tests.benchmarks.relay_cost

The relay runs in a process of its own, client and echo in this one; median of 2000 round trips of 64 bytes.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time

from tests.relay import RelayProcess, Shape


def serve_echo(listener: socket.socket) -> None:
    with listener:
        while True:
            end, _ = listener.accept()
            with end:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if not (data := end.recv(1)):
                    return
                while data:
                    if data[:1] == b"e":
                        end.sendall(data)
                    data = end.recv(1 << 20)


def round_trip_ms(port: int, count: int) -> float:
    """The median for 64 bytes."""
    message, times = b"e" * 64, []
    with socket.create_connection(("127.0.0.1", port)) as end:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            started = time.perf_counter()
            end.sendall(message)
            left = len(message)
            while left:
                left -= len(end.recv(left))
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def one_way_bytes_s(port: int, seconds: float) -> float:
    data, sent = bytes(1 << 20), 0
    started = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as end:
        while (now := time.perf_counter()) < started + seconds:
            end.sendall(data)
            sent += len(data)
    return sent / (now - started)


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    echo = threading.Thread(target=serve_echo, args=(listener,))
    echo.start()
    plain_ms, plain_bytes_s = round_trip_ms(port, 2000), one_way_bytes_s(port, 1.0)
    with RelayProcess([(port, Shape()), (port, Shape(5.0))]) as relays:
        free, slow = relays.ports
        free_ms, free_bytes_s = round_trip_ms(free, 2000), one_way_bytes_s(free, 1.0)
        more_ms = free_ms - plain_ms
        print(f"round trip: {plain_ms:.3f} ms, through the relay {free_ms:.3f}: {more_ms:.3f} more")
        print(f"one way: {plain_bytes_s / 1e9:.2f} GB/s, through the relay {free_bytes_s / 1e9:.2f}")
        late_ms = round_trip_ms(slow, 100) - free_ms - 10.0
        print(f"a delay of 5 ms each way: the round trip is {late_ms:.3f} ms late")
    with socket.create_connection(("127.0.0.1", port)):
        pass  # ends the echo
    echo.join()


if __name__ == "__main__":
    main()
