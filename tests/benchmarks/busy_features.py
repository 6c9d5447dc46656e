"""What each feature gives the stages to do: frames in flight, rows that share a frame, prompts that are kept.

    python -m tests.benchmarks.busy_features [--device] [--stages 3] [--wait-ms 2] [--plot busy_features.svg]

Every stage waits for every frame, as in tests.benchmarks.busy, and has one layer of a tiny model, whose own
work is next to nothing. The users ask the head itself, without HTTP: so small a machine is busy enough.
A share is that of the time from when every user had WARM_TOKENS tokens until the first one had all, by the
stages' own clocks. With --device the wait stands for a GPU that takes so long for each frame: the next one is
built meanwhile, as it is beside a GPU, and a share is frames times the wait, of that time.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from cluster.plan_plot import plot_path
from planner.render import table
from proto import control_pb2, head_pb2, head_pb2_grpc, ring_pb2
from tests.ring_processes import NO_GUESSES, RingProcesses
from tests.tiny_models import write_checkpoint

WARM_TOKENS = 8
LONG_PROMPT = 256
OTHER_END = 16  # tokens at the end of a long prompt that differ from user to user


@dataclass(frozen=True, slots=True)
class Case:
    """One ring and its users. frames, rows: at most so many; 0: as the plan has it."""

    name: str
    users: int
    frames: int = 0
    rows: int = 0
    prompt_tokens: int = 16
    rounds: int = 1  # answers of each user
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """Medians over the rounds."""

    busy: tuple[float, ...]  # share of each stage
    of_longest: tuple[float, ...]  # what a frame takes each stage, of what it takes the longest one
    tok_s: float  # of all users
    ttft_ms: float
    cpu_ms: float  # of all nodes, a token


def cases(num_stages: int) -> list[Case]:
    """From none of the features to all."""
    few, many = num_stages + 1, 4 * (num_stages + 1)
    return [
        Case("1 frame in flight", few, frames=1, rows=1),
        Case(f"{num_stages} frames", few, frames=num_stages, rows=1),
        Case(f"{few} frames", few, frames=few),
        Case(f"{few} frames, {many} users, a row each", many, frames=few, rows=1),
        Case(f"{few} frames, {many} users, rows shared", many, frames=few),
        Case("a long prompt for all, not kept", few, few, 0, LONG_PROMPT, 4, {"prefix_cache": False}),
        Case("a long prompt for all, kept", few, few, 0, LONG_PROMPT, 4),
    ]


class User(threading.Thread):
    """Asks the head; tells when it is warm and when it has all."""

    def __init__(self, ring: RingProcesses, prompt: Sequence[int], num_tokens: int) -> None:
        super().__init__()
        self._ring, self._prompt, self._num_tokens = ring, prompt, num_tokens
        self.is_warm, self.times_s = threading.Event(), list[float]()
        self.sent_at = 0.0

    def run(self) -> None:
        with self._ring.channel() as channel:
            request = head_pb2.GenerateRequest(
                prompt=self._prompt, max_tokens=self._num_tokens, sampling=ring_pb2.Sampling()
            )
            self.sent_at = time.perf_counter()
            for _ in head_pb2_grpc.HeadStub(channel).Generate(request, timeout=300.0):
                self.times_s.append(time.perf_counter())
                if len(self.times_s) == WARM_TOKENS:
                    self.is_warm.set()
        self.is_warm.set()


def measure(
    case: Case, model: Path, num_stages: int, wait_ms: float, num_tokens: int, *, is_device: bool = False
) -> Found:
    """A ring of its own."""
    layers = list(pairwise(range(num_stages + 1)))
    wait = f"overlapped_steps=1,step_delay_ms={wait_ms}" if is_device else f"layer_delay_ms={wait_ms}"
    faults = dict.fromkeys(range(num_stages), wait)
    faults[0] += f",frames_in_flight={case.frames}" * bool(case.frames)
    faults[0] += f",rows_per_frame={case.rows}" * bool(case.rows)
    with (
        tempfile.TemporaryDirectory() as folder,
        RingProcesses(
            Path(folder),
            model,
            layers,
            concurrency=2 * case.users,
            context=1024,
            faults=faults,
            env={"MLX_DISABLE_COMPILE": None},
            speculation=NO_GUESSES,
            **case.config,
        ) as ring,
    ):
        ring.wait_ok()
        ring.tokens([1, 2, 3], WARM_TOKENS)
        step_ms = wait_ms if is_device else None
        found = [_round(ring, case, number, num_tokens, step_ms) for number in range(case.rounds)]
    found = found[case.rounds > 1 :]  # of several, the first fills the caches
    return Found(
        tuple(median(one.busy[i] for one in found) for i in range(num_stages)),
        tuple(median(one.of_longest[i] for one in found) for i in range(num_stages)),
        median(one.tok_s for one in found),
        median(one.ttft_ms for one in found),
        median(one.cpu_ms for one in found),
    )


def _round(ring: RingProcesses, case: Case, number: int, num_tokens: int, step_ms: float | None) -> Found:
    same = [i % 251 for i in range(case.prompt_tokens - OTHER_END)]
    own = [[(7 * user + 3 * number + i) % 251 for i in range(OTHER_END)] for user in range(case.users)]
    users = [User(ring, same + ending, num_tokens) for ending in own]
    for user in users:
        user.start()
    for user in users:
        user.is_warm.wait()
    before = [ring.node_status(rank) for rank in range(len(ring.ports))]
    num_before = sum(len(user.times_s) for user in users)
    while all(user.is_alive() for user in users):
        users[0].join(0.02)
    after = [ring.node_status(rank) for rank in range(len(ring.ports))]
    num_more = sum(len(user.times_s) for user in users) - num_before
    for user in users:
        user.join()
    times_s = sorted(t for user in users for t in user.times_s)
    middle = times_s[len(times_s) // 4 : 3 * len(times_s) // 4]
    frames_ms = [_frame_ms(a.stats, b.stats, step_ms) for a, b in zip(before, after, strict=True)]
    return Found(
        tuple(_share(a.stats, b.stats, step_ms) for a, b in zip(before, after, strict=True)),
        tuple(frame_ms / max(frames_ms) for frame_ms in frames_ms),
        (len(middle) - 1) / (middle[-1] - middle[0]),
        median(1e3 * (user.times_s[0] - user.sent_at) for user in users),
        1e3 * sum(b.cpu_s - a.cpu_s for a, b in zip(before, after, strict=True)) / num_more,
    )


def _share(before: control_pb2.StageStats, after: control_pb2.StageStats, step_ms: float | None) -> float:
    """step_ms: what the device takes for a frame; None: by the stage's own count."""
    num_frames = after.num_steps - before.num_steps
    return num_frames * _frame_ms(before, after, step_ms) / (after.uptime_ms - before.uptime_ms)


