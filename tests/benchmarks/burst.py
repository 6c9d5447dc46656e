"""A burst of prompts, reckoned: the real scheduler before a ring of stages that take a given time.

    python -m tests.benchmarks.burst [--users 16] [--lengths 64,256] [--stages 3] [--chunk 512] [--step-ms 5]

How many frames carry the prompts and when the first tokens are there, with prompts that are read alone and
together; of equal lengths, and of random ones up to that. A stage takes `--step-ms` for a frame, or
`--token-us` for each of its tokens where that comes to more.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import dataclass, replace

from cluster.room import Limits
from tests.benchmarks.turns import Ring

NUM_ANSWER = 4  # tokens
SEEDS = range(5)


@dataclass(frozen=True)
class Found:
    num_frames: int  # of prompts
    num_with_last: int  # and those up to the last of the first tokens
    first_ms: tuple[float, float]  # of an answer: the mean and the last


def reckon(limits: Limits, num_stages: int, step_ms: float, token_ms: float, lengths: list[int]) -> Found:
    """All prompts come at once."""
    ring = Ring(limits, num_stages, step_ms, token_ms, 0.3)
    for i, length in enumerate(lengths):
        ring.submit(str(i), length, NUM_ANSWER)
    num_frames = 0
    while not all(ring.came.values()):
        ring.turn()
        num_frames += 1
    firsts = [times[0] for times in ring.came.values()]
    outbox = ring.scheduler._outbox
    return Found(outbox.num_chunks_sent, num_frames, (statistics.mean(firsts), max(firsts)))


def mean(found: list[Found]) -> Found:
    """Of the seeds."""
    firsts = zip(*(one.first_ms for one in found), strict=True)
    average, last = (statistics.mean(values) for values in firsts)
    frames = [
        round(statistics.mean(getattr(one, name) for one in found))
        for name in ("num_frames", "num_with_last")
    ]
    return Found(frames[0], frames[1], (average, last))


def main() -> None:
    """Print a line for each kind of burst and rule."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--lengths", default="2,64,256")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--token-us", type=float, default=5e3 * 3.5 / 512)
    args = parser.parse_args()
    frames = args.stages + 1
    lone = max(frames, 2 * args.stages)
    limits = Limits(10**6, 100, frames, args.chunk, max_chunks=frames, max_lone_chunks=lone, max_rows=32)
    print("prompts         read      frames of prompts  all frames  first token ms: mean    last")
    for longest in map(int, args.lengths.split(",")):
        for kind in ("equal", "random"):
            for rule in ("alone", "together"):
                found = []
                for seed in SEEDS:
                    draws = random.Random(seed)
                    lengths = [
                        longest if kind == "equal" else draws.randint(2, longest) for _ in range(args.users)
                    ]
                    rules = replace(limits, reads_together=rule == "together")
                    found.append(reckon(rules, args.stages, args.step_ms, args.token_us / 1e3, lengths))
                one = mean(found)
                name = f"{longest} {kind}"
                print(
                    f"{name:14s}  {rule:8s}  {one.num_frames:17d}  {one.num_with_last:10d}"
                    f"  {one.first_ms[0]:20.1f}  {one.first_ms[1]:6.1f}"
                )


if __name__ == "__main__":
    main()
