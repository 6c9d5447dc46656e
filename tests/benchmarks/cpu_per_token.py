"""CPU milliseconds per generated token: the whole ring (HTTP and all processes) against plain mlx-lm.

    python -m tests.benchmarks.cpu_per_token [--model DIR | --random] [--cuts 2,5] [--tokens 300] [--rounds 5]
    python -m tests.benchmarks.cpu_per_token --random --batch 8 --prompt-tokens 2  # mlx-lm batches 8

Rounds alternate: mlx-lm in one process, then the ring. One BLAS thread on both sides. What the ring's
processes burn when idle (heartbeats) is measured first and reported apart. Linux pins each process to one
processor. `steady` is what a token costs while all answers are written: without prompts, and without the
beginning and the end, where fewer rows share a pass. Answers must be long enough to be written all at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from cluster.bench_client import Answer, Endpoint
from tests.ring_processes import NO_GUESSES, RingProcesses

DEMO = Path(__file__).parent.parent.parent / "deploy" / "demo" / "model"
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PROMPT_TOKENS = 16
IDLE_S = 5.0
WARM_TOKENS = 4  # of each answer, before the time counts as steady
POLL_S = 0.005
# Of this process, when it started: taskset gives it fewer
PROCESSORS = (
    sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
)

BASELINE = """
import json, resource, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
prompt = mx.array(json.loads(sys.argv[2]))
batch = int(sys.argv[3])
def run(count):
    steps, warm = 0, cpu()
    if batch > 1:
        many = BatchGenerator(model, max_tokens=count, completion_batch_size=batch, prefill_batch_size=batch)
        many.insert([prompt.tolist()] * batch, [count] * batch)
        while many.next_generated():
            steps += 1
            warm = cpu() if steps == WARM else warm
        many.close()
    else:
        for _ in generate_step(prompt, model, max_tokens=count):
            steps += 1
            warm = cpu() if steps == WARM else warm
    return (cpu() - warm) / max(1, steps - WARM)
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
WARM = int(sys.argv[4])
run(8)
for line in sys.stdin:
    before = cpu()
    step = run(int(line))
    print(cpu() - before, step, flush=True)
"""


def random_model(directory: Path) -> Path:
    """About 200 M parameters in bf16."""
    import mlx.core as mx

    from tests.tiny_models import write_checkpoint

    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 16384,
    }
    return write_checkpoint(
        "llama", directory / "random-200m", num_layers=13, dtype=mx.bfloat16, overrides=sizes
    )


def pin(processes: list[psutil.Process]) -> None:
    """Each process on one processor, all its threads: otherwise MLX's two threads wake each other across
    processors for every operation, which doubles the CPU time of either side and hides the difference."""
    for index, process in enumerate(processes):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {PROCESSORS[index % len(PROCESSORS)]})


def ring_processes(ring: RingProcesses) -> list[psutil.Process]:
    """All processes of the ring, the HTTP process last."""
    nodes = [psutil.Process(process.pid) for process in ring.processes.values()]
    return nodes + [child for node in nodes for child in node.children(recursive=True)]


def ring_cpu_s(ring: RingProcesses) -> float:
    """User and system time of all processes of the ring, the HTTP process included."""
    times = [process.cpu_times() for process in ring_processes(ring)]
    return sum(one.user + one.system for one in times)


def steady_s_per_token(
    ring: RingProcesses,
    asked: Sequence[Future[Answer]],
    answers: Sequence[Answer],
    idle_share: float,
) -> float:
    """CPU time of a token while all answers are written; what the idle ring burns is taken off.

    nan where the first one was done before the last one had WARM_TOKENS: ask for more tokens.
    """
    pause = threading.Event()
    while min(answer.num_tokens for answer in answers) < WARM_TOKENS:
        if any(map(Future.done, asked)):
            return math.nan
        pause.wait(POLL_S)
    before, began = ring_cpu_s(ring), time.perf_counter()
    first = sum(answer.num_tokens for answer in answers)
    while not any(map(Future.done, asked)):
        pause.wait(POLL_S)
    used_s, wall_s = ring_cpu_s(ring) - before, time.perf_counter() - began
    num_tokens = sum(answer.num_tokens for answer in answers) - first
    return (used_s - idle_share * wall_s) / max(1, num_tokens)


class Baselines:
    """Plain mlx-lm in `count` processes that work at the same time, one on each processor."""

    def __init__(self, model: Path, prompt: list[int], count: int, batch: int) -> None:
        self._batch = batch
        environment = os.environ | ONE_THREAD
        environment.pop("MLX_DISABLE_COMPILE", None)
        command = [
            sys.executable,
            "-c",
            BASELINE,
            str(model),
            json.dumps(prompt),
            str(batch),
            str(WARM_TOKENS),
        ]
        self.processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            for _ in range(count)
        ]

    def cpu_s_per_token(self, num_tokens: int) -> tuple[float, float]:
        """CPU time of a token with its share of the prompt, and of one while all rows are written; all copies
        run."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{num_tokens}\n")
            process.stdin.flush()
        total = steps = 0.0
        for process in self.processes:
            assert process.stdout is not None
            whole, step = map(float, process.stdout.readline().split())
            total, steps = total + whole / num_tokens, steps + step
        num_rows = len(self.processes) * self._batch
        return total / num_rows, steps / num_rows

    def close(self) -> None:
        """End them."""
        for process in self.processes:
            process.communicate()


