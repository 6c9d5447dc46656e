"""EXL3 matrices of a given form with random streams, each of which is a valid one. For who owns MLX."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from kernels.exl3 import Exl3Linear, Exl3SwitchLinear
from kernels.exl3_choice import Called
from kernels.exl3_reference import Codebook


def random_matrix(
    sizes: tuple[int, int],
    kinds: Sequence[tuple[int, Codebook]],
    called: Called,
    *,
    has_experts: bool = False,
    has_bias: bool = False,
    seed: int = 0,
) -> Exl3Linear | Exl3SwitchLinear:
    """Inputs to outputs, evaluated; answers are about as large as inputs.

    kinds: bits and codebook, of each expert where there are such.
    """
    layer: Exl3Linear | Exl3SwitchLinear
    if has_experts:
        layer = Exl3SwitchLinear(*sizes, kinds, bias=has_bias)
        streams = layer.trellis
        layer.trellis = [_stream(one, seed + i) for i, one in enumerate(streams)]
    else:
        layer = Exl3Linear(*sizes, *kinds[0], bias=has_bias)
        layer.trellis = _stream(layer.trellis, seed)
    keys = mx.random.split(mx.random.key(seed), 3)
    layer.suh = mx.random.uniform(0.5, 1.5, layer.suh.shape, key=keys[0]).astype(mx.float16)
    layer.svh = (mx.random.normal(layer.svh.shape, key=keys[1]) * sizes[0] ** -0.5).astype(mx.float16)
    if has_bias:
        layer.bias = mx.random.normal(layer.bias.shape, key=keys[2]).astype(mx.float16) * 0.1
    layer.called = called
    mx.eval(layer.parameters())
    return layer


def _stream(empty: mx.array, seed: int) -> mx.array:
    words = mx.random.randint(0, 1 << 16, empty.shape, dtype=mx.uint32, key=mx.random.key(seed))
    return words.astype(mx.uint16).view(mx.int16)
