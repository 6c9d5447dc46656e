"""EXL3 (trellis) layers as modules of MLX: in the place of a Linear, of a SwitchLinear, or of a Linear whose
outputs the checkpoint keeps in several tensors.

Parameters are the tensors of the checkpoint as they are (kernels.exl3_reference says what they mean). For the
thread that owns MLX.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx import nn

from kernels import exl3_ops
from kernels.exl3_reference import BLOCK, TILE, Codebook

__all__ = ["Exl3Linear", "Exl3Parts", "Exl3SwitchLinear", "padded_size"]


def padded_size(num_channels: int) -> int:
    """How many channels a tensor has for so many of the layer."""
    return -(-num_channels // BLOCK) * BLOCK


def _empty(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.zeros(shape, dtype)


class Exl3Linear(nn.Module):  # type: ignore[misc]
    """y = x W + bias from (..., input_dims) to (..., output_dims); results have the dtype of x."""

    def __init__(
        self, input_dims: int, output_dims: int, bits: int, codebook: Codebook, bias: bool = False
    ) -> None:
        super().__init__()
        self.input_dims, self.output_dims, self.bits, self.codebook = input_dims, output_dims, bits, codebook
        height, width = padded_size(input_dims), padded_size(output_dims)
        self.trellis = _empty((height // TILE, width // TILE, TILE * bits), mx.int16)
        self.suh, self.svh = _empty((height,), mx.float16), _empty((width,), mx.float16)
        if bias:
            self.bias = _empty((output_dims,), mx.float16)
        self.freeze()

    def _extra_repr(self) -> str:
        return f"{self.input_dims} -> {self.output_dims}, {self.bits} bits, {self.codebook}"

    def __call__(self, x: mx.array) -> mx.array:
        bias = self.get("bias")
        y = exl3_ops.linear(x, self.trellis, self.suh, self.svh, self.codebook, bias=bias)
        return y[..., : self.output_dims]


class Exl3Parts(nn.Module):  # type: ignore[misc]
    """One layer of a model whose checkpoint keeps its outputs in several tensors, side by side."""

    def __init__(self, parts: Sequence[Exl3Linear]) -> None:
        super().__init__()
        self.parts = list(parts)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([part(x) for part in self.parts], axis=-1)


class Exl3SwitchLinear(nn.Module):  # type: ignore[misc]
    """Experts, called as mlx-lm's SwitchLinear is: x (..., M, input_dims) and indices that are broadcast with
    the axes before M, to (..., M, output_dims) in the dtype of x.

    kinds: for each expert its bits and codebook. `trellis` has an array for each kind that occurs, in the
    order of their first experts: (E', in / 16, out / 16, 16 K) of the experts of that kind, in order.
    """

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        kinds: Sequence[tuple[int, Codebook]],
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.input_dims, self.output_dims, self.num_experts = input_dims, output_dims, len(kinds)
        self.kinds = tuple(dict.fromkeys(kinds))
        height, width = padded_size(input_dims), padded_size(output_dims)
        members = [[i for i, kind in enumerate(kinds) if kind == own] for own in self.kinds]
        self.trellis = [
            _empty((len(group), height // TILE, width // TILE, TILE * bits), mx.int16)
            for group, (bits, _) in zip(members, self.kinds, strict=True)
        ]
        self.suh = _empty((self.num_experts, height), mx.float16)
        self.svh = _empty((self.num_experts, width), mx.float16)
        if bias:
            self.bias = _empty((self.num_experts, output_dims), mx.float16)
        self._places: tuple[mx.array, mx.array] | None = None  # (E,) each expert's kind, and its place there
        if len(members) > 1:
            place = {i: (kind, at) for kind, group in enumerate(members) for at, i in enumerate(group)}
            found = [place[i] for i in range(self.num_experts)]
            self._places = mx.array([kind for kind, _ in found]), mx.array([at for _, at in found])
        self.freeze()

    def _extra_repr(self) -> str:
        kinds = ", ".join(f"{bits} bits {codebook}" for bits, codebook in self.kinds)
        return f"{self.num_experts} experts of {self.input_dims} -> {self.output_dims}, {kinds}"

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        parts = [(array, book) for array, (_, book) in zip(self.trellis, self.kinds, strict=True)]
        y = exl3_ops.switch(
            x,
            indices,
            parts,
            places=self._places,
            suh=self.suh,
            svh=self.svh,
            bias=self.get("bias"),
            is_sorted=sorted_indices,
        )
        return y[..., : self.output_dims]
