"""MLX's operations in the place of the kernels, for tests of what stands around them."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import pytest

from kernels import moe_ops
from kernels.exl3 import Exl3Linear, Exl3SwitchLinear
from kernels.moe import Block, Shared, SharedBlock


def run_by_mlx(
    block: Block, x: mx.array, indices: mx.array, scores: mx.array | None, shared: SharedBlock | None = None
) -> mx.array:
    """As kernels.moe.run."""
    beside = None
    if shared is not None:
        one = shared.block
        beside = Shared(one.spec, one.gate, one.up, one.down, shared.scores)
    return moe_ops.switch_glu(block.spec, x, indices, scores, block.gate, block.up, block.down, beside)


def exl3_by_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    """EXL3 layers choose and count as ever, and MLX's operations compute in the place of the kernels."""
    for kind, at in ((Exl3Linear, 1), (Exl3SwitchLinear, 2)):
        right: Any = kind.product

        def product(self: Any, *args: Any, right: Any = right, at: int = at) -> mx.array:
            way = "zeros" if args[at] == "zeros" else "operations"
            return cast(mx.array, right(self, *args[:at], way, *args[at + 1 :]))

        monkeypatch.setattr(kind, "product", product)


def without_gpu(*values: object) -> object:
    """Values of a test's parameters that hold where MLX has no GPU."""
    has_gpu = mx.metal.is_available() or mx.cuda.is_available()
    return pytest.param(*values, marks=pytest.mark.skipif(has_gpu, reason="there is a GPU"))
