"""What being traced costs a ring of three processes: CPU ms and wall ms per token, off and on, in turns.

    python -m tests.benchmarks.trace_overhead [--tokens 200] [--rounds 15] [--random]
    git worktree add ../before REVISION
    python -m tests.benchmarks.trace_overhead --before ../before  # and of a checkout that knows no trace

Every round asks each side for one answer, in an order that changes with the round; ratios are of one round,
and the median over the rounds counts. Linux pins each process to one processor. What switching on and
fetching takes is not counted: no token waits for it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.config import load_config
from cluster.trace_client import Choices, Tracing
from tests.benchmarks.cpu_per_token import DEMO, ONE_THREAD, pin, random_model, ring_cpu_s, ring_processes
from tests.ring_processes import NO_GUESSES, RingProcesses

CUTS = {"demo": [(0, 3), (3, 6), (6, 9)], "random": [(0, 4), (4, 8), (8, 13)]}
PROMPT = [40 + i for i in range(16)]


@contextlib.contextmanager
def tracing(ring: RingProcesses) -> Iterator[None]:
    """The ring's nodes record, as for `macrame trace`."""
    trace = Tracing(load_config(ring.config_path).nodes, None, uuid.uuid4().hex, Choices())
    trace.start()
    try:
        yield
    finally:
        nodes = trace.stop()
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


def measure(
    model: Path, layers: list[tuple[int, int]], num_tokens: int, num_rounds: int, before: Path | None
) -> dict[str, Any]:
    """Medians by side, and of each round's ratio to `off`."""

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

    with contextlib.ExitStack() as stack:
        ring = started(stack, None)
        sides: dict[str, tuple[RingProcesses, Callable[[], contextlib.AbstractContextManager[None]]]] = {
            "off": (ring, contextlib.nullcontext),
            "on": (ring, lambda: tracing(ring)),
        }
        if before is not None:
            sides["before"] = started(stack, before), contextlib.nullcontext
        cpu: dict[str, list[float]] = {side: [] for side in sides}
        wall: dict[str, list[float]] = {side: [] for side in sides}
        orders = itertools.cycle(itertools.permutations(sides))
        for _ in range(num_rounds):
            for side in next(orders):
                asked, context = sides[side]
                with context():
                    used_s, began = cpu_s(asked), time.perf_counter()
                    asked.tokens(PROMPT, num_tokens)
                    wall[side].append((time.perf_counter() - began) * 1e3 / num_tokens)
                    cpu[side].append((cpu_s(asked) - used_s) * 1e3 / num_tokens)
    return {
        "model": model.name,
        "tokens": num_tokens,
        "rounds": num_rounds,
        "processors": os.cpu_count(),
        **{side: _told(side, cpu, wall) for side in sides},
    }


def _told(side: str, cpu: dict[str, list[float]], wall: dict[str, list[float]]) -> dict[str, float]:
    def ratio(of: dict[str, list[float]]) -> float:
        return statistics.median(a / b for a, b in zip(of[side], of["off"], strict=True))

    return {
        "cpu_ms_per_token": statistics.median(cpu[side]),
        "wall_ms_per_token": statistics.median(wall[side]),
        "cpu_ratio_to_off": ratio(cpu),
        "cpu_ratio_of_minima": min(cpu[side]) / min(cpu["off"]),
        "wall_ratio_to_off": ratio(wall),
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--random", action="store_true", help="a random bf16 model of 200 M parameters")
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout, measured in turns")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder)) if args.random else DEMO
        layers = CUTS["random" if args.random else "demo"]
        print(json.dumps(measure(model, layers, args.tokens, args.rounds, args.before), indent=2))


if __name__ == "__main__":
    main()
