"""Tokens per second of many users on a ring, against mlx-lm's own batch on one device of the same kind.

    python -m tests.benchmarks.aggregate [--model DIR] [--stages 1,2] [--rows 16] [--tokens 256] [--rounds 2]

Without --model: random weights of Qwen3-1.7B's shape in 8 bits. Rounds alternate: mlx-lm's BatchGenerator
with `rows` prompts in a process of its own, then each ring with `rows` users a frame in flight.
Times are from the first request to the last token, the reading of the short prompts included on both sides.
With NVIDIA GPUs each stage has one of its own, as many as there are.
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

from tests.benchmarks.device import random_model
from tests.ring_processes import RingProcesses

PROMPT_TOKENS = 64

BASELINE = """
import json, sys, time
from pathlib import Path
import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
for line in sys.stdin:
    prompts, count = json.loads(line)
    many = BatchGenerator(
        model, max_tokens=count, completion_batch_size=len(prompts), prefill_batch_size=len(prompts)
    )
    began, num_tokens = time.perf_counter(), 0
    many.insert(prompts, [count] * len(prompts))
    while responses := many.next_generated():
        num_tokens += len(responses)
    many.close()
    print(num_tokens / (time.perf_counter() - began), flush=True)
"""


def prompts(count: int) -> list[list[int]]:
    """Different ones of the same length."""
    return [[40 + (7 * i + 13 * k) % 900 for i in range(PROMPT_TOKENS)] for k in range(count)]


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

    def tok_s(self, rows: int, num_tokens: int) -> float:
        """Of a batch, all rows together."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([prompts(rows), num_tokens]) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()


def ring_of(
    model: Path, stages: int, args: argparse.Namespace, gpus: Sequence[str], directory: Path
) -> RingProcesses:
    """Equal shares of the layers, one frame more than stages."""
    num_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    bounds = [round(num_layers * stage / stages) for stage in range(stages + 1)]
    env: dict[str, str | None] = {"MLX_DISABLE_COMPILE": None}
    directory.mkdir()
    return RingProcesses(
        directory,
        model,
        list(pairwise(bounds)),
        concurrency=args.rows * (stages + 1),
        context=PROMPT_TOKENS + args.tokens,
        env=env,
        env_of={i: {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(stages)} if gpus else None,
        prefix_cache=False,
    )


def ring_tok_s(ring: RingProcesses, stages: int, users: int, num_tokens: int) -> dict[str, Any]:
    """Of all users together, and how busy each stage was meanwhile."""
    before = [ring.node_status(rank).stats.busy_ms for rank in range(stages)]
    began = time.perf_counter()
    counts = [len(answer) for answer in ring.answers(prompts(users), num_tokens)]
    wall_s = time.perf_counter() - began
    busy = [ring.node_status(rank).stats.busy_ms - ms for rank, ms in enumerate(before)]
    return {"tok_s": sum(counts) / wall_s, "busy": [round(ms / 1e3 / wall_s, 3) for ms in busy]}


def measure(model: Path, args: argparse.Namespace, gpus: Sequence[str], directory: Path) -> dict[str, Any]:
    """Medians over the rounds."""
    counts = [int(text) for text in args.stages.split(",")]
    found: dict[str, list[Any]] = {"mlx_lm": [], "mlx_lm_alone": []}
    with ExitStack() as stack:
        baseline = Baseline(model, gpus)
        stack.callback(baseline.close)
        baseline.tok_s(args.rows, 16)
        for round_ in range(args.rounds):
            found["mlx_lm"].append(baseline.tok_s(args.rows, args.tokens))
            found["mlx_lm_alone"].append(baseline.tok_s(1, args.tokens))
            for stages in counts:
                place = directory / f"{stages}-{round_}"
                with ring_of(model, stages, args, gpus, place) as ring:
                    ring.wait_ok(180.0)
                    ring_tok_s(ring, stages, args.rows * (stages + 1), 16)
                    for name, users in (("alone", 1), ("many", args.rows * (stages + 1))):
                        found.setdefault(f"{stages} {name}", []).append(
                            ring_tok_s(ring, stages, users, args.tokens)
                        )
    base = statistics.median(found["mlx_lm"])
    alone = statistics.median(found["mlx_lm_alone"])
    rings = []
    for stages in counts:
        many = statistics.median(one["tok_s"] for one in found[f"{stages} many"])
        one = statistics.median(one["tok_s"] for one in found[f"{stages} alone"])
        rings.append(
            {
                "stages": stages,
                "users": args.rows * (stages + 1),
                "tok_s": round(many, 1),
                "of_stages_times_mlx_lm": round(many / base / stages, 3),
                "busy": found[f"{stages} many"][-1]["busy"],
                "one_user_tok_s": round(one, 1),
                "one_user_of_mlx_lm": round(one / alone, 3),
            }
        )
    return {
        "model": model.name,
        "rows": args.rows,
        "tokens": args.tokens,
        "gpus": len(gpus),
        "mlx_lm_tok_s": round(base, 1),
        "mlx_lm_one_user_tok_s": round(alone, 1),
        "rings": rings,
    }


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
    parser.add_argument("--stages", default="1,2")
    parser.add_argument("--rows", type=int, default=16, help="users a frame")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = args.model or random_model(Path(directory) / "qwen3-1.7b-8bit")
        print(json.dumps(measure(model, args, gpus_here(), Path(directory)), indent=1))


if __name__ == "__main__":
    main()
