"""Modules that stand in the places of a model's linears while it reads the calibration text once.

A tap that is called has the inputs of its layer, made by layers that are quantised already: it hands the
layer's weight and the inputs' covariance on, gets back what the quantised layer computes with, and goes on
with that. So one forward pass quantises a model of any architecture, layer by layer in its own order, and
never holds more than one layer in full. On a CPU the products are NumPy's: MLX's own take far longer
there. Main thread only, which owns MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear
from numpy.typing import NDArray

Floats = NDArray[np.float32]
# (name, weight (out, in), its inputs' covariance, None without any) -> what to go on with (out, in)
Quantise = Callable[[str, Callable[[], Floats], Callable[[], Floats] | None], Floats]

MIN_SIZE = 128  # channels on either side: smaller layers would be mostly padding
ROUTERS = {"gate", "router", "shared_expert_gate"}
HEAD = "lm_head"


class LinearTap(nn.Module):  # type: ignore[misc]
    """One linear. Its weight is let go once it is quantised."""

    def __init__(self, name: str, linear: nn.Linear, quantise: Quantise, covariances: Covariances) -> None:
        super().__init__()
        self._name, self._linear, self._quantise, self._covariances = name, linear, quantise, covariances
        self._num_out, self._num_in = linear.weight.shape
        self._is_done = False

    def __call__(self, x: mx.array) -> mx.array:
        weight = self._quantised(lambda: self._covariances.of(x))
        if self._name.rpartition(".")[2] == HEAD:  # nothing comes after it
            return mx.zeros((*x.shape[:-1], self._num_out), x.dtype)
        y = product(x.reshape(-1, self._num_in), weight).reshape(*x.shape[:-1], self._num_out)
        if "bias" in self._linear:
            y = y + self._linear.bias
        y = y.astype(x.dtype)
        mx.eval(y)
        return y

    def _quantised(self, inputs: Callable[[], Floats] | None) -> Floats:
        weight = self._quantise(self._name, lambda: _floats(self._linear.weight), inputs)
        self._is_done = True
        self._linear.pop("weight", None)
        return weight

    def finish(self) -> None:
        """Quantises a layer that the text never reached."""
        if not self._is_done:
            self._quantised(None)


class SwitchTap(nn.Module):  # type: ignore[misc]
    """The experts of one SwitchLinear, called as it is; names: one for each expert."""

    def __init__(self, names: Sequence[str], linear: SwitchLinear, quantise: Quantise) -> None:
        super().__init__()
        self._names, self._linear, self._quantise = tuple(names), linear, quantise
        self._is_done = False

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        shape = mx.broadcast_shapes(x.shape[:-2], indices.shape)
        if x.shape[-2] != 1:
            raise ValueError(f"{self._names[0]} is given several rows for one choice of experts")
        rows = mx.broadcast_to(x, (*shape, *x.shape[-2:])).reshape(-1, x.shape[-1])
        chosen = np.array(mx.broadcast_to(indices, shape).reshape(-1))
        order = np.argsort(chosen, kind="stable")
        rows = rows[mx.array(order.astype(np.int32))]
        mx.eval(rows)
        counts = np.bincount(chosen, minlength=len(self._names))
        out, start = [], 0
        for expert, count in enumerate(counts.tolist()):
            own = rows[start : start + count]
            start += count
            weight = self._expert(expert, own)
            y = product(own, weight)
            out.append(y + self._linear.bias[expert] if "bias" in self._linear else y)
            mx.eval(out[-1])
        self._is_done = True
        self._linear.pop("weight", None)
        back = np.argsort(order, kind="stable").astype(np.int32)
        y = mx.concatenate(out)[mx.array(back)].astype(x.dtype)
        mx.eval(y)
        return y.reshape(*shape, 1, -1)

    def _expert(self, expert: int, rows: mx.array | None) -> Floats:
        inputs = (lambda: covariance(rows)) if rows is not None and rows.shape[0] else None
        return self._quantise(self._names[expert], lambda: _floats(self._linear.weight[expert]), inputs)

    def finish(self) -> None:
        """As LinearTap's."""
        if not self._is_done:
            for expert in range(len(self._names)):
                self._expert(expert, None)


Tap = LinearTap | SwitchTap


class Covariances:
    """Of inputs, the last one kept: queries, keys and values read the same."""

    def __init__(self) -> None:
        self._of: mx.array | None = None
        self._found: Floats | None = None

    def of(self, x: mx.array) -> Floats:
        """(in, in) over all rows of x (..., in)."""
        if x is not self._of or self._found is None:
            self._of, self._found = x, covariance(x.reshape(-1, x.shape[-1]))
        return self._found


def install_taps(
    model: nn.Module, quantise: Quantise, name_of: Callable[[str, int | None], str | None]
) -> list[Tap]:
    """Puts a tap in the place of each layer that is to be quantised, and returns them in the model's order.

    name_of: a module's path and an expert's number (None for a linear) to the name it is handed on with; None
    for one that stays as it is.
    """
    covariances = Covariances()
    new: list[tuple[str, Tap]] = []
    for path, module in model.named_modules():
        if not is_wanted(path, module):
            continue
        if isinstance(module, SwitchLinear):
            names = [name_of(path, expert) for expert in range(module.weight.shape[0])]
            found = [name for name in names if name is not None]
            if len(found) == len(names):
                new.append((path, SwitchTap(found, module, quantise)))
        elif (name := name_of(path, None)) is not None:
            new.append((path, LinearTap(name, module, quantise, covariances)))
    model.update_modules(tree_unflatten(new))
    return [tap for _, tap in new]


def is_wanted(path: str, module: nn.Module) -> bool:
    """Whether a module of this kind and size is quantised at all."""
    if type(module) not in (nn.Linear, SwitchLinear) or path.rpartition(".")[2] in ROUTERS:
        return False
    return bool(min(module.weight.shape[-2:]) >= MIN_SIZE)


def product(rows: mx.array, weight: Floats) -> mx.array:
    """(T, in) times a weight (out, in) -> (T, out) float32."""
    if mx.default_device() == mx.gpu:
        return rows.astype(mx.float32) @ mx.array(weight).T
    return mx.array(_floats(rows) @ weight.T)


def covariance(rows: mx.array) -> Floats:
    """(T, in) -> (in, in): the mean of x x^T."""
    if mx.default_device() == mx.gpu:
        wide = rows.astype(mx.float32)
        return _floats(wide.T @ wide / max(1, rows.shape[0]))
    narrow = _floats(rows)
    found: Any = narrow.T @ narrow / np.float32(max(1, rows.shape[0]))
    return np.asarray(found, np.float32)


def _floats(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32))
