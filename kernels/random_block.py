"""Experts of a given form with random weights, alone or as mlx-lm's layers. For who owns MLX."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.gemma4_text import GeGLU
from mlx_lm.models.kimi_k3 import SiTU
from mlx_lm.models.step3p5 import ClampedSwiGLU
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU, SwitchGLU, SwitchLinear, SwitchMLP

from kernels.expert_blocks import NAMES, projection_names, projections
from kernels.moe_constants import PARTS
from kernels.moe_spec import Activation, BlockSpec, Experts, Format

Linear = Callable[[mx.array], mx.array]
_BIAS = 127  # of the exponent that is a scale of mxfp4 and mxfp8
_LARGE = {"mxfp4": 2, "mxfp8": 7}  # two to this are its weights about, before they are scaled


def random_layer(spec: BlockSpec, *, has_bias: bool = False, seed: int = 0) -> nn.Module:
    """mlx-lm's own SwitchGLU or SwitchMLP of this form, evaluated; affine scales have spec.dtype."""
    kind = SwitchMLP if spec.gate is None else SwitchGLU
    layer = kind(8, 8, 1, activation=activation_of(spec.activation))
    _fill(layer, spec, _projection, has_bias=has_bias, seed=seed)
    layer.eval()
    return layer


class RandomBlock(nn.Module):  # type: ignore[misc]
    """mlx-lm's expert layer of a form, and a shared expert beside it as a model has one; evaluated."""

    def __init__(
        self,
        spec: BlockSpec,
        shared: BlockSpec,
        *,
        has_bias: bool = False,
        has_shared_bias: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.switch_mlp = random_layer(spec, has_bias=has_bias, seed=seed)
        self.shared_experts = _RandomShared(shared, has_bias=has_shared_bias, seed=seed + 1)
        self.eval()


class _RandomShared(nn.Module):  # type: ignore[misc]
    def __init__(self, spec: BlockSpec, *, has_bias: bool, seed: int) -> None:
        super().__init__()
        join = activation_of(spec.activation)
        self._join = partial(join)  # a module here would be one more beside the matrices
        _fill(self, spec, _linear, has_bias=has_bias, seed=seed)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up, down = (cast(Linear, part) for part in projections(self).values())
        return down(self._join(up(x), gate(x)))


def _fill(
    module: nn.Module,
    spec: BlockSpec,
    hold: Callable[[Format, Experts], nn.Module],
    *,
    has_bias: bool,
    seed: int,
) -> None:
    """Gives it random matrices, evaluated one by one; `hold` makes the module of each."""
    keys = dict(zip(NAMES, mx.random.split(mx.random.key(seed), 3), strict=True))
    for part, name in projection_names(module).items():
        form = spec.forms[part]
        made = random_experts(form, spec.shapes[part], spec.dtype, keys[part], has_bias=has_bias)
        module[name] = hold(form, made)
        mx.eval(module[name].parameters())


def random_experts(
    form: Format, shape: tuple[int, int, int], dtype: mx.Dtype, key: mx.array, *, has_bias: bool = False
) -> Experts:
    """(E, N, K) weights of about 1 / sqrt(K), of which no group is like another; not evaluated.

    Made packed, so that hardly more memory is taken than they are stored in.
    """
    num_experts, num_out, width = shape
    keys = mx.random.split(key, 5)
    bias = None
    if has_bias:
        bias = (mx.random.normal((num_experts, num_out), key=keys[4]) * 0.1).astype(dtype)
    if form.mode == "plain":
        drawn = mx.random.uniform(-1, 1, shape, dtype=mx.float16, key=keys[0])
        return Experts((drawn * width**-0.5).astype(dtype), bias=bias)
    # A draw over 32 bits goes through a float, which has fewer.
    halves = (num_experts, num_out, width * form.bits // 16)
    words = mx.random.randint(0, 1 << 16, halves, dtype=mx.uint32, key=keys[1])
    weight = words.astype(mx.uint16).view(mx.uint32)
    groups = (num_experts, num_out, width // form.group_size)
    if form.mode in _LARGE:
        least = _BIAS - (width.bit_length() + 1) // 2 - _LARGE[form.mode]
        scales = mx.random.randint(least, least + 3, groups, key=keys[2]).astype(mx.uint8)
        return Experts(_numbers(weight) if form.mode == "mxfp8" else weight, scales, bias=bias)
    if form.mode == "nvfp4":
        drawn = mx.random.uniform(0.25, 0.75, groups, key=keys[2]) * width**-0.5
        scales = mx.to_fp8(drawn, stream=mx.cpu)  # which has it wherever MLX runs
        return Experts(weight, scales, bias=bias)
    size = width**-0.5 * 2 / (1 << form.bits)
    scales = mx.random.uniform(size / 2, size, groups, key=keys[2]).astype(dtype)
    middle = mx.random.uniform(0.9, 1.1, groups, key=keys[3]) * -(1 << (form.bits - 1))
    return Experts(weight, scales, (scales * middle).astype(dtype), bias)


def _numbers(words: mx.array) -> mx.array:
    """Bytes e4m3 without their NaN, all ones."""
    codes = words.view(mx.uint8)
    is_nan = (codes & 0x7F) == 0x7F
    return (codes - is_nan.astype(mx.uint8)).view(mx.uint32)


def _projection(form: Format, made: Experts) -> nn.Module:
    """mlx-lm's module that holds them."""
    if form.mode == "plain":
        return _holding(SwitchLinear(8, 8, 1, bias=False), form, made)
    return _holding(QuantizedSwitchLinear(32, 32, 1, bias=False, group_size=32, bits=4), form, made)


def _linear(form: Format, made: Experts) -> nn.Module:
    """MLX's module that holds the one expert of `made`."""
    arrays = (None if array is None else array[0] for array in (getattr(made, part) for part in PARTS))
    only = Experts(*arrays)  # type: ignore[arg-type]
    if form.mode == "plain":
        return _holding(nn.Linear(8, 8, bias=False), form, only)
    return _holding(nn.QuantizedLinear(32, 32, bias=False, group_size=32, bits=4), form, only)


def _holding(module: Any, form: Format, made: Experts) -> nn.Module:
    """The module with these in the place of what it has."""
    module.weight = made.weight
    if form.mode != "plain":
        module.group_size, module.bits, module.mode = form.group_size, form.bits, form.mode
        module.scales, module.biases = made.scales, made.biases
    if made.bias is not None:
        module.bias = made.bias
    return cast(nn.Module, module)


def activation_of(activation: Activation) -> nn.Module:
    """mlx-lm's module that joins gate and up so, or activates up alone."""
    if activation.kind == "swiglu":
        return SwiGLU()
    if activation.kind == "geglu":
        return GeGLU()
    if activation.kind == "swiglu_oai":
        return SwigluOAI(activation.alpha, activation.limit)
    if activation.kind == "relu2":
        return nn.ReLU2()
    if activation.kind == "gelu":
        return nn.GELU(approx="precise")
    if activation.kind.startswith("situ"):
        return SiTU(activation.alpha, activation.limit if activation.kind == "situ_both" else None)
    if activation.kind == "swiglu_clamped_after":
        return ClampedSwiGLU(activation.limit)
    from mlx_lm.models.deepseek_v41 import DeepseekV41SwiGLU

    return DeepseekV41SwiGLU(activation.limit)
