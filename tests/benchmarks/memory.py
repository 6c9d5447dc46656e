"""Peak memory of each node above its import base, against what the plan says: shard + KV + activations.

    python -m tests.benchmarks.memory [--gb 1.2] [--cuts 5,11] [--prompt 64] [--tokens 16]

A random bf16 llama of the asked size, cut over real processes; resident set by getrusage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from planner.plan import Plan
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint

HIDDEN, NUM_LAYERS, VOCAB = 2048, 16, 32768


def checkpoint(directory: Path, size_gb: float) -> Path:
    """A llama of about `size_gb` in several files: the feed-forward width makes up the size."""
    import mlx.core as mx

    attention = HIDDEN * HIDDEN * 3  # q and o, and k and v of half the heads
    rest = size_gb * 1e9 / 2 - 2 * VOCAB * HIDDEN - NUM_LAYERS * attention
    width = int(rest / (NUM_LAYERS * 3 * HIDDEN)) // 64 * 64
    return write_checkpoint(
        "llama",
        directory / "random",
        num_layers=NUM_LAYERS,
        dtype=mx.bfloat16,
        max_shard_bytes=300_000_000,
        overrides={
            "hidden_size": HIDDEN,
            "intermediate_size": width,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 64,
            "vocab_size": VOCAB,
        },
    )


def measure(model: Path, cuts: list[int], prompt_tokens: int, num_tokens: int) -> list[dict[str, Any]]:
    """One row per node."""
    bounds = [0, *cuts, NUM_LAYERS]
    layers = list(itertools.pairwise(bounds))
    with tempfile.TemporaryDirectory() as directory:
        context = prompt_tokens + num_tokens
        with RingProcesses(
            Path(directory), model, layers, concurrency=1, context=context, env={"MLX_DISABLE_COMPILE": None}
        ) as ring:
            plan = Plan.from_json(ring.wait_ok(300.0).plan_json)
            ring.tokens([1 + i % 250 for i in range(prompt_tokens)], num_tokens)
            status = ring.wait_status(lambda s: all(r.node.num_sessions == 0 for r in s.ranks))
    rows = []
    for stage in plan.assignments:
        node = next(r.node for r in status.ranks if r.rank == stage.rank)
        used = node.peak_rss_bytes - node.import_base_rss_bytes
        part = node.footprint
        own = part.layers_bytes + part.embed_bytes + part.norm_bytes + part.head_bytes + part.other_bytes
        allowed = own + stage.kv_bytes + stage.activation_bytes
        rows.append(
            {
                "rank": stage.rank,
                "layers": f"{stage.start}:{stage.stop}",
                "predicted_weight_bytes": stage.weight_bytes,
                "weight_bytes": own,
                "kv_bytes": stage.kv_bytes,
                "activation_bytes": stage.activation_bytes,
                "peak_above_base_bytes": used,
                "ratio_to_shard": used / own,
                "ratio_to_shard_kv_activations": used / allowed,
            }
        )
    return rows


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=1.2)
    parser.add_argument("--cuts", default="5,11")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = checkpoint(Path(directory), args.gb)
        cuts = [int(cut) for cut in args.cuts.split(",")]
        print(json.dumps(measure(model, cuts, args.prompt, args.tokens), indent=2))


if __name__ == "__main__":
    main()
