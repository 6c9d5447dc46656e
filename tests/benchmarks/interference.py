"""A long prompt among answers: what it does to their gaps, and they to it.

    python -m tests.benchmarks.interference [--chunks 512,256,128] [--prompt-tokens 16384] [--users 4]

Stages wait as in tests/benchmarks/waiting_ring.py: by default 100 ms for a token of an answer, and a chunk of
512 tokens takes 3.5 times as long, as an 8B model in bf16 on an H200 would. In each round, in this order: the
prompt alone; the answers alone; the prompt among them. A first round is not counted: kernels are compiled and
caches grow in it. Prints a line for each `prefill_chunk`.

With --shape 1.7b or moe nothing waits: random weights of tests/benchmarks/device.py, a GPU for each stage
where there are any, and chunk 0 is what the plan chooses.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cluster.bench_client import Answer, Endpoint
from cluster.errors import UserError
from tests.benchmarks.aggregate import gpus_here
from tests.benchmarks.device import MOE, QWEN3_1_7B, random_model
from tests.benchmarks.waiting_ring import waiting_ring, write_model
from tests.ring_processes import NO_GUESSES, RingProcesses
from tests.tiny_models import NUM_BYTES
from tests.waiting import wait_for

LONG_ANSWER = 100_000  # tokens; none is written to its end
SHAPES: dict[str, dict[str, Any]] = {"1.7b": QWEN3_1_7B, "moe": MOE}
START_S = 300.0  # the first time the cuts of the model have to be proven


@dataclass
class Found:
    """Of one ring. Gaps in ms, the times of the prompt in s."""

    gaps: list[float] = field(default_factory=list)
    gaps_beside: list[float] = field(default_factory=list)
    alone_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)


def gaps_within(answers: Sequence[Answer], start: float, stop: float) -> list[float]:
    """Those that have a part between the two times, in ms."""
    arrivals = ([at for at, _ in answer.arrivals] for answer in answers)
    pairs = (pair for one in arrivals for pair in pairwise(one))
    return [1e3 * (b - a) for a, b in pairs if a < stop and b > start]


def time_prompt(endpoint: Endpoint, prompt: Sequence[int]) -> tuple[float, float]:
    """When it was sent, and when its first token came."""
    answer = endpoint.complete(prompt, 1)
    return answer.sent_at, answer.arrivals[0][0]


def one_round(
    endpoint: Endpoint,
    args: argparse.Namespace,
    prompts: Sequence[Sequence[int]],
    apart_s: float,
    found: Found,
) -> None:
    """The prompts: alone, beside."""
    sent, came = time_prompt(endpoint, prompts[0])
    found.alone_s.append(came - sent)
    writing = Endpoint(endpoint.url)
    answers = [Answer(16) for _ in range(args.users)]
    is_over = threading.Event()

    def write(answer: Answer) -> None:
        try:
            writing.complete([answer.num_prompt] * 16, args.answer_tokens, answer)
        except UserError as error:
            if not is_over.is_set():
                print(f"an answer broke: {error}", file=sys.stderr)

    threads = [threading.Thread(target=write, args=(answer,)) for answer in answers]
    for thread in threads:
        thread.start()
    wait_for(lambda: all(answer.num_tokens > 8 for answer in answers), 60.0)
    start = time.perf_counter()
    threading.Event().wait(apart_s)
    stop = time.perf_counter()
    sent, came = time_prompt(endpoint, prompts[1])
    so_far = [answer.num_tokens for answer in answers]
    wait_for(lambda: all(a.num_tokens > n + 1 for a, n in zip(answers, so_far, strict=True)), 60.0)
    found.beside_s.append(came - sent)
    found.gaps += gaps_within(answers, start, stop)
    found.gaps_beside += gaps_within(answers, sent, came)
    is_over.set()
    writing.leave()
    for thread in threads:
        thread.join()


def real_ring(folder: Path, chunk: int, args: argparse.Namespace) -> RingProcesses:
    """Equal parts of the random model, a GPU for each."""
    model, gpus, num_stages = folder.parent / args.shape, gpus_here(), args.stages
    context = args.prompt_tokens + 2 * args.answer_tokens
    if not model.exists():
        random_model(model, SHAPES[args.shape] | {"max_position_embeddings": context})
    num_layers: int = SHAPES[args.shape]["num_hidden_layers"]
    config: dict[str, Any] = {"prefill_chunk": chunk} if chunk else {}
    env_of = {
        rank: {"CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)]} for rank in range(num_stages if gpus else 0)
    }
    return RingProcesses(
        folder,
        model,
        list(pairwise(num_layers * i // num_stages for i in range(num_stages + 1))),
        concurrency=args.users + 1,
        context=context,
        with_api=True,
        env={"MLX_DISABLE_COMPILE": None},
        env_of=env_of,
        memory_gb=100.0,
        prefix_cache=False,
        speculation=NO_GUESSES,
        **config,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", default="512,256,128", help="each is a ring's prefill_chunk")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=16384)
    parser.add_argument("--wait-ms", type=float, default=100.0, help="of a stage for a frame, at least")
    parser.add_argument("--token-us", type=float, default=100e3 * 3.5 / 512, help="of a stage for each token")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="stages of such a model that compute")
    parser.add_argument("--answer-tokens", type=int, default=LONG_ANSWER, help="none is written to its end")
    args = parser.parse_args()
    rng, apart_s = random.Random(0), 2.0 if args.shape else 40 * args.wait_ms / 1e3
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), args, rng, apart_s)


def measure(folder: Path, args: argparse.Namespace, rng: random.Random, apart_s: float) -> None:
    """A ring for each chunk, one after the other."""
    context = args.prompt_tokens + 2 * args.answer_tokens
    print("chunk  alone s  tok/s  beside s  tok/s  ratio   gap ms p50 p99  beside p50 p99  ratio p50 p99")
    for which, chunk in enumerate(map(int, args.chunks.split(","))):
        found, own = Found(), folder / f"ring{which}"
        own.mkdir()
        if args.shape:
            ring = real_ring(own, chunk, args)
        else:
            ring = waiting_ring(
                own,
                write_model(own, args.stages),
                args.stages,
                args.stages,
                layer_ms=args.wait_ms,
                token_us=args.token_us,
                context=context,
                concurrency=args.users + 1,
                prefill_chunk=chunk,
            )
        with ring:
            endpoint = Endpoint(ring.wait_api(START_S))
            for number in range(args.rounds + 1):
                drawn = [[rng.randrange(NUM_BYTES) for _ in range(args.prompt_tokens)] for _ in range(2)]
                one_round(endpoint, args, drawn, apart_s, found if number else Found())
        print(line(chunk, args.prompt_tokens, found), flush=True)


def line(chunk: int, num_tokens: int, found: Found) -> str:
    """One row of the table."""
    alone_s, beside_s = float(np.median(found.alone_s)), float(np.median(found.beside_s))
    gaps, beside = (np.percentile(g, [50, 99]) for g in (found.gaps, found.gaps_beside))
    ratio = beside / gaps
    prompt = f"{alone_s:7.2f}  {num_tokens / alone_s:5.0f}  {beside_s:8.2f}  {num_tokens / beside_s:5.0f}"
    waits = f"{gaps[0]:10.0f} {gaps[1]:3.0f}  {beside[0]:10.0f} {beside[1]:3.0f}"
    return f"{chunk:5d}  {prompt}  {alone_s / beside_s:5.2f}   {waits}  {ratio[0]:9.2f} {ratio[1]:.2f}"


if __name__ == "__main__":
    main()
