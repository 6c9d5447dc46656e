"""How busy a ring's stages are with 1, N + 1 and 4 (N + 1) users, where each stage waits for every frame.

    python -m tests.benchmarks.busy [--stages 3] [--wait-ms 20] [--plot busy.svg]

The wait stands for a machine's own time: it is part of a frame's time and takes no CPU, so that stages on one
machine do not hold each other up as long as the demo model's own work is small beside it. Stages have the
same number of layers as far as that goes. Prints what `macrame bench` prints.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path

from cluster.bench import Bench, Load
from cluster.bench_client import Endpoint
from cluster.bench_plot import draw_bench
from cluster.plan_plot import plot_path
from deploy.bench_prompts import prompts
from deploy.bench_text import render
from tests.ring_processes import NO_GUESSES, RingProcesses

DEMO = Path(__file__).parent.parent.parent / "deploy" / "demo" / "model"
NUM_LAYERS, VOCAB_SIZE = 9, 4096


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", type=int, default=3, choices=range(1, NUM_LAYERS + 1), metavar="N")
    parser.add_argument("--wait-ms", type=float, default=20.0, help="of each stage for each frame")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=3, help="of each user")
    parser.add_argument("--plot", type=plot_path)
    args = parser.parse_args()
    users = (1, args.stages + 1, 4 * (args.stages + 1))
    cuts = [round(i * NUM_LAYERS / args.stages) for i in range(args.stages + 1)]
    layers = list(pairwise(cuts))
    waits = {
        rank: f"layer_delay_ms={args.wait_ms / (stop - start)}" for rank, (start, stop) in enumerate(layers)
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        RingProcesses(
            Path(folder),
            DEMO,
            layers,
            concurrency=users[-1],
            faults=waits,
            with_api=True,
            env={"MLX_DISABLE_COMPILE": None},
            speculation=NO_GUESSES,
        ) as ring,
    ):
        load = Load(users, args.prompt_tokens, args.output_tokens, args.requests)
        drawn = prompts("random", VOCAB_SIZE, args.prompt_tokens, 0)
        bench = Bench(Endpoint(ring.wait_api()), load, prompts=drawn)
        bench.measure()
    result = bench.result() | {"dataset": f"{args.wait_ms:g} ms a stage", "seed": 0}
    print(render(result))
    if args.plot is not None:
        draw_bench(result, args.plot)


if __name__ == "__main__":
    main()
