"""LoRA and DoRA adapters on a shard: several at once, one in use for each forward pass, no weight copied.

mlx-lm wraps the modules that an adapter changes; here the wrappers of all adapters share the base modules,
and `use` puts those of one adapter into the model's tree. What then runs is mlx-lm's own code. Only wrappers
of own modules are kept and evaluated. Compute thread only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from planner.adapters import WEIGHTS_NAME, AdapterFiles, read_adapter_config, read_adapter_headers
from planner.headers import ModelFilesError
from shard_loader.shard import Shard
from shard_loader.weights import WeightsError

_LEAVES = ("lora_a", "lora_b", "m")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one wrapped module lies in the model's tree."""

    parent: Any  # a module (which is a dict) or a list
    key: Any
    base: nn.Module
    wrapped: nn.Module


class Adapters:
    """The adapters of one shard, all in memory. Without any, nothing here costs anything."""

    def __init__(self) -> None:
        self._places: dict[str, list[_Place]] = {"": []}
        self._used = ""

    @property
    def names(self) -> tuple[str, ...]:
        """What `use` accepts beside the empty name."""
        return tuple(name for name in self._places if name)

    def check(self, name: str) -> None:
        """Raises ValueError for an adapter that is not here."""
        if name not in self._places:
            known = ", ".join(self.names) or "none"
            raise ValueError(f"there is no adapter {name[:200]!r} here; there are: {known}")

    def use(self, name: str) -> None:
        """The next forward pass is built with this adapter; with an empty name, without any."""
        if name == self._used:
            return
        self.check(name)
        for place in self._places[self._used]:
            place.parent[place.key] = place.base
        for place in self._places[name]:
            place.parent[place.key] = place.wrapped
        self._used = name

    def load(self, shard: Shard, model: nn.Module, adapter: AdapterFiles) -> tuple[int, int]:
        """Adds an adapter; returns the bytes of its tensors on this shard: in layers, and outside of them.

        Raises WeightsError naming the adapter and the tensor for one that does not belong to the model,
        has another shape or is missing.
        """
        from mlx_lm.tuner.utils import linear_to_lora_layers  # brings the trainer with it: not for everyone

        self.use("")
        try:
            config, headers = read_adapter_config(adapter), read_adapter_headers(adapter)
        except ModelFilesError as error:
            raise WeightsError(str(error)) from error
        in_layers = {id(array) for group in shard.ownership.layers for array in group.values()}
        outside = {id(array) for array in shard.ownership.outside.values()}
        before = dict(model.named_modules())
        try:
            linear_to_lora_layers(
                model, config["num_layers"], config["lora_parameters"], config.get("fine_tune_type") == "dora"
            )
            after = dict(model.named_modules())
            wrapped = {
                path: (base, after[path]) for path, base in before.items() if after.get(path) is not base
            }
            self._fill(model, adapter, {header.name: header.shape for header in headers})
        except WeightsError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WeightsError(
                f"the adapter {adapter.name} does not suit this model: {' '.join(str(error).split())}"
            ) from error
        places: list[_Place] = []
        own_bytes = [0, 0]
        for path, (base, module) in wrapped.items():
            module.eval()
            parent, key = _parent(model, path)
            parent[key] = base
            ids = {id(array) for _, array in tree_flatten(base.parameters())}
            if ids.isdisjoint(in_layers | outside):
                continue
            arrays = list(_adapter_arrays(module))
            mx.eval(arrays)
            own_bytes[ids.isdisjoint(in_layers)] += sum(array.nbytes for array in arrays)
            places.append(_Place(parent, key, base, module))
        self._places[adapter.name] = places
        return own_bytes[0], own_bytes[1]

    def _fill(self, model: nn.Module, adapter: AdapterFiles, shapes: dict[str, tuple[int, ...]]) -> None:
        """The adapter's tensors into the wrappers, still lazy."""
        wanted = {
            name: array.shape
            for name, array in tree_flatten(model.parameters())
            if name.rsplit(".", 1)[-1] in _LEAVES
        }
        for name, shape in shapes.items():
            if name not in wanted:
                raise WeightsError(
                    f"the adapter {adapter.name} has the tensor {name!r}, for which this model has no place"
                )
            if tuple(wanted[name]) != shape:
                raise WeightsError(
                    f"the adapter {adapter.name} gives {name!r} the shape {shape}; the model and its "
                    f"adapter_config.json ask for {tuple(wanted[name])}"
                )
        missing = sorted(wanted.keys() - shapes.keys())
        if missing:
            raise WeightsError(f"the adapter {adapter.name} lacks the tensor {missing[0]!r}")
        tensors = mx.load(str(adapter.path / WEIGHTS_NAME))
        assert isinstance(tensors, dict)
        model.load_weights(list(tensors.items()), strict=False)


def load_adapters(shard: Shard, adapters: Sequence[AdapterFiles]) -> Adapters:
    """All adapters on a loaded shard, whose footprint then counts their bytes. Raises as `Adapters.load`."""
    found = Adapters()
    for adapter in adapters:
        in_layers_bytes, outside_bytes = found.load(shard, shard._model, adapter)
        part = shard.footprint
        shard.footprint = replace(
            part,
            layers_bytes=part.layers_bytes + in_layers_bytes,
            other_bytes=part.other_bytes + outside_bytes,
            full_model_bytes=part.full_model_bytes + sum(h.nbytes for h in read_adapter_headers(adapter)),
        )
    return found


def _adapter_arrays(module: nn.Module) -> Iterator[mx.array]:
    for name, array in tree_flatten(module.parameters()):
        if name.rsplit(".", 1)[-1] in _LEAVES:
            yield array


def _parent(model: nn.Module, path: str) -> tuple[Any, Any]:
    """The module or list that holds the module at `path`, and its key there."""
    *steps, last = path.split(".")
    node: Any = model
    for step in steps:
        node = node[int(step)] if isinstance(node, list) else node[step]
    return node, int(last) if isinstance(node, list) else last
