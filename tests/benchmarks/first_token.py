"""Time to the first token of a long prompt on 1, 2, 3 ... stages: its chunks overlap.

    python -m tests.benchmarks.first_token [--stages 1,2,3] [--prompt-tokens 8192] [--chunk 256]

The same layers on each number of stages, which wait as in tests/benchmarks/waiting_ring.py; all rings run at
once and are asked in turns. `ideal` is what chunks that follow each other without a pause would take.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from cluster.bench_client import Endpoint
from tests.benchmarks.waiting_ring import waiting_ring, write_model
from tests.tiny_models import NUM_BYTES

NUM_LAYERS = 6
START_S = 300.0  # the first time the cuts of the model have to be proven


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--prompt-tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--layer-ms", type=float, default=15.0, help="of a layer for a frame, at least")
    parser.add_argument("--token-us", type=float, default=100.0, help="of a layer for each token")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    stages = [int(text) for text in args.stages.split(",")]
    rng = random.Random(0)
    times: dict[int, list[float]] = {num: [] for num in stages}
    with tempfile.TemporaryDirectory() as name, ExitStack() as rings:
        model = write_model(Path(name), NUM_LAYERS)
        endpoints = {}
        for num in stages:
            folder = Path(name) / str(num)
            folder.mkdir()
            ring = waiting_ring(
                folder,
                model,
                NUM_LAYERS,
                num,
                layer_ms=args.layer_ms,
                token_us=args.token_us,
                context=args.prompt_tokens + 8,
                prefill_chunk=args.chunk,
            )
            rings.enter_context(ring)
            endpoints[num] = Endpoint(ring.wait_api(START_S))
        for _ in range(args.rounds):
            prompt = [rng.randrange(NUM_BYTES) for _ in range(args.prompt_tokens)]
            for num, endpoint in endpoints.items():
                answer = endpoint.complete(prompt, 1)
                times[num].append(answer.arrivals[0][0] - answer.sent_at)
    one_s = float(np.median(times[stages[0]]))
    print("stages  first token s  of the first's  ideal")
    for num in stages:
        found_s = float(np.median(times[num]))
        num_chunks = -(-(args.prompt_tokens - 1) // args.chunk)
        ideal = (num_chunks + num - 1) / num / num_chunks
        print(f"{num:6d}  {found_s:13.2f}  {found_s / one_s:14.2f}  {ideal:5.2f}")


if __name__ == "__main__":
    main()