def measure(
    model: Path,
    cuts: list[int],
    num_tokens: int,
    num_rounds: int,
    *,
    num_users: int,
    is_pinned: bool,
    batch: int = 1,
    prompt_tokens: int = PROMPT_TOKENS,
) -> dict[str, Any]:
    """CPU ms per token of both sides, medians over the rounds.

    With several users all processors are busy on both sides: mlx-lm runs once on each processor.
    """
    prompt = [40 + i % 50 for i in range(prompt_tokens)]
    num_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    bounds = [0, *cuts, num_layers]
    layers = list(itertools.pairwise(bounds))
    with (
        tempfile.TemporaryDirectory() as directory,
        RingProcesses(
            Path(directory),
            model,
            layers,
            with_api=True,
            env=ONE_THREAD | {"MLX_DISABLE_COMPILE": None},
            context=len(prompt) + num_tokens,
            concurrency=max(4, num_users),
            speculation=NO_GUESSES,
        ) as ring,
        closing(Baselines(model, prompt, 1 if num_users == 1 else len(PROCESSORS), batch)) as baselines,
        ThreadPoolExecutor(num_users) as users,
    ):
        ring.wait_api()
        endpoint = Endpoint(f"http://127.0.0.1:{ring.api_port}")
        endpoint.complete(prompt, 8)
        baselines.cpu_s_per_token(8)
        if is_pinned:
            pin([psutil.Process(process.pid) for process in baselines.processes])
            pin(ring_processes(ring))
        before = ring_cpu_s(ring)
        threading.Event().wait(IDLE_S)
        idle_ms_per_s = (ring_cpu_s(ring) - before) / IDLE_S * 1e3
        ours, theirs, active, steady, their_steady = [], [], [], [], []
        for _ in range(num_rounds):
            their_whole_s, their_steady_s = baselines.cpu_s_per_token(num_tokens)
            theirs.append(their_whole_s * 1e3)
            their_steady.append(their_steady_s * 1e3)
            before, started = ring_cpu_s(ring), time.perf_counter()
            answers = [Answer(len(prompt)) for _ in range(num_users)]
            asked = [users.submit(endpoint.complete, prompt, num_tokens, answer) for answer in answers]
            steady.append(steady_s_per_token(ring, asked, answers, idle_ms_per_s / 1e3) * 1e3)
            for one in asked:
                one.result()
            wall_s, used_ms = time.perf_counter() - started, (ring_cpu_s(ring) - before) * 1e3
            ours.append(used_ms / num_tokens / num_users)
            active.append((used_ms - idle_ms_per_s * wall_s) / num_tokens / num_users)
    num_hops = len(layers) if len(layers) > 1 else 0
    added = statistics.median(a - t for a, t in zip(active, theirs, strict=True))
    return {
        "model": model.name,
        "stages": len(layers),
        "prompt_tokens": prompt_tokens,
        "tokens": num_tokens,
        "rounds": num_rounds,
        "users": num_users,
        "batch": batch,
        "pinned": is_pinned,
        "mlx_lm_cpu_ms_per_token": statistics.median(theirs),
        "ring_cpu_ms_per_token": statistics.median(ours),
        "ring_without_idle_cpu_ms_per_token": statistics.median(active),
        "idle_cpu_ms_per_s": idle_ms_per_s,
        "steady": {
            "mlx_lm_cpu_ms_per_token": statistics.median(their_steady),
            "ring_without_idle_cpu_ms_per_token": statistics.median(steady),
            "ratio": statistics.median(a / t for a, t in zip(steady, their_steady, strict=True)),
        },
        "added_ms_per_token": added,
        "hops": num_hops,
        "added_ms_per_hop": added / num_hops if num_hops else None,
        "ratio": statistics.median(a / t for a, t in zip(active, theirs, strict=True)),
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--random", action="store_true", help="a random bf16 model of 200 M parameters")
    parser.add_argument("--cuts", default="2,5")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--prompt-tokens", type=int, default=PROMPT_TOKENS, help="2: nearly all of the time is decoding"
    )
    parser.add_argument(
        "--users", type=int, default=1, help="answers at once; more than 1: all processors busy"
    )
    parser.add_argument(
        "--batch", type=int, default=1, help="rows of mlx-lm's batch; the ring has so many users a frame"
    )
    parser.add_argument("--no-pin", action="store_true", help="let processes wander over the processors")
    args = parser.parse_args()
    cuts = [int(cut) for cut in args.cuts.split(",") if cut]
    with tempfile.TemporaryDirectory() as directory:
        model = random_model(Path(directory)) if args.random else args.model
        num_frames = len(cuts) + 2
        num_users = args.users if args.batch == 1 else args.batch * num_frames
        result = measure(
            model,
            cuts,
            args.tokens,
            args.rounds,
            num_users=num_users,
            is_pinned=not args.no_pin,
            batch=args.batch,
            prompt_tokens=args.prompt_tokens,
        )
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
