"""EXL3 (trellis) checkpoints under mlx-lm's models: they see plain weights, and get layers that decode.

Before a model's `sanitize` each EXL3 weight P.trellis with its scales becomes a lazy P.weight of the shape
that an unquantised checkpoint has; afterwards the parameters that still are such a weight, a stack of them
or, where the model joins what the checkpoint keeps apart, several of them, get a module of kernels.exl3 with
the checkpoint's own tensors. What a model computes of such a weight (the two halves of kv_b_proj) stays a
plain parameter in float16, made from the decoded weight. Evaluates nothing; compute thread only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from kernels import exl3_ops
from kernels.exl3 import Exl3Linear, Exl3Parts, Exl3SwitchLinear, padded_size
from kernels.exl3_reference import TILE, Codebook, bits_of
from planner.exl3 import CODEBOOK_LEAVES, LEAVES, paths
from shard_loader.layout import ghost
from shard_loader.origins import Origins, Stack
from shard_loader.reads import tensors_read

# Linears of a model -> what checkpoints keep in their place, in the order of their outputs.
_JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)$")
_STACKED = ("switch_mlp", "switch_glu", "experts")  # where models keep what `experts.N` of a checkpoint holds

Weights = dict[str, mx.array]


class Exl3Error(ValueError):
    """A checkpoint that does not suit its model class; one sentence."""


@dataclass(frozen=True, slots=True)
class _Group:
    """One weight of the checkpoint. plain: what stands for it while the model sanitizes."""

    path: str
    trellis: mx.array  # (in / 16, out / 16, 16 K)
    suh: mx.array  # (in,)
    svh: mx.array  # (out,)
    codebook: Codebook
    plain: mx.array  # (out, in) float16

    @property
    def kind(self) -> tuple[int, Codebook]:
        return bits_of(self.trellis.shape), self.codebook


class Exl3Weights:
    """The EXL3 weights of one checkpoint, while its model is built."""

    def __init__(self, weights: Mapping[str, mx.array]) -> None:
        self._groups = {path: _group(path, weights) for path in paths(weights)}
        self._by_plain = {id(group.plain): group for group in self._groups.values()}
        self._used: set[str] = set()

    @property
    def is_empty(self) -> bool:
        return not self._groups

    def plain(self, weights: Weights) -> Weights:
        """`weights` with a plain weight for each EXL3 one, in its place."""
        out: Weights = {}
        for name, array in weights.items():
            path, _, leaf = name.rpartition(".")
            group = self._groups.get(path)
            if group is None or leaf not in LEAVES:
                out[name] = array
            elif leaf == "trellis":
                out[f"{path}.weight"] = group.plain
        return out

    def install(self, model: nn.Module, weights: Weights, origins: Origins) -> Weights:
        """Puts EXL3 modules into `model` and returns its parameters, given what it made of the plain ones.

        Raises Exl3Error for weights that the model uses in a way that has no EXL3 form.
        """
        weights = dict(weights)
        modules = dict(model.named_modules())
        self._stack_experts(modules, weights)
        places = {name.removesuffix(".weight"): array for name, array in weights.items()}
        new: dict[str, nn.Module] = {}
        for path, module in modules.items():
            leaf = path.rpartition(".")[2]
            joined = [f"{path.removesuffix(leaf)}{part}" for part in _JOINED.get(leaf, ())]
            array = places.get(path)
            if isinstance(module, nn.Linear) and array is not None and id(array) in self._by_plain:
                new[path] = self._linear(path, module, weights)
            elif (
                isinstance(module, nn.Linear) and array is None and joined and self._are_plain(joined, places)
            ):
                new[path] = self._joined(path, module, joined, weights)
            elif isinstance(module, SwitchLinear) and array is not None:
                members = self._members(array, origins)
                if members:
                    new[path] = self._switch(path, module, members, weights)
        model.update_modules(tree_unflatten(list(new.items())))
        self._check_leftovers(weights)
        return weights

    # -- what models see ----------------------------------------------------------------------------------
    def _stack_experts(self, modules: Mapping[str, nn.Module], weights: Weights) -> None:
        """Experts that the model expects in one tensor and did not stack itself, as its module's weight."""
        single: dict[tuple[str, str], dict[int, mx.array]] = {}
        for name, array in weights.items():
            found = _EXPERT.match(name.removesuffix(".weight")) if id(array) in self._by_plain else None
            if found:
                single.setdefault((found[1], found[3]), {})[int(found[2])] = array
        for (path, leaf), experts in single.items():
            place = next(
                (
                    name
                    for name in (f"{path}.{stack}.{leaf}" for stack in _STACKED)
                    if isinstance(modules.get(name), SwitchLinear) and f"{name}.weight" not in weights
                ),
                None,
            )
            module = modules.get(place) if place else None
            if place is None or module is None:
                continue
            wanted = range(module.weight.shape[0])
            missing = next((i for i in wanted if i not in experts), None)
            if missing is not None:
                name = f"{path}.experts.{missing}.{leaf}.trellis"
                raise Exl3Error(f"the checkpoint lacks tensor '{name}': download the model again")
            weights[f"{place}.weight"] = mx.stack([experts[i] for i in wanted])
            biases = [weights.get(f"{path}.experts.{i}.{leaf}.bias") for i in wanted]
            if all(bias is not None for bias in biases):
                weights[f"{place}.bias"] = mx.stack([bias for bias in biases if bias is not None])
            for i in wanted:
                del weights[f"{path}.experts.{i}.{leaf}.weight"]
                weights.pop(f"{path}.experts.{i}.{leaf}.bias", None)

    def _are_plain(self, names: Sequence[str], places: Mapping[str, mx.array]) -> bool:
        return all(id(places.get(name)) in self._by_plain for name in names)

    def _members(self, array: mx.array, origins: Origins) -> list[_Group]:
        """The weights that `array` is a stack of; empty for any other."""
        origin = origins.of(array)
        if not isinstance(origin, Stack):
            return []
        found = [self._by_plain.get(id(part)) for part in origin.parts]
        return [group for group in found if group is not None] if None not in found else []

    # -- modules ------------------------------------------------------------------------------------------
    def _linear(self, path: str, module: nn.Module, weights: Weights) -> nn.Module:
        group = self._by_plain[id(weights.pop(f"{path}.weight"))]
        num_out, num_in = module.weight.shape
        return self._one(path, group, (num_out, num_in), weights, has_bias="bias" in module)

    def _one(
        self, path: str, group: _Group, shape: tuple[int, int], weights: Weights, *, has_bias: bool
    ) -> Exl3Linear:
        """A layer of shape (out, in) whose parameters go into `weights` under `path`."""
        num_out, num_in = shape
        _check_size(group, num_in, num_out)
        bits, codebook = group.kind
        weights |= {f"{path}.trellis": group.trellis, f"{path}.suh": group.suh, f"{path}.svh": group.svh}
        if has_bias and f"{path}.bias" in weights:
            weights[f"{path}.bias"] = weights[f"{path}.bias"][:num_out]
        self._used.add(group.path)
        return Exl3Linear(num_in, num_out, bits, codebook, has_bias)

    def _joined(self, path: str, module: nn.Module, names: Sequence[str], weights: Weights) -> nn.Module:
        """One layer of the model made of several of the checkpoint."""
        num_out, num_in = module.weight.shape
        groups = [self._by_plain[id(weights.pop(f"{name}.weight"))] for name in names]
        sizes = [int(group.svh.shape[0]) for group in groups]
        if sum(sizes) != num_out:
            raise Exl3Error(
                f"{path} has {num_out} outputs, and {' + '.join(names)} have {' + '.join(map(str, sizes))}: "
                "this model class is not supported with such an EXL3 checkpoint"
            )
        has_bias = "bias" in module
        for at, name in enumerate(names):
            if has_bias and f"{name}.bias" in weights:
                weights[f"{path}.parts.{at}.bias"] = weights.pop(f"{name}.bias")
        return Exl3Parts(
            [
                self._one(f"{path}.parts.{at}", group, (size, num_in), weights, has_bias=has_bias)
                for at, (group, size) in enumerate(zip(groups, sizes, strict=True))
            ]
        )

    def _switch(
        self, path: str, module: nn.Module, members: Sequence[_Group], weights: Weights
    ) -> Exl3SwitchLinear:
        num_experts, num_out, num_in = module.weight.shape
        if len(members) != num_experts:
            raise Exl3Error(f"{path} has {num_experts} experts, the checkpoint has {len(members)} for it")
        for group in members:
            _check_size(group, num_in, num_out)
        switch = Exl3SwitchLinear(num_in, num_out, [group.kind for group in members], "bias" in module)
        del weights[f"{path}.weight"]
        for number, kind in enumerate(switch.kinds):
            own = [group.trellis for group in members if group.kind == kind]
            weights[f"{path}.trellis.{number}"] = mx.stack(own)
        weights[f"{path}.suh"] = mx.stack([group.suh for group in members])
        weights[f"{path}.svh"] = mx.stack([group.svh for group in members])
        if f"{path}.bias" in weights:
            weights[f"{path}.bias"] = weights[f"{path}.bias"][:, :num_out]
        self._used.update(group.path for group in members)
        return switch

    def _check_leftovers(self, weights: Weights) -> None:
        """Experts have no decoded form here: a model that computes with them cannot be loaded."""
        left = {
            g.path: g.plain
            for g in self._groups.values()
            if g.path not in self._used and _EXPERT.match(g.path)
        }
        if not left:
            return
        read = sorted(tensors_read([weights], left, are_ghosts=True))
        if read:
            raise Exl3Error(
                f"this model class uses the experts of its checkpoint ({read[0]}) in a way that has no EXL3 "
                "form yet: take an MLX or unquantised checkpoint of the model"
            )


