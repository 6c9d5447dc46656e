"""Seconds from a fault to the client's error, and from the repair to service, at the HTTP endpoint.

    python -m tests.benchmarks.failures [--rounds 3]

Faults: kill -9 and SIGSTOP of each rank of a three-stage demo ring while an answer is streamed. Repairs: the
node is started again, or gets SIGCONT. Service: the first completion that succeeds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

from tests.benchmarks.cpu_per_token import DEMO
from tests.ring_processes import RingProcesses

LAYERS = [(0, 3), (3, 7), (7, 9)]
LIMIT_S = 60.0
JSON = {"Content-Type": "application/json"}


class Stream(threading.Thread):
    """One long streamed completion; notes when it ended and how."""

    def __init__(self, port: int) -> None:
        super().__init__(name="stream")
        self.port = port
        self.running = threading.Event()
        self.ended_at = 0.0
        self.ending = ""
        self.start()

    def run(self) -> None:
        """Read until the end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        body = {"prompt": "def", "max_tokens": 900, "ignore_eos": True, "stream": True, "temperature": 0}
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), JSON)
            for line in connection.getresponse():
                if line.startswith(b"data: "):
                    self.ending = line.decode().strip()
                    self.running.set()
        except OSError as error:
            self.ending = f"connection ended: {error}"
        finally:
            self.ended_at = time.monotonic()
            self.running.set()
            connection.close()


def first_success(ring: RingProcesses) -> float:
    """When a completion first succeeds; asks every 50 ms."""
    deadline = time.monotonic() + LIMIT_S
    body = json.dumps({"prompt": "def f(", "max_tokens": 1, "temperature": 0})
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", ring.api_port, timeout=5.0)
        try:
            connection.request("POST", "/v1/completions", body, JSON)
            if connection.getresponse().status == 200:
                return time.monotonic()
        except OSError:
            pass
        finally:
            connection.close()
        threading.Event().wait(0.05)
    raise AssertionError(f"no service within {LIMIT_S} s; {ring.log(0)}")


def strike(ring: RingProcesses, fault: str, rank: int) -> tuple[float, float, str]:
    """(seconds to the error, seconds from the repair to service, how the stream ended)."""
    first_success(ring)
    stream = Stream(ring.api_port)
    assert stream.running.wait(LIMIT_S)
    at = time.monotonic()
    ring.kill(rank) if fault == "kill -9" else ring.pause(rank)
    stream.join(LIMIT_S)
    repaired = time.monotonic()
    if fault == "kill -9":
        ring.start(rank)
    else:
        ring.resume(rank)
    return stream.ended_at - at, first_success(ring) - repaired, stream.ending


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| fault | rank | s to the client's error | s from repair to service | the stream's last line |")
    print("| --- | --- | --- | --- | --- |")
    with (
        tempfile.TemporaryDirectory() as directory,
        RingProcesses(Path(directory), DEMO, LAYERS, with_api=True, context=1024) as ring,
    ):
        ring.wait_api()
        for fault in ("kill -9", "SIGSTOP"):
            for rank in range(len(LAYERS)):
                strikes = [strike(ring, fault, rank) for _ in range(args.rounds)]
                error_s, service_s = (statistics.median(s[i] for s in strikes) for i in (0, 1))
                worst_s = max(s[0] for s in strikes)
                row = (
                    fault,
                    rank,
                    f"{error_s:.2f} (worst {worst_s:.2f})",
                    f"{service_s:.2f}",
                    strikes[-1][2][:160],
                )
                print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main()
