"""Launches and bytes of a decode step of each stage, step after step, as MLX counts them.

    python -m tests.benchmarks.launches [--model DIR] [--cuts 3,8] [--steps 300]
    python -m tests.benchmarks.launches --effects [--random]  # what MLX's cache and one evaluation save

A launch is a primitive of the step's graph that is no view of another array. On a CPU MLX has no fused
kernels for norms, rotary embeddings and attention, and their many parts are counted; on a GPU each is one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from shard_loader.weights import load_shard
from tests.benchmarks.cpu_per_token import DEMO, random_model
from tests.graph_counts import StepCounts, count_steps

STEPS_A_ROUND = 8


def told(start: int, stop: int, steps: list[StepCounts]) -> dict[str, Any]:
    """Of one stage: the first step, those that grow the caches, and all others."""
    others = [step for step in steps[1:] if not step.kept_bytes]
    grown = [step for step in steps[1:] if step.kept_bytes]
    return {
        "layers": f"{start}:{stop}",
        "launches": sorted({step.num_launches for step in others}),
        "primitives": sorted({step.num_primitives for step in others}),
        "kept_bytes": sorted({step.kept_bytes for step in others}),
        "scratch_bytes": {
            "least": min(s.scratch_bytes for s in others),
            "most": max(s.scratch_bytes for s in others),
        },
        "cache_bytes": {"first": others[0].cache_bytes, "last": others[-1].cache_bytes},
        "steps_that_grow": [
            {
                "position": step.position,
                "launches": step.num_launches,
                "kept_bytes": step.kept_bytes,
                "scratch_bytes": step.scratch_bytes,
            }
            for step in grown
        ],
        "launches_of_a_step": dict(steps[-1].primitives.most_common(12)),
    }


def effects(model: Path, start: int, stop: int, num_rounds: int) -> dict[str, Any]:
    """ms of a step as it is, without MLX's cache of freed buffers, and with an evaluation for each layer.

    In turns; ratios are of one round, medians over all of them.
    """
    shard = load_shard(model, start, stop)
    state = shard.new_state()
    carry = None if shard.is_first else shard._zero_carry()[:, :1]

    def whole() -> None:
        out = shard.forward(mx.array([[5]]), carry, state)
        mx.eval(out, state.arrays())

    def by_layer() -> None:
        out = shard.forward_in_groups(mx.array([[5]]), carry, state, 1, lambda _stop: None)
        mx.eval(out, state.arrays())

    def uncached() -> None:
        limit = mx.set_cache_limit(0)
        whole()
        mx.set_cache_limit(limit)

    ways = {"whole": whole, "without_cache": uncached, "layer_by_layer": by_layer}
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_rounds + 1):
        for name, step in ways.items():
            step()  # what the way before left in the cache is its own
            began = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                step()
            if number:
                took[name].append((time.perf_counter() - began) * 1e3 / STEPS_A_ROUND)
    return {
        "layers": f"{start}:{stop}",
        **{f"{name}_ms": statistics.median(ms) for name, ms in took.items()},
        **{
            f"{name}_ratio": statistics.median(a / b for a, b in zip(took[name], took["whole"], strict=True))
            for name in ways
        },
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--cuts", default="3,8")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--effects", action="store_true", help="times instead of counts")
    parser.add_argument("--random", action="store_true", help="with --effects: a random bf16 model of 200 M")
    parser.add_argument("--rounds", type=int, default=30, help="with --effects")
    args = parser.parse_args()
    if args.effects:
        with tempfile.TemporaryDirectory() as folder:
            model = random_model(Path(folder)) if args.random else args.model
            print(json.dumps({"model": model.name} | effects(model, 3, 8, args.rounds), indent=2))
        return
    num_layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    bounds = [0, *(int(cut) for cut in args.cuts.split(",") if cut), num_layers]
    stages = []
    for start, stop in itertools.pairwise(bounds):
        shard = load_shard(args.model, start, stop)
        mx.clear_cache()
        stages.append(told(start, stop, count_steps(shard, shard.new_state(), args.steps)))
        del shard
    result = {"model": args.model.name, "device": str(mx.default_device()), "stages": stages}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