def _group(path: str, weights: Mapping[str, mx.array]) -> _Group:
    def scale(name: str) -> mx.array:
        plain, packed = weights.get(f"{path}.{name}h"), weights.get(f"{path}.{name}")
        if plain is not None:
            return plain
        if packed is None:
            raise Exl3Error(f"the checkpoint lacks tensor '{path}.{name}h': download the model again")
        return exl3_ops.signs(packed)

    trellis = weights.get(f"{path}.trellis")
    if trellis is None:
        raise Exl3Error(f"the checkpoint lacks tensor '{path}.trellis': download the model again")
    suh, svh = scale("su"), scale("sv")
    named = [leaf for leaf in CODEBOOK_LEAVES if f"{path}.{leaf}" in weights]
    codebook: Codebook = "mcg" if named == ["mcg"] else "mul1" if named == ["mul1"] else "3inst"
    bits_of(trellis.shape)
    if _EXPERT.match(path):  # there may be thousands, and models do no more than stack them
        plain = ghost(mx.zeros((svh.shape[0], suh.shape[0]), mx.float16))
    else:
        plain = exl3_ops.dense(trellis, suh, svh, codebook)
    return _Group(path, trellis, suh, svh, codebook, plain)


def _check_size(group: _Group, num_in: int, num_out: int) -> None:
    """Raises Exl3Error where a weight is not that of so many channels, padded."""
    height, width = (size * TILE for size in group.trellis.shape[:2])
    if (height, width) != (padded_size(num_in), padded_size(num_out)):
        raise Exl3Error(
            f"tensor '{group.path}.trellis' has {height} inputs and {width} outputs; the config asks for "
            f"{num_in} and {num_out}"
        )


def is_exl3(module: Any) -> bool:
    """Whether a module holds an EXL3 weight."""
    return isinstance(module, (Exl3Linear, Exl3SwitchLinear))


def keeps_dtype(model: nn.Module) -> frozenset[str]:
    """Parameters that no cast may touch: the scales of EXL3 weights."""
    names = (f"{path}.{leaf}" for path, m in model.named_modules() if is_exl3(m) for leaf in ("suh", "svh"))
    return frozenset(names)
