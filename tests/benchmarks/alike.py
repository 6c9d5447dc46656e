"""Chats that come at once with one system prompt: the time to their first tokens.

    python -m tests.benchmarks.alike [--users 8] [--system-tokens 2048] [--own-tokens 64] [--rounds 3]

Beside the same users with a system prompt each, in turns on one ring: what it takes if each reads its own.
Stages wait as in tests/benchmarks/waiting_ring.py; the caches of llama can be shortened, mamba2's cannot.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.bench_client import Endpoint
from tests.benchmarks.waiting_ring import waiting_ring, write_model
from tests.tiny_models import NUM_BYTES, write_checkpoint

NUM_LAYERS, NUM_STAGES = 6, 3
START_S = 300.0
SMALL = {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 32}


def firsts_ms(endpoint: Endpoint, prompts: list[list[int]]) -> list[float]:
    """Of each prompt, from when it was sent."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: endpoint.complete(prompt, 2), prompts))
    return [(answer.arrivals[0][0] - answer.sent_at) * 1e3 for answer in answers]


def measure(name: str, args: argparse.Namespace, folder: Path) -> None:
    """Print the line of a model."""
    rng = random.Random(0)

    def text(num_tokens: int) -> list[int]:
        return [rng.randrange(NUM_BYTES) for _ in range(num_tokens)]

    if name == "mamba2":
        model = write_model(folder, NUM_LAYERS)
    else:
        model = write_checkpoint(name, folder / "model", num_layers=NUM_LAYERS, overrides=SMALL)
    found: dict[str, list[list[float]]] = {"each its own": [], "one for all": []}
    with waiting_ring(
        folder,
        model,
        NUM_LAYERS,
        NUM_STAGES,
        layer_ms=args.layer_ms,
        token_us=args.token_us,
        context=args.system_tokens + args.own_tokens + 8,
        concurrency=4 * args.users,
        prefix_cache=True,
    ) as ring:
        endpoint = Endpoint(ring.wait_api(START_S))
        for _ in range(1 + args.rounds):
            for kind, rounds in found.items():
                shared = text(args.system_tokens)
                systems = [
                    shared if kind == "one for all" else text(args.system_tokens) for _ in range(args.users)
                ]
                rounds.append(firsts_ms(endpoint, [system + text(args.own_tokens) for system in systems]))
    figures = [
        statistics.median(figure(one) for one in found[kind][1:])  # the first round warms up
        for figure in (statistics.mean, max)
        for kind in found
    ]
    ratios = figures[1] / figures[0], figures[3] / figures[2]
    print(f"{name:8s}", *(f"{value:10.0f}" for value in figures), *(f"{ratio:6.2f}" for ratio in ratios))


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--system-tokens", type=int, default=2048)
    parser.add_argument("--own-tokens", type=int, default=64)
    parser.add_argument("--layer-ms", type=float, default=10.0, help="of a layer for a frame, at least")
    parser.add_argument("--token-us", type=float, default=100.0, help="of a layer for each token")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="llama,mamba2")
    args = parser.parse_args()
    print("first token, ms: mean with a system prompt each, one for all; the last of them so; ratios")
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            measure(name, args, Path(folder))


if __name__ == "__main__":
    main()
