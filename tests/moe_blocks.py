"""Blocks of experts for tests: random weights in any format, and a routing with given experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from kernels.moe import BlockSpec, Experts, Shared
from kernels.random_block import random_experts

SEEDS = {"gate": 0, "up": 10, "down": 20}


@dataclass(frozen=True)
class Block:
    """A spec with its arrays."""

    spec: BlockSpec
    gate: Experts | None
    up: Experts
    down: Experts
    shared: Shared | None = None


def block(
    spec: BlockSpec, *, has_bias: bool = False, shared: BlockSpec | None = None, seed: int = 0
) -> Block:
    made = {
        name: random_experts(
            form, spec.shapes[name], spec.dtype, mx.random.key(seed + SEEDS[name]), has_bias=has_bias
        )
        for name, form in spec.forms.items()
    }
    parts = made.get("gate"), made["up"], made["down"]
    if shared is None:
        return Block(spec, *parts)
    other = block(shared, has_bias=has_bias, seed=seed + 100)
    return Block(spec, *parts, Shared(shared, other.gate, other.up, other.down))


def routed(spec: BlockSpec, tokens: int, *, seed: int = 0) -> tuple[mx.array, mx.array, mx.array]:
    """x (T, hidden), indices (T, k) with no expert twice in a row where there are enough, scores (T, k)."""
    rng = np.random.default_rng(seed)
    x = mx.array(rng.standard_normal((tokens, spec.hidden_size), dtype=np.float32)).astype(spec.dtype)
    repeats = spec.top_k > spec.num_experts
    rows = [rng.choice(spec.num_experts, spec.top_k, replace=repeats) for _ in range(tokens)]
    weights = rng.random((tokens, spec.top_k), dtype=np.float32) + 0.1
    scores = mx.array(weights / weights.sum(axis=1, keepdims=True)).astype(spec.dtype)
    return x, mx.array(np.array(rows, dtype=np.uint32)), scores


def with_scores(made: Block, tokens: int, seed: int = 0) -> Block:
    """The block with a score of its own for the shared expert of each token."""
    assert made.shared is not None
    values = np.random.default_rng(seed).random((tokens, 1), dtype=np.float32)
    return replace(made, shared=replace(made.shared, scores=mx.array(values).astype(made.spec.dtype)))


def error(found: mx.array, wanted: mx.array) -> float:
    """The largest difference in units of the largest wanted value."""
    found, wanted = found.astype(mx.float32), wanted.astype(mx.float32)
    return float(mx.abs(found - wanted).max() / mx.abs(wanted).max())
