"""Takes over the expert layers of any mlx-lm model, whole or a shard: what was proven faster is used there.

Only the classes of the layer objects change. A layer goes on calling mlx-lm's own code, bit for bit, where it
has another form than the kernels know, where the chooser does not ask for them, or where they fail.
Thread: the one that owns MLX.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from kernels import backend, failure, moe
from kernels.exl3 import Exl3SwitchLinear
from kernels.expert_blocks import experts_of, projection_names, projections
from kernels.expert_form import activation_of, spec_of
from kernels.expert_outputs import Use, outputs, watched
from kernels.moe_spec import BlockSpec
from kernels.shared_expert import beside
from kernels.shared_outputs import Added, answer
from kernels.shared_switch import (
    MAX_SHAPES,
    Chooser,
    SharedCall,
    TakenShared,
    release_shared,
    take_over_shared,
)
from kernels.taken_class import give_back, own_class, take_call

logger = logging.getLogger(__name__)


class Always:
    """Wherever they can: for tests, and for looking what a model would need."""

    def takes(self, spec: BlockSpec, num_tokens: int) -> bool:
        return True


class Never:
    """MLX's operations, while the forms of a model's blocks are being learned."""

    def takes(self, spec: BlockSpec, num_tokens: int) -> bool:
        return False


@dataclass(slots=True)
class Plan:
    """What is done with calls of one shape. has_run: the model's use of the outputs was watched once."""

    spec: BlockSpec | None  # None: MLX's operations
    reason: str = ""  # why it is None
    is_alone: bool = True  # False: the kernels are for a sum with the shared expert only
    has_run: bool = False
    use: Use | None = None

    @property
    def fused(self) -> Use | None:
        """The use for which nothing is to be computed before its sum."""
        return self.use if self.use is not None and (self.is_alone or self.use.has_shared) else None


@dataclass(slots=True)
class Taken:
    """One taken-over layer: what it does with calls of each shape, and how often it used the kernels."""

    chooser: Chooser
    plans: dict[tuple[Any, ...], Plan] = field(default_factory=dict)
    specs: dict[tuple[Any, ...], BlockSpec | str] = field(default_factory=dict)  # or why there is none
    bound: moe.Block | None = None
    num_fused: int = 0  # calls whose weighted sum was fused
    num_plain: int = 0  # calls of the kernels that gave each expert's outputs
    num_joined: int = 0  # of the fused ones, those with the shared expert
    failure: str = ""  # why the kernels are no longer used here
    shared: TakenShared | None = None  # the shared expert beside it

    def choose(self, chooser: Chooser) -> None:
        """From now on this one decides."""
        self.chooser = chooser
        self.forget()

    def forget(self) -> None:
        """Decide anew for every shape."""
        self.plans.clear()
        if self.shared is not None:
            self.shared.plans.clear()

    @property
    def num_calls(self) -> int:
        """Of the kernels."""
        return self.num_fused + self.num_plain

    @property
    def forms(self) -> list[BlockSpec]:
        """The forms that calls have had so far and the kernels know."""
        return [spec for spec in self.specs.values() if isinstance(spec, BlockSpec)]

    @property
    def reasons(self) -> list[str]:
        """Why calls had none."""
        return [spec for spec in self.specs.values() if isinstance(spec, str)]


def take_over(modules: Iterable[nn.Module], chooser: Chooser) -> list[nn.Module]:
    """Take over every expert layer among `modules` and what they contain; returns these layers.

    With them the shared experts beside them. Nothing is touched where no backend can run the kernels.
    """
    if backend.current() is None:
        return []
    modules = list(modules)
    layers = [layer for layer in expert_layers(modules) if taken_of(layer) is None]
    shared = beside(layers, modules)
    for layer in layers:
        taken = Taken(chooser)
        if (module := shared.get(id(layer))) is not None:
            taken.shared = take_over_shared(module, taken, chooser, activation_of(layer))
        _swap(layer, taken)
    return layers


def expert_layers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Every SwitchGLU and SwitchMLP among `modules` and what they contain, but those of EXL3, which has its
    own kernels."""
    found = {id(layer): layer for root in modules for layer in root.modules() if _is_known(layer)}
    return list(found.values())


def release(layers: Iterable[nn.Module]) -> None:
    """The opposite of `take_over`."""
    for layer in layers:
        if (taken := taken_of(layer)) is not None:
            give_back(layer)
            if taken.shared is not None:
                release_shared(taken.shared)


def give_up(layers: Iterable[nn.Module], error: Exception) -> None:
    """From now on these layers stay with MLX's operations."""
    for layer in layers:
        if (taken := taken_of(layer)) is not None and not taken.failure:
            _give_up(taken, error)


def taken_of(layer: nn.Module) -> Taken | None:
    """What is known of a layer; None for one that is not taken over."""
    return getattr(type(layer), "macrame_taken", None)


def _is_known(module: nn.Module) -> bool:
    if not isinstance(module, SwitchGLU | SwitchMLP):
        return False
    if any(isinstance(part, Exl3SwitchLinear) for part in projections(module).values()):
        return False
    calls = SwitchGLU.__call__, SwitchMLP.__call__
    return taken_of(module) is not None or type(module).__call__ in calls


