"""MLX's operations in the place of the kernels, for tests of what stands around them."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import pytest

from kernels.exl3 import Exl3Linear, Exl3SwitchLinear


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
