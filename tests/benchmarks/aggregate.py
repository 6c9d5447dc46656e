"""Tokens per second of many users on a ring, against mlx-lm's own batch on one device of the same kind.

    python -m tests.benchmarks.aggregate [--model DIR] [--stages 1,2] [--rows 16] [--tokens 256] [--turns 5]

Without --model: random weights of Qwen3-1.7B's shape in 8 bits. A ring that is up and mlx-lm in a process of
its own, on the first stage's device, take turns: one user each, then mlx-lm's BatchGenerator with `rows`
prompts and the ring with `rows` users a frame in flight. A figure is the median of its turns but the
first, in which kernels are compiled.
Times are from the first request to the last token, the reading of the short prompts included on both sides.
With NVIDIA GPUs each stage has one of its own, as many as there are. Of rings, 2 has two equal stages, 2@15
is cut before layer 15, and 2-plain is one whose steps are neither built ahead nor while another runs.
--prompt 8192 adds the time to the first token of a prompt of so many tokens, with chunks of 2048 in mlx-lm,
and in the rings of what --chunk says.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from planner.plan import Plan
from proto import head_pb2, head_pb2_grpc
from tests.benchmarks.device import MOE, QWEN3_1_7B, random_model
from tests.ring_processes import NO_GUESSES, RingProcesses

PROMPT_TOKENS = 64
STEPS = (
    *("num_steps", "num_overlapped", "num_built_ahead", "num_dropped_ahead"),
    *("num_handed_over", "num_late", "num_begun"),
)

BASELINE = """
import json, sys, time
from pathlib import Path
import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
def many(prompts, count):
    batch = BatchGenerator(
        model, max_tokens=count, completion_batch_size=len(prompts), prefill_batch_size=len(prompts)
    )
    began, num_tokens = time.perf_counter(), 0
    batch.insert(prompts, [count] * len(prompts))
    while responses := batch.next_generated():
        num_tokens += len(responses)
    batch.close()
    return num_tokens / (time.perf_counter() - began)
def one(prompts, count):
    first = 0.0
    for _ in generate_step(mx.array(prompts[0]), model, max_tokens=count):
        first = first or time.perf_counter()
    return (count - 1) / (time.perf_counter() - first)
def ttft(prompts, count):
    began = time.perf_counter()
    next(iter(generate_step(mx.array(prompts[0]), model, max_tokens=1, prefill_step_size=2048)))
    return time.perf_counter() - began
for line in sys.stdin:
    what, *job = json.loads(line)
    print({"many": many, "one": one, "ttft": ttft}[what](*job), flush=True)
"""


def prompts(count: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
    """Different ones of the same length."""
    return [[40 + (7 * i + 13 * k) % 900 for i in range(length)] for k in range(count)]


class Baseline:
    """mlx-lm on the first device."""

    def __init__(self, model: Path, gpus: Sequence[str]) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "MLX_DISABLE_COMPILE"}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[0]
        self._process = subprocess.Popen(
            [sys.executable, "-c", BASELINE, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, what: str, rows: int, num_tokens: int, length: int = PROMPT_TOKENS) -> float:
        """many: tok/s of a batch, all rows together; one: of one user after the first; ttft: s."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, prompts(rows, length), num_tokens]) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()


