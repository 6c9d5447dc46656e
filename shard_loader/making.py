"""How a shard's parameters are made from what the files hold: cast, stacked and quantised, block by block.

The steps and their order are those of `mlx_lm.convert`: floats are cast, then linears and embeddings are
quantised where the model's own `quant_predicate` allows it. Quantisation works on groups within a row, so
blocks of rows give the same bits as the whole. Compute thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from planner.load_options import LoadOptions, Quantization
from shard_loader.exl3 import is_exl3, keeps_dtype
from shard_loader.origins import InFile, Origin, Origins, Stack

SMALL_BYTES = 1 << 20  # what is computed but smaller than this is evaluated with its layer

# Modules whose `to_quantized` is mx.quantize of their weight and nothing else.
_PLAIN = (nn.Linear, nn.Embedding, SwitchLinear, MultiLinear)

Transform = Callable[[mx.array], tuple[mx.array, ...]]


class Making:
    """Parameters that are made together: a weight, or a quantised one with its scales and biases.

    outputs: the model's own lazy arrays. origin: what they are made of, in blocks of rows; None: as their
    graph says. transform: one block of rows to the same rows of each output; None: they stay as they are.
    """

    def __init__(
        self, outputs: tuple[mx.array, ...], origin: Origin | None, transform: Transform | None
    ) -> None:
        self.outputs, self._origin, self._transform = outputs, origin, transform

    @property
    def is_computed(self) -> bool:
        """It takes more than reading each part into its place."""
        return self._transform is not None or not (
            isinstance(self._origin, Stack) and self._origin.is_in_files
        )

    def make(self) -> None:
        """Evaluates the outputs; beside their bytes little more than one block is in memory."""
        origin, self._origin = self._origin, None
        if origin is not None:
            self._make_of(origin)
        mx.eval(self.outputs)

    def _make_of(self, origin: Origin) -> None:
        outputs, transform = self.outputs, self._transform
        shapes = [(out.size // out.shape[-1], out.shape[-1]) for out in outputs]
        for out in outputs:
            out[:] = mx.zeros(out.shape, out.dtype)  # lets go of the graph, which would hold all that is read
        if transform is None and isinstance(origin, Stack):
            target = mx.zeros(outputs[0].shape, outputs[0].dtype)
            if origin.read_into(target):
                outputs[0][:] = target
                return
            del target
        transform = transform or _caster(None)
        made: list[mx.array] = []
        row = 0
        for block in origin.rows():
            while block:
                results = transform(block.pop(0))
                stop = row + results[0].shape[0]
                if stop == shapes[0][0] and not made:  # all in one piece
                    made = [*results]
                else:
                    made = made or [mx.zeros(s, r.dtype) for s, r in zip(shapes, results, strict=True)]
                    for target, result in zip(made, results, strict=True):
                        target[row:stop] = result  # in place: nobody else holds the target
                row = stop
                del results
            mx.eval(made)
        for out, array in zip(outputs, made, strict=True):
            if out.dtype != array.dtype or out.size != array.size:
                raise ValueError(f"made {array.dtype} {array.shape} for {out.dtype} {out.shape}")
            out[:] = array.reshape(out.shape)  # into the model's own array object


@dataclass(frozen=True, slots=True)
class _Step:
    """What has been decided for one parameter so far."""

    array: mx.array
    origin: Origin | None
    dtype: mx.Dtype | None  # it is cast to


class Workshop:
    """What of a model's parameters is to be made, found by any of its outputs."""

    def __init__(self, origins: Origins) -> None:
        self._origins = origins
        self._steps: dict[int, _Step] = {}
        self._makings: dict[int, Making] = {}

    def making_of(self, array: mx.array) -> Making | None:
        """How a parameter is made; None for one in the files as it is, or too small to matter."""
        return self._makings.get(id(array))

    def forget(self) -> None:
        """Nothing is to be made: all of it was found in the cache."""
        self._makings.clear()

    def prepare(self, model: nn.Module, config: Mapping[str, Any], options: LoadOptions) -> None:
        """Casts and quantises the model's lazy parameters, and notes how they are to be made.

        Raises ValueError (one sentence) for a model that is quantised already, or cannot be.
        """
        cast_to = options.cast_to(config)
        self._cast(model, None if cast_to is None else getattr(mx, cast_to))
        if options.quantize is not None:
            self._quantize(model, options.quantize)
        for _, array in tree_flatten(model.parameters()):
            step = self._steps.get(id(array))
            if step is None or array.nbytes < SMALL_BYTES or id(array) in self._makings:
                continue
            if step.dtype is not None or not isinstance(step.origin, InFile):
                self._note((array,), step.origin, None if step.dtype is None else _caster(step.dtype))
        self._steps.clear()
        self._origins.keep({})

    def _cast(self, model: nn.Module, dtype: mx.Dtype | None) -> None:
        may_cast = getattr(model, "cast_predicate", lambda _name: True)
        kept = keeps_dtype(model)
        changed: list[tuple[str, mx.array]] = []
        for name, array in tree_flatten(model.parameters()):
            origin = self._origins.of(array)
            is_float = mx.issubdtype(array.dtype, mx.floating)
            if dtype is None or array.dtype == dtype or not is_float or name in kept or not may_cast(name):
                self._steps[id(array)] = _Step(array, origin, None)
            else:
                new = array.astype(dtype)
                changed.append((name, new))
                self._steps[id(new)] = _Step(new, origin, dtype)
        model.update(tree_unflatten(changed))

    def _quantize(self, model: nn.Module, how: Quantization) -> None:
        before = dict(model.named_modules())
        if any(is_exl3(m) or ("scales" in m and hasattr(m, "bits")) for m in before.values()):
            raise ValueError("the checkpoint is quantised already: remove load.quantize")
        try:
            nn.quantize(
                model, how.group_size, how.bits, mode=how.mode, class_predicate=_predicate(model, how)
            )
        except TypeError as error:
            raise ValueError(f"this architecture cannot be quantised in the mode {how.mode}") from error
        for path, module in model.named_modules():
            old = before.get(path)
            if old is None or old is module or "scales" not in module:
                continue
            step = self._steps.get(id(old.weight))
            origin = step.origin if step is not None and type(old) in _PLAIN else None
            dtype = None if step is None else step.dtype
            names = (name for name in ("weight", "scales", "biases") if module.get(name) is not None)
            packed = _quantizer(dtype, module.group_size, module.bits, module.mode)
            self._note(tuple(module[name] for name in names), origin, packed)

    def _note(
        self, outputs: tuple[mx.array, ...], origin: Origin | None, transform: Transform | None
    ) -> None:
        making = Making(outputs, origin, transform)
        self._makings.update((id(array), making) for array in outputs)


def _predicate(model: nn.Module, how: Quantization) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """Which modules are quantised, and how: as mlx_lm.utils.quantize_model decides."""
    own = getattr(model, "quant_predicate", None)

    def decide(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % how.group_size:
            return False
        verdict: bool | dict[str, Any] = True if own is None else own(path, module)
        return verdict

    return decide


def _caster(dtype: mx.Dtype | None) -> Transform:
    return lambda rows: (rows if dtype is None else rows.astype(dtype),)


def _quantizer(dtype: mx.Dtype | None, group_size: int, bits: int, mode: str) -> Transform:
    cast = _caster(dtype)
    return lambda rows: tuple(mx.quantize(cast(rows)[0], group_size, bits, mode=mode))
