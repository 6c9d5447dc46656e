"""What work costs that is too small to count: launching a layer's kernels, waking a stage; and a copy. MLX.

For the thread that owns MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np

FEW_LAYERS, MANY_LAYERS = 4, 20
NUM_WAKES = 10


def layer_cases() -> dict[str, Callable[[], None]]:
    """One token through FEW_LAYERS and MANY_LAYERS tiny transformer blocks of mlx-lm, each with its cache.

    The weights are so small that launching is all there is to do; building the graph in Python counts, as it
    does in a ring. The difference of the two, over the layers between, is what one layer costs.
    """
    return {_name(num): _layers_case(num) for num in (FEW_LAYERS, MANY_LAYERS)}


def layer_ms(ms: Mapping[str, float]) -> float:
    """One layer's part of the times of `layer_cases`, never below 0."""
    return max(0.0, (ms[_name(MANY_LAYERS)] - ms[_name(FEW_LAYERS)]) / (MANY_LAYERS - FEW_LAYERS))


def _name(num_layers: int) -> str:
    return f"{num_layers} layers"


def _layers_case(num_layers: int) -> Callable[[], None]:
    from mlx_lm.models.cache import KVCache
    from mlx_lm.models.llama import ModelArgs, TransformerBlock

    args = ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=num_layers,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        rms_norm_eps=1e-5,
        vocab_size=64,
    )
    blocks: list[Any] = [TransformerBlock(args) for _ in range(num_layers)]
    for block in blocks:
        mx.eval(block.parameters())
    caches = [KVCache() for _ in blocks]
    x = mx.zeros((1, 1, args.hidden_size))  # (B, T, hidden_size)
    mx.eval(x)

    def run() -> None:
        h = x
        for block, cache in zip(blocks, caches, strict=True):
            cache.offset = 0  # what is there is overwritten: a decode step allocates no cache
            h = block(h, None, cache)
        mx.eval(h)

    return run


def wake_case() -> Callable[[], None]:
    """NUM_WAKES times: to another thread and back, as a frame comes in and a result goes out; bytes into an
    array, one small kernel, the result's bytes. (1, 1, 2048) float32.
    """
    given = np.zeros(2048, dtype=np.float32)
    other = ThreadPoolExecutor(1)

    def run() -> None:
        for _ in range(NUM_WAKES):
            other.submit(int).result()
            y = mx.array(given) + 1
            mx.eval(y)
            bytes(memoryview(y))  # type: ignore[arg-type]

    return run


def copy_case(num_bytes: int) -> Callable[[], None]:
    """Reads num_bytes and writes as many."""
    a = mx.ones((num_bytes // 4,), dtype=mx.float32)
    mx.eval(a)

    def run() -> None:
        mx.eval(mx.negative(a))

    return run
