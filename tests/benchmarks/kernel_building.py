"""What Python needs to build one block of experts, by mlx-lm's operations and by the kernels; us of CPU.

    python -m tests.benchmarks.kernel_building

Nothing is computed. A launch of a kernel, which only a GPU's backend takes, is an operation of MLX with as
many inputs here: what a block's replay costs. One token, 8 of 16 experts, 4 bits; the sizes of the matrices
do not matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.deepseek_v3 import DeepseekV3MLP

from kernels import backend, source, switch
from kernels.moe_spec import BlockSpec, Format
from kernels.random_block import random_layer

FORM = Format(4, 64)
SPEC = BlockSpec(16, 256, 64, 8, FORM, FORM, FORM, dtype=mx.bfloat16)
NUM_CALLS, NUM_ROUNDS = 500, 15


def _device(_: source.Kernel) -> Callable[..., list[mx.array]]:
    """Stands for mx.fast.metal_kernel's object: arrays of the right shapes that depend on all inputs."""

    def call(*, inputs: list[mx.array], output_shapes: Sequence[Sequence[int]], **_: Any) -> list[mx.array]:
        made: list[mx.array] = mx.depends([mx.zeros(s, mx.bfloat16) for s in output_shapes], inputs)
        return made

    return call


def _us(block: Callable[[], mx.array]) -> float:
    best = float("inf")
    for _ in range(NUM_ROUNDS):
        started = time.process_time()
        for _ in range(NUM_CALLS):
            block()
        best = min(best, (time.process_time() - started) / NUM_CALLS)
    return best * 1e6


class Moe(nn.Module):
    """As deepseek_v3 writes it: the experts' sum, and beside it a shared expert, where there is one."""

    def __init__(self, has_shared: bool) -> None:
        super().__init__()
        self.switch_mlp = random_layer(SPEC)
        self.shared_experts = None
        if has_shared:
            args: Any = SimpleNamespace(hidden_size=SPEC.hidden_size, intermediate_size=SPEC.expert_size)
            self.shared_experts = DeepseekV3MLP(args)
            nn.quantize(self.shared_experts, FORM.group_size, FORM.bits)
        self.eval()

    def __call__(self, x: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
        y = self.switch_mlp(x, indices)
        y = (y * scores[..., None]).sum(axis=-2).astype(y.dtype)
        return y if self.shared_experts is None else y + self.shared_experts(x)


def main() -> None:
    """Prints one line for each way."""
    mx.set_default_device(mx.cpu)
    x = mx.zeros((1, 1, SPEC.hidden_size), SPEC.dtype)
    indices, scores = mx.zeros((1, 1, SPEC.top_k), mx.uint32), mx.ones((1, 1, SPEC.top_k), SPEC.dtype)
    devices: dict[source.Kernel, Any] = {}
    source._metal = lambda kernel: devices.setdefault(kernel, _device(kernel))  # type: ignore[assignment]
    for has_shared in (False, True):
        model = Moe(has_shared)
        block = partial(model, x, indices, scores)
        print("experts and a shared one:" if has_shared else "experts:")
        backend.current = lambda: None
        print(f"  mlx-lm's operations: {_us(block):.1f} us")
        backend.current = lambda: "metal"
        taken = switch.take_over([model], switch.Never())
        print(f"  the same, in layers that are taken over: {_us(block):.1f} us")
        switch.release(taken)
        switch.take_over([model], switch.Always())
        shared = switch.taken_of(model.switch_mlp).shared  # type: ignore[union-attr]
        if shared is not None:
            shared.choose(switch.Never())
            block()  # its use is watched
            print(f"  the kernels, the shared one apart: {_us(block):.1f} us")
            shared.choose(switch.Always())
        block()
        print(f"  the kernels: {_us(block):.1f} us")


if __name__ == "__main__":
    main()
