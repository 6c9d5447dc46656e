"""MLX's operations in the place of the kernels, for tests of what stands around them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from kernels import moe_ops
from kernels.moe import Block


def run_by_mlx(block: Block, x: mx.array, indices: mx.array, scores: mx.array | None) -> mx.array:
    """As kernels.moe.run."""
    return moe_ops.switch_glu(block.spec, x, indices, scores, block.gate, block.up, block.down)


def without_gpu(*values: object) -> object:
    """Values of a test's parameters that hold where MLX has no GPU."""
    has_gpu = mx.metal.is_available() or mx.cuda.is_available()
    return pytest.param(*values, marks=pytest.mark.skipif(has_gpu, reason="there is a GPU"))
