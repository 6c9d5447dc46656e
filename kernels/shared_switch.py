"""Takes over the shared expert beside an expert layer, so that it may join the weighted sum in its launches.

As `switch` does with expert layers, and for them: only the class of the module changes, and it goes on
calling mlx-lm's own code wherever its answer does not join a sum. Thread: the one that owns MLX.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
from mlx import nn

from kernels import moe
from kernels.expert_blocks import projections
from kernels.moe_spec import Activation, BlockSpec
from kernels.shared_expert import activation_of, experts_of, spec_of
from kernels.shared_outputs import shared_outputs, watched_shared
from kernels.taken_class import give_back, own_class, take_call

MAX_SHAPES = 256  # of calls that a layer remembers


class Chooser(Protocol):
    """Whether the kernels are to be used for a block of this form and so many tokens."""

    def takes(self, spec: BlockSpec, num_tokens: int) -> bool: ...


class Beside(Protocol):
    """The expert layer beside it."""

    @property
    def failure(self) -> str:
        """Why the kernels are no longer used there."""
        ...

    def forget(self) -> None:
        """Decide anew for every shape, of both."""
        ...


@dataclass(slots=True)
class Plan:
    """Of calls of one shape. is_scaled: how the answer was added to the sum; None: it was not. spec: what the
    kernels take the module for."""

    is_scaled: bool | None = None
    spec: BlockSpec | None = None


@dataclass(slots=True)
class TakenShared:
    """One taken-over shared expert. chooser: decides for blocks of the experts' form with this one."""

    module: Any
    activation: Activation
    chooser: Chooser
    expert: Beside
    plans: dict[tuple[Any, ...], Plan] = field(default_factory=dict)
    specs: dict[mx.Dtype, BlockSpec | str] = field(default_factory=dict)  # as last seen; or why there is none
    is_added: bool = False  # the model was seen to add it to its experts' sum
    bound: moe.Block | None = None
    bound_weights: tuple[mx.array, ...] = ()  # gate, up and down

    def choose(self, chooser: Chooser) -> None:
        """From now on this one decides."""
        self.chooser = chooser
        self.expert.forget()

    def spec(self, dtype: mx.Dtype) -> BlockSpec | str:
        """The module's form for x of `dtype`, or why the kernels do not know it.

        What was decided for another form is forgotten.
        """
        found = spec_of(self.module, self.activation, dtype)
        if self.specs.setdefault(dtype, found) != found:
            self.specs = {dtype: found}
            self.expert.forget()
        return self.specs[dtype]  # one object, as long as it is the same

    def can_join(self, spec: BlockSpec) -> bool:
        """Whether kernels know a block of this form with the module."""
        own = self.spec(spec.dtype)
        return isinstance(own, BlockSpec) and moe.supports(spec, own) is None

    def is_unseen(self, spec: BlockSpec) -> bool:
        """Whether it could join such a block, and no watch has told yet that the model adds it."""
        return not self.is_added and self.can_join(spec)

    def joins(self, spec: BlockSpec, num_tokens: int) -> bool:
        """Whether it is to be computed with such a block."""
        return self.can_join(spec) and self.chooser.takes(spec, num_tokens)

    def by_mlx(self, x: mx.array) -> mx.array:
        """x (..., hidden): its answer as mlx-lm computes it."""
        answer: mx.array = own_class(self.module).__call__(self.module, x)
        return answer

    def block(self, spec: BlockSpec) -> moe.Block | None:
        """The weights as the kernels take them, kept while they are the same arrays.

        New scales or biases are seen with new weights: so they come. None where the module has another form
        than `spec` by now, for which nothing was decided.
        """
        kept = self.bound
        if kept is None or kept.spec is not spec or not self._holds():
            if self.spec(spec.dtype) != spec:
                return None
            kept = self.bound = moe.Block(spec, *experts_of(self.module))
            self.bound_weights = tuple(part["weight"] for part in projections(self.module).values())
        return kept

    def _holds(self) -> bool:
        module, (gate, up, down) = self.module, self.bound_weights
        return (
            module["gate_proj"]["weight"] is gate
            and module["up_proj"]["weight"] is up
            and module["down_proj"]["weight"] is down
        )


class SharedCall:
    """A call of a shared expert: a shared_outputs.Added."""

    __slots__ = ("_plan", "taken", "x")

    def __init__(self, taken: TakenShared, plan: Plan, x: mx.array) -> None:
        self.taken, self._plan, self.x = taken, plan, x

    def plain(self) -> mx.array:
        return self.taken.by_mlx(self.x)

    def is_joined(self, *, is_scaled: bool) -> None:
        spec = self.taken.spec(self.x.dtype)
        assert isinstance(spec, BlockSpec)  # or it could not join
        self._plan.is_scaled, self._plan.spec = is_scaled, spec

    def block(self) -> moe.Block | None:
        """The module's weights, as TakenShared.block; once it has joined a sum of this shape."""
        assert self._plan.spec is not None
        return self.taken.block(self._plan.spec)


def take_over_shared(
    module: nn.Module, expert: Beside, chooser: Chooser, likely: Activation | None
) -> TakenShared | None:
    """Take it over; None where its own call is nothing that kernels know. likely: the experts' activation."""
    activation = activation_of(module) if likely is None else activation_of(module, likely)
    if activation is None:
        return None
    taken = TakenShared(module, activation, chooser, expert)
    base, names = type(module), tuple(module.children())

    def call(self: Any, *given: Any, **options: Any) -> Any:
        if len(given) != 1 or options or self.training or expert.failure:
            return base.__call__(self, *given, **options)
        (x,) = given
        # An adapter puts other modules in the place of these.
        key = (*x.shape, x.dtype, *[type(self[name]) for name in names])
        plan = taken.plans.get(key)
        if plan is None:
            if len(taken.plans) >= MAX_SHAPES:
                expert.forget()
            plan = taken.plans[key] = Plan()
            return watched_shared(SharedCall(taken, plan, x))
        if plan.is_scaled is None:
            return base.__call__(self, x)
        return shared_outputs(SharedCall(taken, plan, x), is_scaled=plan.is_scaled)

    take_call(module, call)
    return taken


def release_shared(taken: TakenShared) -> None:
    """The opposite of `take_over_shared`."""
    give_back(taken.module)
