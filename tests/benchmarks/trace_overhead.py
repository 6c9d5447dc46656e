"""What being traced costs a ring of three processes, in CPU and wall time per token, off and on.

    python -m tests.benchmarks.trace_overhead [--tokens 60] [--rounds 40] [--random]
    git worktree add ../before REVISION
    python -m tests.benchmarks.trace_overhead --before ../before  # and of a checkout that knows no trace

Two rings answer at the same time, one of them traced, and in the next round the other one: what else the
machine does hits both alike. The ratio is of one round, and of all rounds the quartiles are told. Linux pins
rank i of both rings to the same processor. What switching on and fetching takes is not counted: no token
waits for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.config import load_config
from cluster.trace_client import Choices, Tracing
from tests.benchmarks.cpu_per_token import DEMO, ONE_THREAD, pin, random_model, ring_cpu_s, ring_processes
from tests.ring_processes import NO_GUESSES, RingProcesses

CUTS = {"demo": [(0, 3), (3, 6), (6, 9)], "random": [(0, 4), (4, 8), (8, 13)]}
PROMPT = [40 + i for i in range(16)]
NUM_STARTS = 3  # of rings that are compared with another checkout
NUM_RECORDS: list[int] = []  # of each traced answer


@contextlib.contextmanager
def tracing(ring: RingProcesses) -> Iterator[None]:
    """The ring's nodes record, as for `macrame trace`."""
    trace = Tracing(load_config(ring.config_path).nodes, None, uuid.uuid4().hex, Choices())
    trace.start()
    try:
        yield
    finally:
        nodes = trace.stop()
        NUM_RECORDS.append(sum(len(node.records) for node in nodes))
        assert all(node.records and not node.trouble for node in nodes)


def cpu_s(ring: RingProcesses) -> float:
    """Of all threads of all processes; by the scheduler's own count in ns where there is one."""
    total_ns = 0
    try:
        for process in ring_processes(ring):
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                total_ns += int((task / "schedstat").read_text().split()[0])
    except OSError:
        return ring_cpu_s(ring)
    return total_ns / 1e9


def both(rings: tuple[RingProcesses, RingProcesses], num_tokens: int) -> tuple[list[float], list[float]]:
    """CPU and wall ms per token of two rings that answer at once."""
    begin = threading.Barrier(2)

    def ask(ring: RingProcesses) -> tuple[float, float]:
        begin.wait()
        used_s, began = cpu_s(ring), time.perf_counter()
        ring.tokens(PROMPT, num_tokens)
        wall_ms = (time.perf_counter() - began) * 1e3 / num_tokens
        return (cpu_s(ring) - used_s) * 1e3 / num_tokens, wall_ms

    with ThreadPoolExecutor(2) as pool:
        cpu, wall = zip(*pool.map(ask, rings), strict=True)
    return list(cpu), list(wall)


def measure(
    model: Path, layers: list[tuple[int, int]], num_tokens: int, num_rounds: int, before: Path | None
) -> dict[str, Any]:
    """Quartiles of the rounds' ratios to a ring that is not traced."""

    def started(stack: contextlib.ExitStack, checkout: Path | None) -> RingProcesses:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        env: dict[str, str | None] = dict(ONE_THREAD) | {"MLX_DISABLE_COMPILE": None}
        if checkout is not None:
            env |= {"PYTHONPATH": str(checkout.resolve()), "PYTHONSAFEPATH": "1"}
        ring = RingProcesses(
            folder, model, layers, env=env, context=len(PROMPT) + num_tokens, speculation=NO_GUESSES
        )
        stack.enter_context(ring)
        ring.wait_ok()
        ring.tokens(PROMPT, 8)
        with contextlib.suppress(AttributeError):  # Linux alone can pin
            pin(ring_processes(ring))
        return ring

    found: dict[str, Any] = {
        "model": model.name,
        "tokens": num_tokens,
        "rounds": num_rounds,
        "processors": os.cpu_count(),
    }
    with contextlib.ExitStack() as stack:
        first, second = started(stack, None), started(stack, None)
        rounds = []
        for number in range(num_rounds):
            traced, other = (first, second) if number % 2 else (second, first)
            with tracing(traced):
                rounds.append(both((traced, other), num_tokens))
        found["on_to_off"] = told(rounds)
        found["records_per_token"] = statistics.median(NUM_RECORDS) / num_tokens
        rounds = [both((first, second), num_tokens) for _ in range(num_rounds)]
        found["off_to_off"] = told(rounds)  # what two rings alike differ by
    for name, checkout in (("off_to_before", before), ("off_to_itself", before and Path.cwd())):
        for number in range(NUM_STARTS if checkout is not None else 0):  # two starts alike differ, too
            with contextlib.ExitStack() as stack:
                places = (None, checkout) if number % 2 else (checkout, None)
                rings = {place: started(stack, place) for place in places}
                rounds = [both((rings[None], rings[checkout]), num_tokens) for _ in range(num_rounds)]
                found.setdefault(name, []).append(told(rounds))
    return found


def told(rounds: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """The medians of both sides, and the ratios' quartiles."""
    shown: dict[str, Any] = {}
    for index, name in enumerate(("cpu", "wall")):
        sides = [[one[index][side] for one in rounds] for side in range(2)]
        ratios = [a / b for a, b in zip(*sides, strict=True)]
        shown[f"{name}_ms_per_token"] = [round(statistics.median(side), 3) for side in sides]
        shown[f"{name}_ratio_quartiles"] = [round(q, 4) for q in statistics.quantiles(ratios, n=4)]
    return shown


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--random", action="store_true", help="a random bf16 model of 200 M parameters")
    parser.add_argument(
        "--before", type=Path, metavar="DIR", help="another checkout, measured beside this one"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder)) if args.random else DEMO
        layers = CUTS["random" if args.random else "demo"]
        print(json.dumps(measure(model, layers, args.tokens, args.rounds, args.before), indent=2))


if __name__ == "__main__":
    main()
