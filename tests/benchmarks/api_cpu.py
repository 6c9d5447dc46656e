"""CPU milliseconds of the HTTP process per streamed token, with a head that answers from a script.

    python -m tests.benchmarks.api_cpu [--tokens 500] [--rounds 4] [--pace-ms 0 3 10]

A token every --pace-ms milliseconds (0: as fast as the head can), one client on a plain socket. The slower
the pace, the more a token costs: each one wakes a sleeping process. Idle CPU is measured first and taken off.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from tests.api_server import COMPLETIONS, ApiServer, head_process, wait_healthy, write_model

IDLE_S = 3.0


def main() -> None:
    """Prints one line per pace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pace-ms", type=float, nargs="+", default=[0.0, 3.0, 10.0])
    args = parser.parse_args()
    print("pace ms  CPU ms/token (median)  idle CPU ms/s")
    for pace_ms in args.pace_ms:
        with tempfile.TemporaryDirectory() as folder, head_process(delay_s=pace_ms / 1e3) as (_, port):
            cpu_ms, idle_ms_s = _measure(Path(folder), port, args.tokens, args.rounds)
        print(f"{pace_ms:7.1f}  {cpu_ms:21.3f}  {idle_ms_s:13.2f}")


def _measure(folder: Path, port: int, num_tokens: int, num_rounds: int) -> tuple[float, float]:
    api = ApiServer(folder / "api", write_model(folder / "tiny"), f"127.0.0.1:{port}")
    try:
        with httpx.Client(base_url=api.url) as http:
            wait_healthy(http)
        time.sleep(0.5)
        began_ms = _cpu_ms(api.process.pid)
        time.sleep(IDLE_S)
        idle_ms_s = (_cpu_ms(api.process.pid) - began_ms) / IDLE_S
        rounds = []
        for _ in range(num_rounds):
            began_s, began_ms = time.monotonic(), _cpu_ms(api.process.pid)
            _stream(api.port, num_tokens)
            wall_s = time.monotonic() - began_s
            rounds.append((_cpu_ms(api.process.pid) - began_ms - idle_ms_s * wall_s) / num_tokens)
        return statistics.median(rounds), idle_ms_s
    finally:
        api.stop()


def _stream(port: int, num_tokens: int) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": num_tokens, "ignore_eos": True, "stream": True})
    lines = [f"POST {COMPLETIONS} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(body)}", "", body]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall("\r\n".join(lines).encode())
        num_done = 0
        while part := connection.recv(1 << 16):
            num_done += part.count(b"data: [DONE]")
    if not num_done:
        raise RuntimeError("the stream ended without [DONE]")


def _cpu_ms(pid: int) -> float:
    """User and system time of all threads, from Linux's nanosecond counters."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


if __name__ == "__main__":
    main()
