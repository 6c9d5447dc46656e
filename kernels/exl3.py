"""EXL3 (trellis) layers as modules of MLX: in the place of a Linear, of a SwitchLinear, or of a Linear whose
outputs the checkpoint keeps in several tensors.

Parameters are the tensors of the checkpoint as they are (kernels.exl3_reference says what they mean). A layer
multiplies by MLX's operations until `choice` says otherwise, which the self-test sets (kernels.exl3_subject).
For the thread that owns MLX.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import mlx.core as mx
import numpy as np
from mlx import nn

from kernels import exl3_ops
from kernels.exl3_choice import Called, ChoosingLayer, Way
from kernels.exl3_kernels import Matrix, plan
from kernels.exl3_ops import PLAIN, Decoder
from kernels.exl3_reference import BLOCK, TILE, Codebook

UNPACKED_WEIGHTS = 1 << 24  # in float16 at once: as much memory as PLAIN's
MAX_ROWS = 32  # of a linear that is decoded where it is multiplied
MAX_PAIRS = 512  # of a token and an expert, the same


def padded_size(num_channels: int) -> int:
    """How many channels a tensor has for so many of the layer."""
    return -(-num_channels // BLOCK) * BLOCK


def _unpacked(trellis: mx.array, codebook: Codebook) -> mx.array:
    *lead, height, width, words = trellis.shape
    nothing = mx.zeros(8, mx.float16)
    matrix = Matrix(
        trellis.reshape(prod(lead), height, width, words), nothing, nothing, None, codebook, width * TILE
    )
    return matrix.unpacked().reshape(*lead, height * TILE, width * TILE)


UNPACKED = Decoder(_unpacked, UNPACKED_WEIGHTS, is_exact=False)


def exl3_layers(modules: Iterable[nn.Module]) -> list[Exl3Linear | Exl3SwitchLinear]:
    """Every EXL3 layer among `modules` and what they contain."""
    kinds = (Exl3Linear, Exl3SwitchLinear)
    found = {id(layer): layer for root in modules for layer in root.modules() if isinstance(layer, kinds)}
    return list(found.values())


def _empty(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.zeros(shape, dtype)


class Exl3Linear(ChoosingLayer):
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
        if self.called is None:
            self.called = Called(x.dtype)
        return self._chosen(prod(x.shape[:-1]), lambda way: self.product(x, way))

    def product(self, x: mx.array, way: Way) -> mx.array:
        """In that way; raises whatever a kernel raises."""
        own = self.matrix
        if way == "zeros":
            return mx.zeros((*x.shape[:-1], self.output_dims), x.dtype)
        if way == "in place":
            return own.product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        decoder = PLAIN if way == "operations" else UNPACKED
        y = exl3_ops.linear(x, own.trellis, own.suh, own.svh, own.codebook, bias=own.bias, decoder=decoder)
        return y[..., : self.output_dims]

    @property
    def matrix(self) -> Matrix:
        """The weight."""
        bias = self.get("bias")
        return Matrix(self.trellis, self.suh, self.svh, bias, self.codebook, self.output_dims)

    def to_lora(self, *, r: int, scale: float, dropout: float) -> nn.Module:
        """What mlx-lm asks of a layer that an adapter changes."""
        from mlx_lm.tuner.lora import LoRALinear  # brings the trainer with it: not for everyone

        lora = LoRALinear(self.input_dims, self.output_dims, r, dropout, scale)
        lora.linear = self
        return lora


class Exl3Parts(nn.Module):  # type: ignore[misc]
    """One layer of a model whose checkpoint keeps its outputs in several tensors, side by side."""

    def __init__(self, parts: Sequence[Exl3Linear]) -> None:
        super().__init__()
        self.parts = list(parts)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([part(x) for part in self.parts], axis=-1)


class Exl3SwitchLinear(ChoosingLayer):
    """Experts, called as mlx-lm's SwitchLinear is: x (..., M, input_dims) and indices that are broadcast with
    the axes before M, to (..., M, output_dims) in the dtype of x.

    kinds: for each expert its bits and codebook. `trellis` has an array for each kind that occurs, in the
    order of their first experts: (E', in / 16, out / 16, 16 K) of the experts of that kind, in order. The
    kernels know experts of one kind only.
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
        self.kinds_of_experts = tuple(kinds)
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
        if self.called is None and indices.ndim > 1:  # mlx-lm sorts the pairs of many tokens in one row
            self.called = Called(x.dtype, indices.shape[-1], x.shape[:-2] == indices.shape)
        top_k = 1 if self.called is None else self.called.top_k
        return self._chosen(
            -(-indices.size // top_k), lambda way: self.product(x, indices, way, sorted_indices)
        )

    def product(self, x: mx.array, indices: mx.array, way: Way, sorted_indices: bool = False) -> mx.array:
        """In that way, or by MLX's operations where the kernels have no such product; raises whatever a
        kernel raises."""
        lead = mx.broadcast_shapes(x.shape[:-2], indices.shape)
        if way == "zeros":
            return mx.zeros((*lead, x.shape[-2], self.output_dims), x.dtype)
        if way == "in place":
            if len(self.kinds) == 1 and x.shape[-2] == 1 and indices.shape == lead:
                return self._in_place(x, indices).reshape(*lead, 1, -1)
            way = "operations"
        y = exl3_ops.switch(
            x,
            indices,
            [(array, book) for array, (_, book) in zip(self.trellis, self.kinds, strict=True)],
            places=self._places,
            suh=self.suh,
            svh=self.svh,
            bias=self.get("bias"),
            is_sorted=sorted_indices,
            decoder=PLAIN if way == "operations" else UNPACKED,
        )
        return y[..., : self.output_dims]

    def expert(self, number: int) -> Matrix:
        """The weight of one."""
        kind, at = 0, number
        if self._places is not None:
            kind, at = (int(np.array(places)[number]) for places in self._places)
        bias = self.get("bias")
        return Matrix(
            self.trellis[kind][at],
            self.suh[number],
            self.svh[number],
            None if bias is None else bias[number],
            self.kinds[kind][1],
            self.output_dims,
        )

    def to_lora(self, *, r: int, scale: float, dropout: float) -> nn.Module:
        """As Exl3Linear's."""
        from mlx_lm.tuner.lora import LoRASwitchLinear

        lora = LoRASwitchLinear(self.input_dims, self.output_dims, self.num_experts, r, dropout, scale)
        lora.linear = self
        return lora

    def _in_place(self, x: mx.array, indices: mx.array) -> mx.array:
        """(pairs, output_dims), in the order of the indices."""
        (_, codebook), (trellis,) = self.kinds[0], self.trellis
        matrix = Matrix(trellis, self.suh, self.svh, self.get("bias"), codebook, self.output_dims)
        own, shared = indices.shape, (*indices.shape[:-1], 1)
        if x.shape[:-2] not in (own, shared):
            x = mx.broadcast_to(x, (*own, *x.shape[-2:]))
        rows, chosen = x.reshape(-1, x.shape[-1]), indices.reshape(-1).astype(mx.uint32)
        if rows.shape[0] * indices.shape[-1] == chosen.size and rows.shape[0] == 1:
            return matrix.pairs(rows, chosen)  # one token: no expert is chosen twice
        return matrix.tiles(rows, chosen, plan(chosen, self.num_experts))