def _frame_ms(before: control_pb2.StageStats, after: control_pb2.StageStats, step_ms: float | None) -> float:
    return step_ms or (after.busy_ms - before.busy_ms) / (after.num_steps - before.num_steps)


def draw(found: Mapping[str, Found], title: str, path: Path) -> None:
    """A bar for each case: the mean share, and a mark for each stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(found) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for at, one in enumerate(found.values()):
        axes.barh(at, 100 * mean(one.busy), color="#4c78a8", height=0.6)
        axes.plot(
            [100 * share for share in one.busy], [at] * len(one.busy), "|", color="black", markersize=10
        )
        axes.text(101, at, f"{one.tok_s:.0f} tok/s", va="center")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlim(0, 115)
    axes.set_xlabel("busy share of the stages, %")
    axes.set_title(title, fontsize=10)
    figure.savefig(path)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--wait-ms", type=float, default=2.0, help="of each stage for each frame")
    parser.add_argument("--device", action="store_true", help="the wait stands for a GPU's work")
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases, from 0")
    parser.add_argument("--plot", type=plot_path)
    args = parser.parse_args()
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint("llama", Path(folder) / "tiny", num_layers=args.stages)
        for number, case in enumerate(cases(args.stages)):
            if args.only is None or number in args.only:
                found[case.name] = measure(
                    case, model, args.stages, args.wait_ms, args.output_tokens, is_device=args.device
                )
    rows = [
        {
            "": name,
            "busy %": " ".join(f"{100 * share:.0f}" for share in one.busy),
            "a frame, % of the longest": " ".join(f"{100 * share:.0f}" for share in one.of_longest),
            "tok/s of all": f"{one.tok_s:.0f}",
            "first token ms": f"{one.ttft_ms:.0f}",
            "CPU ms a token": f"{one.cpu_ms:.1f}",
        }
        for name, one in found.items()
    ]
    print("\n".join(table(rows)))
    if args.plot is not None:
        draw(found, f"{args.stages} stages that wait {args.wait_ms:g} ms for each frame", args.plot)


if __name__ == "__main__":
    main()