def ring_of(
    model: Path, name: str, args: argparse.Namespace, gpus: Sequence[str], directory: Path
) -> RingProcesses:
    """name: 2, 2@15 or 2-plain, as the arguments tell."""
    num_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    cuts, _, plain = name.partition("-")
    first, *at = map(int, cuts.split("@"))
    bounds = [0, *at, num_layers] if at else [round(num_layers * i / first) for i in range(first + 1)]
    env: dict[str, str | None] = {"MLX_DISABLE_COMPILE": None}
    directory.mkdir()
    return RingProcesses(
        directory,
        model,
        list(pairwise(bounds)),
        concurrency=args.rows * (first + 3),
        context=max(args.prompt, PROMPT_TOKENS) + args.tokens,
        faults=dict.fromkeys(range(first), "plain_steps=1") if plain else None,
        env=env,
        env_of={i: {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(first)} if gpus else None,
        memory_gb=args.memory_gb,
        prefix_cache=False,
        speculation=NO_GUESSES,
        **({"prefill_chunk": args.chunk} if args.chunk else {}),
    )


def ring_tok_s(ring: RingProcesses, stages: int, users: int, num_tokens: int) -> dict[str, Any]:
    """Of all users together, and how busy each stage was meanwhile."""
    before = [ring.node_status(rank).stats for rank in range(stages)]
    began = time.perf_counter()
    counts = [len(answer) for answer in ring.answers(prompts(users), num_tokens)]
    wall_s = time.perf_counter() - began
    after = [ring.node_status(rank).stats for rank in range(stages)]
    busy = [(b.busy_ms - a.busy_ms) / 1e3 / wall_s for a, b in zip(before, after, strict=True)]
    steps = [
        [getattr(b, name) - getattr(a, name) for name in STEPS] for a, b in zip(before, after, strict=True)
    ]
    return {
        "steps": steps,
        "tok_s": sum(counts) / wall_s,
        "busy": [round(share, 3) for share in busy],
        "step_ms": [round(statistics.median(stats.recent_step_ms), 2) for stats in after],
    }


def one_user(ring: RingProcesses, num_tokens: int) -> float:
    """Tokens per second after the first."""
    first = 0.0
    request = head_pb2.GenerateRequest(prompt=prompts(1)[0], max_tokens=num_tokens)
    with ring.channel() as channel:
        for _ in head_pb2_grpc.HeadStub(channel).Generate(request, timeout=600.0):
            first = first or time.perf_counter()
    return (num_tokens - 1) / (time.perf_counter() - first)


def ttft_s(ring: RingProcesses, length: int) -> float:
    """Of one prompt."""
    began = time.perf_counter()
    ring.answers(prompts(1, length), 1)
    return time.perf_counter() - began


def measure_ring(
    ring: RingProcesses, baseline: Baseline, stages: int, args: argparse.Namespace
) -> dict[str, Any]:
    """The ring and mlx-lm in turns, on the same device a moment apart; a first turn is not counted."""
    plan = Plan.from_json(ring.wait_ok(180.0).plan_json)
    users = args.rows * min(plan.frames_in_flight, stages + 3)
    ring_tok_s(ring, stages, users, 16)
    one_user(ring, 16)
    found: dict[str, Any] = {"users": users, "many": [], "one": [], "ttft": []}
    plain: dict[str, list[float]] = {"many": [], "one": [], "ttft": []}
    for _ in range(args.turns + 1):
        plain["one"].append(round(baseline.ask("one", 1, args.tokens), 1))
        found["one"].append(round(one_user(ring, args.tokens), 1))
        if args.prompt:
            plain["ttft"].append(round(baseline.ask("ttft", 1, 1, args.prompt), 4))
            found["ttft"].append(round(ttft_s(ring, args.prompt), 4))
    stats = [ring.node_status(rank).stats for rank in range(stages)]
    found["steps"] = [[getattr(one, name) for name in STEPS] for one in stats]
    found["one_step_ms"] = [round(statistics.median(one.decode_ms), 2) for one in stats]
    for _ in range(args.turns + 1 if args.many else 0):
        plain["many"].append(round(baseline.ask("many", args.rows, args.tokens), 1))
        found["many"].append(ring_tok_s(ring, stages, users, args.tokens))
    for figures in (found, plain):
        for what in plain:
            del figures[what][:1]
    return found | {"mlx_lm": plain}


def measure(model: Path, args: argparse.Namespace, gpus: Sequence[str], directory: Path) -> dict[str, Any]:
    """Medians over the turns of all rounds, each ring against mlx-lm's turns beside it."""
    names = args.stages.split(",")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ExitStack() as stack:
        baseline = Baseline(model, gpus)
        stack.callback(baseline.close)
        baseline.ask("many", args.rows, 16)
        for round_ in range(args.rounds):
            for name in names:
                with ring_of(model, name, args, gpus, directory / f"{name}-{round_}") as ring:
                    found[name].append(measure_ring(ring, baseline, num_stages(name), args))
                print(name, json.dumps(found[name][-1]), file=sys.stderr, flush=True)
    return {
        "model": model.name,
        "rows": args.rows,
        "tokens": args.tokens,
        "gpus": len(gpus),
        "rings": [told(name, rounds) for name, rounds in found.items()],
    }


def num_stages(name: str) -> int:
    """Of a ring by its name."""
    return int(name.partition("-")[0].partition("@")[0])


def told(name: str, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One ring's medians, each beside mlx-lm's."""

    def both(what: str) -> tuple[float, float]:
        ring = [one["tok_s"] if what == "many" else one for found in rounds for one in found[what]]
        return statistics.median(ring), statistics.median(
            x for found in rounds for x in found["mlx_lm"][what]
        )

    last, (one, plain_one) = rounds[-1], both("one")
    said: dict[str, Any] = {
        "ring": name,
        "one_user_tok_s": round(one, 1),
        "mlx_lm_one_user_tok_s": round(plain_one, 1),
        "one_user_of_mlx_lm": round(one / plain_one, 3),
        "one_user_step_ms": last["one_step_ms"],
    }
    if last["many"]:
        many, plain_many = both("many")
        said |= {
            "users": last["users"],
            "tok_s": round(many, 1),
            "mlx_lm_tok_s": round(plain_many, 1),
            "of_stages_times_mlx_lm": round(many / plain_many / num_stages(name), 3),
            "busy": last["many"][-1]["busy"],
            "step_ms": last["many"][-1]["step_ms"],
        }
    if last["ttft"]:
        first_s, plain_s = both("ttft")
        said |= {
            "ttft_s": round(first_s, 3),
            "mlx_lm_ttft_s": round(plain_s, 3),
            "ttft_of_mlx_lm": round(first_s / plain_s, 3),
        }
    return said


def gpus_here() -> list[str]:
    """The NVIDIA devices' numbers; empty without any."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return [str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU")]


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--moe", action="store_true", help="random weights of 128 experts, 10 GB")
    parser.add_argument("--stages", default="1,2", help="rings: 2, 2@15, 2-plain")
    parser.add_argument(
        "--prompt", type=int, default=0, help="also the time to the first token of so long a one"
    )
    parser.add_argument("--chunk", type=int, default=0, help="prefill_chunk of the rings")
    parser.add_argument("--memory-gb", type=float, default=100.0, help="of each node")
    parser.add_argument("--rows", type=int, default=16, help="users a frame")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5, help="of mlx-lm and the ring, in each round")
    parser.add_argument("--one-only", dest="many", action="store_false", help="not the many users")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        shape, name = (MOE, "moe-8bit") if args.moe else (QWEN3_1_7B, "qwen3-1.7b-8bit")
        model = args.model or random_model(Path(directory) / name, shape)
        print(json.dumps(measure(model, args, gpus_here(), Path(directory)), indent=1))


if __name__ == "__main__":
    main()
