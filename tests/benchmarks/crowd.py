"""What many users cost a stage beside its own work, on a stage that waits for each frame.

    python -m tests.benchmarks.crowd [--wait-ms 10] [--rows 16] [--tokens 96] [--rounds 3]

A tiny model in a ring of one stage; the wait (a sleep, as a GPU that computes) is the stage's time. A frame
can take no less than the wait and the engine's own step, which is measured alone in a process; what it takes
more is Python that runs for others: threads that are woken for each token, protobuf, the scheduler. The same
users ask over one stream each, and all over one stream as the HTTP process does; in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.engine import Engine
from proto import ring_pb2
from shard_loader.weights import load_shard
from tests.ring_processes import NO_GUESSES, RingProcesses
from tests.tiny_models import write_checkpoint

PROMPT_TOKENS = 8
FRAMES = 2  # of one stage


def prompt(user: int) -> list[int]:
    """Different ones of the same length."""
    return [1 + (7 * i + 13 * user) % 250 for i in range(PROMPT_TOKENS)]


def alone_ms(model: Path, rows: int, num_layers: int, steps: int = 64) -> float:
    """A step of an engine by itself."""
    engine = Engine(load_shard(model, 0, num_layers))
    for row in range(rows):
        frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=row)
        frame.opens.add(session=row + 1, prompt_tokens=PROMPT_TOKENS, max_tokens=steps)
        frame.slots.add(session=row + 1, tokens=prompt(row)[:-1])
        engine.step(frame, ())
    times = []
    for position in range(PROMPT_TOKENS - 1, PROMPT_TOKENS - 1 + steps):
        frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=rows + position, is_batched=rows > 1)
        for row in range(rows):
            frame.slots.add(session=row + 1, position=position, tokens=[7], is_sampled=True)
        started = time.perf_counter()
        engine.step(frame, ())
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def frame_ms(ring: RingProcesses, users: int, tokens: int, *, is_shared: bool) -> tuple[float, float]:
    """Wall time for each frame of full rows, and CPU time of the node for it."""
    before, began = ring.node_status(0), time.perf_counter()
    if is_shared:
        answers = ring.answers([prompt(user) for user in range(users)], tokens)
    else:
        with ThreadPoolExecutor(users) as pool:
            answers = list(pool.map(lambda user: ring.tokens(prompt(user), tokens), range(users)))
    wall_s, after = time.perf_counter() - began, ring.node_status(0)
    assert all(len(answer) == tokens for answer in answers)
    num_frames = FRAMES * tokens
    return 1e3 * wall_s / num_frames, 1e3 * (after.cpu_s - before.cpu_s) / num_frames


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--wait-ms", type=float, default=10.0)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    users = FRAMES * args.rows
    with tempfile.TemporaryDirectory() as directory:
        model = write_checkpoint("llama", Path(directory) / "tiny", num_layers=args.layers)
        alone = alone_ms(model, args.rows, args.layers)
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        with RingProcesses(
            Path(directory),
            model,
            [(0, args.layers)],
            concurrency=users,
            context=PROMPT_TOKENS + args.tokens,
            faults={0: f"step_delay_ms={args.wait_ms}"},
            prefix_cache=False,
            speculation=NO_GUESSES,
        ) as ring:
            ring.wait_ok()
            for is_shared in [False, True] * args.rounds:
                found[is_shared].append(frame_ms(ring, users, args.tokens, is_shared=is_shared))
    least = args.wait_ms + alone
    result = {"rows": args.rows, "wait_ms": args.wait_ms, "engine_alone_ms": round(alone, 2)}
    for name, is_shared in (("a_stream_each", False), ("one_stream", True)):
        wall = statistics.median(ms for ms, _ in found[is_shared])
        cpu = statistics.median(ms for _, ms in found[is_shared])
        result[name] = {  # type: ignore[assignment]
            "frame_ms": round(wall, 2),
            "of_the_least": round(wall / least, 3),
            "added_ms": round(wall - least, 2),
            "node_cpu_ms": round(cpu, 2),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