def _swap(layer: nn.Module, taken: Taken) -> None:
    base, names = type(layer), tuple(projection_names(layer).values())

    def call(self: Any, x: mx.array, indices: mx.array) -> Any:
        if self.training:  # the kernels have no gradient
            return base.__call__(self, x, indices)
        # An adapter puts other modules in the place of these.
        key = (*indices.shape, x.dtype, *[type(self[name]) for name in names])
        plan = taken.plans.get(key)
        if plan is None:
            if len(taken.plans) >= MAX_SHAPES:
                taken.forget()
            plan = taken.plans[key] = _plan(self, taken, x, indices)
        if plan.spec is None or (plan.has_run and not plan.is_alone and plan.fused is None):
            return base.__call__(self, x, indices)
        block = _Call(self, taken, plan, plan.spec, x, indices)
        if not plan.has_run:
            plan.has_run = True

            def record(use: Use) -> None:
                plan.use = use

            return watched(block, record)
        if plan.fused is not None:
            return outputs(block, plan.fused)
        return block.plain()

    take_call(layer, call, macrame_taken=taken)


def _plan(layer: Any, taken: Taken, x: mx.array, indices: mx.array) -> Plan:
    top_k = indices.shape[-1]
    if taken.failure:
        return Plan(None, taken.failure)
    if x.shape[:-1] != indices.shape[:-1] or not indices.size:
        return Plan(None, "each token has its experts")
    key = (top_k, x.dtype, *map(type, projections(layer).values()))
    if key not in taken.specs:
        taken.specs[key] = spec_of(layer, top_k, x.dtype)
    spec = taken.specs[key]
    if isinstance(spec, str):
        return Plan(None, spec)
    num_tokens = indices.size // top_k
    is_alone, shared = taken.chooser.takes(spec, num_tokens), taken.shared
    if not is_alone and (shared is None or not (shared.joins(spec, num_tokens) or shared.is_unseen(spec))):
        return Plan(None, "the chooser has it so")
    return Plan(spec, is_alone=is_alone)


class _Call:
    """A call of the kernels, or of MLX's operations once that fails: an expert_outputs.Block."""

    __slots__ = ("_indices", "_layer", "_plan", "_spec", "_taken", "dtype", "shape", "x")

    def __init__(  # noqa: PLR0917
        self, layer: Any, taken: Taken, plan: Plan, spec: BlockSpec, x: mx.array, indices: mx.array
    ) -> None:
        self._layer, self._taken, self._plan, self._spec = layer, taken, plan, spec
        self.x, self._indices = x, indices
        self.shape: tuple[int, ...] = (*indices.shape, x.shape[-1])
        self.dtype = x.dtype

    def plain(self) -> mx.array:
        if not self._plan.is_alone:
            return self._by_mlx()
        try:
            out = self._run(None)
        except Exception as error:  # border: whatever a kernel raises, the answer is MLX's
            _give_up(self._taken, error)
            return self._by_mlx()
        self._taken.num_plain += 1
        return out.reshape(self.shape)

    def summed(
        self, scores: mx.array, added: Added | None = None, factor: mx.array | None = None
    ) -> mx.array:
        try:
            return self._summed(scores, added, factor)
        except Exception as error:  # border, as above
            _give_up(self._taken, error)
            total = self._total_by_mlx(scores)
            return total if added is None else total + answer(added, factor)

    def _summed(self, scores: mx.array, added: Added | None, factor: mx.array | None) -> mx.array:
        shared = self._shared(added, factor)
        if shared is None and added is not None:
            return self._summed(scores, None, None) + answer(added, factor)
        if shared is None and not self._plan.is_alone:
            return self._total_by_mlx(scores)
        out = self._run(scores, shared)
        self._taken.num_fused += 1
        self._taken.num_joined += added is not None
        return out.reshape(self.x.shape)

    def see_added(self, added: Added) -> bool:
        shared = self._taken.shared
        if shared is None or not isinstance(added, SharedCall):
            return False
        if added.taken is not shared or added.x is not self.x:
            return False
        shared.is_added = True
        return shared.joins(self._spec, self._indices.size // self.shape[-2])

    def _shared(self, added: Added | None, factor: mx.array | None) -> moe.SharedBlock | None:
        if added is None:
            return None
        assert isinstance(added, SharedCall)
        block = added.block()
        if block is None:
            return None
        return moe.SharedBlock(block, None if factor is None else factor.reshape(-1, 1))

    def _run(self, scores: mx.array | None, shared: moe.SharedBlock | None = None) -> mx.array:
        top_k = self.shape[-2]
        return moe.run(
            _bound(self._layer, self._taken, self._spec),
            self.x.reshape(-1, self.shape[-1]),
            _uint32(self._indices).reshape(-1, top_k),
            None if scores is None else scores.reshape(-1, top_k),
            shared,
        )

    def _by_mlx(self) -> mx.array:
        y: mx.array = own_class(self._layer).__call__(self._layer, self.x, self._indices)
        return y

    def _total_by_mlx(self, scores: mx.array) -> mx.array:
        y = self._by_mlx()
        return (y * scores[..., None]).sum(axis=-2).astype(y.dtype)


def _bound(layer: Any, taken: Taken, spec: BlockSpec) -> moe.Block:
    """The layer's weights as the kernels take them, kept while they are the same arrays."""
    kept = taken.bound
    if kept is None or kept.spec is not spec or not _holds(kept, layer):
        kept = taken.bound = moe.Block(spec, *experts_of(layer))
    return kept


def _holds(block: moe.Block, layer: Any) -> bool:
    names = projection_names(layer)
    return (
        block.up.weight is layer[names["up"]]["weight"]
        and block.down.weight is layer[names["down"]]["weight"]
        and (block.gate is None or block.gate.weight is layer[names["gate"]]["weight"])
    )


def _uint32(indices: mx.array) -> mx.array:
    return indices if indices.dtype == mx.uint32 else indices.astype(mx.uint32)


def _give_up(taken: Taken, error: Exception) -> None:
    taken.failure = failure.line(error)
    taken.forget()
    logger.warning("an expert layer goes back to MLX's operations: %s", taken.failure)
