"""What it costs to draw the tokens of a frame's rows: together, as the last stage does, and each by itself.

    python -m tests.benchmarks.draws [--rows 16] [--vocab 1000,152000] [--rounds 20]

CPU ms of building, evaluating and reading, medians of rounds in turn; launches as MLX counts them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from cluster.sampler import Row, Sampler, draw_rows
from proto import ring_pb2
from tests.graph_counts import VIEWS, primitives

WISHES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "temperature": [{"temperature": 0.7}],
    "temperature, top_p": [{"temperature": 0.7, "top_p": 0.9}],
    "temperature, top_k": [{"temperature": 0.7, "top_k": 20}],
    "temperature, top_p, top_k": [{"temperature": 0.7, "top_p": 0.8, "top_k": 20}],
    "greedy, 5 top_logprobs": [{"logprobs": True, "top_logprobs": 5}],
}
WISHES["all of these, min_p, a penalty"] = [
    *(wish for wishes in WISHES.values() for wish in wishes),
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "presence_penalty": 0.5},
]


def apart(rows: list[Row], logits: mx.array) -> tuple[list[mx.array], Callable[[], object]]:
    """Lazy arrays, and what reads them."""
    draws = [sampler.draw(logits[i], *rest) for i, (sampler, *rest) in enumerate(rows)]
    return [array for draw in draws for array in draw.arrays()], lambda: [draw.finish() for draw in draws]


def together(rows: list[Row], logits: mx.array) -> tuple[list[mx.array], Callable[[], object]]:
    """The same."""
    draws = draw_rows(rows, logits)
    return draws.arrays(), draws.finish


def measured(wishes: list[dict[str, Any]], num_rows: int, vocab: int, num_rounds: int) -> dict[str, Any]:
    """Both ways in turn."""
    logits = (4 * mx.random.normal((num_rows, vocab), key=mx.random.key(1))).astype(mx.bfloat16)
    mx.eval(logits)
    history = list(range(50))
    specs = [ring_pb2.Sampling(seed=i, **wishes[i % len(wishes)]) for i in range(num_rows)]
    rows: list[Row] = [(Sampler(spec, vocab), 50 + i, history, 20) for i, spec in enumerate(specs)]
    found: dict[str, Any] = {}
    took: dict[str, list[list[float]]] = {"apart": [], "together": []}
    for number in range(num_rounds + 1):
        for name, way in (("apart", apart), ("together", together)):
            began = time.process_time()
            arrays, read = way(rows, logits)
            built = time.process_time()
            if not number:
                counts = primitives(*arrays)
                launches = sum(count for kind, count in counts.items() if kind not in VIEWS)
                found[name] = {"launches": launches}
            mx.eval(arrays)
            evaluated = time.process_time()
            read()
            times = [built - began, evaluated - built, time.process_time() - evaluated]
            if number:
                took[name].append([1e3 * s for s in (*times, sum(times))])
    for name, rounds in took.items():
        medians = [round(statistics.median(ms), 3) for ms in zip(*rounds, strict=True)]
        found[name] |= dict(zip(("build_ms", "eval_ms", "read_ms", "all_ms"), medians, strict=True))
    return found


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocab", default="1000,152000")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    for vocab in (int(size) for size in args.vocab.split(",")):
        for name, wishes in WISHES.items():
            found = measured(wishes, args.rows, vocab, args.rounds)
            print(json.dumps({"rows": args.rows, "vocab": vocab, "wishes": name} | found), flush=True)


if __name__ == "__main__":
    main()
