"""Which parameters a stage holds, and how many bytes each part of them takes. Evaluates nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from shard_loader.footprint import Footprint
from shard_loader.layout import decoder_layers, ghost, parameters_read


class Ownership:
    """The parameters of layers [start, stop) and of what else the stage reads; all others become ghosts.

    forward: builds the stage's lazy output and state arrays of one placeholder pass. What it depends on
    outside the layers (embedding, norm, head, tables shared by all layers) is owned too.
    layers: per own layer {name: array}. outside: the rest. An array with two names counts under its first.
    """

    def __init__(self, model: nn.Module, start: int, stop: int, forward: Callable[[], Any]) -> None:
        layers = decoder_layers(model)
        everything = dict(tree_flatten(model.parameters()))
        self.full_model_bytes = sum(array.nbytes for array in _unique(everything).values())
        per_layer = [dict(tree_flatten(layer.parameters())) for layer in layers]
        own_ids = {id(array) for arrays in per_layer[start:stop] for array in arrays.values()}
        layer_ids = {id(array) for arrays in per_layer for array in arrays.values()}
        outside = _unique({name: array for name, array in everything.items() if id(array) not in layer_ids})
        modules = dict(model.named_modules())
        self._module_of = {name: modules[_owner(name, modules)] for name in outside}
        read = self._read(outside, forward, start == 0)
        kept = own_ids | {id(outside[name]) for name in read}
        ghosts = [(name, ghost(array)) for name, array in everything.items() if id(array) not in kept]
        model.update(tree_unflatten(ghosts), strict=False)
        self.outside = {name: array for name, array in outside.items() if name in read}
        names = {id(array): name for name, array in reversed(everything.items()) if id(array) in own_ids}
        self.layers = [
            {names.pop(id(array)): array for array in arrays.values() if id(array) in names}
            for arrays in per_layer[start:stop]
        ]

    def _read(self, outside: Mapping[str, mx.array], forward: Callable[[], Any], is_first: bool) -> set[str]:
        read = parameters_read(forward(), outside)
        tables = {name for name in outside if _is_embedding(self._module_of[name])}
        if is_first and not read & tables:
            read |= tables  # the model evaluates in mid-pass (dbrx), which hides what came before
        return read

    @property
    def groups(self) -> list[dict[str, mx.array]]:
        """All own parameters in the order to load them: layer by layer, then the others."""
        return [*self.layers, self.outside]

    @property
    def outside_modules(self) -> list[nn.Module]:
        """Those without modules of their own whose parameters `outside` has, each once."""
        found = {id(module): module for module in map(self._module_of.__getitem__, self.outside)}
        return [module for module in found.values() if not module.children()]

    def footprint(self, is_first: bool, is_last: bool) -> Footprint:
        """Bytes by part. A table that the last stage reads and has no other head for is its tied head."""
        parts = {"embed": 0, "norm": 0, "head": 0, "other": 0}
        for name, array in self.outside.items():
            parts[_part(name, self._module_of[name], is_last)] += array.nbytes
        if not is_first:
            table_is = "head" if is_last and not parts["head"] else "other"
            parts[table_is] += parts["embed"]
            parts["embed"] = 0
        return Footprint(
            layers_bytes=sum(array.nbytes for group in self.layers for array in group.values()),
            embed_bytes=parts["embed"],
            norm_bytes=parts["norm"],
            head_bytes=parts["head"],
            other_bytes=parts["other"],
            full_model_bytes=self.full_model_bytes,
        )


def _owner(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The path of the module that has a parameter, maybe in a list."""
    path = name.rpartition(".")[0]
    while path not in modules:
        path = path.rpartition(".")[0]
    return path


def _part(name: str, module: nn.Module, is_last: bool) -> str:
    kind = type(module).__name__.lower()
    if _is_embedding(module):
        return "embed"
    if "norm" in kind or "norm" in name.lower():
        return "norm"
    if "linear" in kind and is_last:
        return "head"
    return "other"


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))


def _unique(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Each array once, under its first name."""
    names = {id(array): name for name, array in reversed(arrays.items())}
    return {name: array for name, array in arrays.items() if names[id(array)] == name}
