"""A long prompt among answers, reckoned: the real scheduler before a ring of stages that take a given time.

    python -m tests.benchmarks.turns [--chunks 512,256,128] [--users 4] [--prompt-tokens 16384] [--stages 3]

What tests/benchmarks/interference.py measures, without a machine's noise, and beside it what the plainer rule
gives: answers spread over the frames as if no prompt were read, and its chunks in what is left. A stage takes
`--step-ms` for a frame, or `--token-us` for each of its tokens where that comes to more.
"""

from __future__ import annotations

import argparse
import heapq
from dataclasses import dataclass, field
from itertools import pairwise
from unittest.mock import patch

import numpy as np

from cluster.instructions import Emit, Instruction, Send
from cluster.room import Limits
from cluster.scheduler import Scheduler
from proto import ring_pb2

NUM_ROUNDS = 200  # of the answers, before the prompt comes


@dataclass
class Ring:
    """Stages in a row, each with a queue. Times in ms."""

    limits: Limits
    num_stages: int
    step_ms: float
    token_ms: float
    hop_ms: float
    now: float = 0.0
    free: list[float] = field(default_factory=list)  # when each stage has done what was sent
    back: list[tuple[float, int, ring_pb2.Frame]] = field(default_factory=list)  # heap of what is under way
    came: dict[str, list[float]] = field(default_factory=dict)  # tokens of each answer

    def __post_init__(self) -> None:
        self.free = [0.0] * self.num_stages
        self.scheduler = Scheduler(max_queued=100)
        self.scheduler.ring_up(1, self.limits)

    def submit(self, name: str, num_prompt: int, num_answer: int) -> None:
        self.came[name] = []
        self._do(self.scheduler.submit(name, [1] * num_prompt, num_answer, ring_pb2.Sampling()))

    def turn(self) -> None:
        """The next frame comes back."""
        self.now, _, frame = heapq.heappop(self.back)
        slots = [
            ring_pb2.Slot(session=s.session, is_sampled=s.is_sampled, result=ring_pb2.SampledToken(id=5))
            for s in frame.slots
        ]
        self._do(self.scheduler.on_result(frame.epoch, frame.seq, slots))

    def until_token(self, name: str) -> float:
        """When the first token of `name` came."""
        while not self.came[name]:
            self.turn()
        return self.now

    def _do(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Emit):
                self.came[instruction.request_id].append(self.now)
            if isinstance(instruction, Send) and instruction.frame.slots:
                frame, at = instruction.frame, self.now
                num_tokens = sum(len(slot.tokens) for slot in frame.slots)
                for stage in range(self.num_stages):
                    start = max(at + self.hop_ms, self.free[stage])
                    at = self.free[stage] = start + max(self.step_ms, num_tokens * self.token_ms)
                heapq.heappush(self.back, (at + self.hop_ms, frame.seq, frame))


@dataclass(frozen=True)
class Found:
    alone_ms: float
    beside_ms: float
    gaps: tuple[float, float]  # p50, p99
    gaps_beside: tuple[float, float]


def reckon(ring: Ring, other: Ring, users: int, num_prompt: int) -> Found:
    """Both rings are new: one reads the prompt alone, the other among answers."""
    other.submit("alone", num_prompt, 1)
    alone_ms = other.until_token("alone")
    for i in range(users):
        ring.submit(str(i), 1, 10**6)
    for _ in range(NUM_ROUNDS * users):
        ring.turn()
    start = ring.now
    ring.submit("long", num_prompt, 1)
    stop = ring.until_token("long")
    for _ in range(8):
        ring.turn()
    pairs = [pair for i in range(users) for pair in pairwise(ring.came[str(i)])]
    before = [b - a for a, b in pairs if start / 2 < b < start]
    beside = [b - a for a, b in pairs if a < stop and b > start]
    p50, p99 = np.percentile(before, [50, 99])
    beside50, beside99 = np.percentile(beside, [50, 99])
    return Found(alone_ms, stop - start, (p50, p99), (beside50, beside99))


def main() -> None:
    """Print a line for each chunk and rule."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", default="512,256,128")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=16384)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--token-us", type=float, default=5e3 * 3.5 / 512)
    parser.add_argument("--hop-ms", type=float, default=0.3)
    parser.add_argument("--max-rows", type=int, default=32)
    args = parser.parse_args()
    print("answers    chunk  gap ms  beside p50   p99  ratio p50   p99  prompt tok/s alone  beside  ratio")
    for rule in ("spread", "together"):
        for chunk in map(int, args.chunks.split(",")):
            limits = Limits(
                10**9,
                100,
                args.stages + 1,
                512,
                max_chunks=args.stages + 1,
                max_rows=args.max_rows,
                shared_chunk=min(chunk, 512),
            )
            rings = [
                Ring(limits, args.stages, args.step_ms, args.token_us / 1e3, args.hop_ms) for _ in range(2)
            ]
            if rule == "spread":
                with patch("cluster.turns.num_row_frames", lambda _, limits: limits.max_in_flight):
                    found = reckon(rings[0], rings[1], args.users, args.prompt_tokens)
            else:
                found = reckon(rings[0], rings[1], args.users, args.prompt_tokens)
            p50, p99 = found.gaps_beside
            speeds = [1e3 * args.prompt_tokens / ms for ms in (found.alone_ms, found.beside_ms)]
            waits = f"{found.gaps[0]:6.1f}  {p50:10.1f} {p99:5.1f}"
            ratios = f"{p50 / found.gaps[0]:9.2f} {p99 / found.gaps[1]:5.2f}"
            rates = f"{speeds[0]:18.0f}  {speeds[1]:6.0f}  {speeds[1] / speeds[0]:5.2f}"
            print(f"{rule:9s}  {chunk:5d}  {waits}  {ratios}  {rates}")


if __name__ == "__main__":
    main()
