"""Expert layers with the shared expert beside them under test: one sum, or what is computed otherwise.

For the thread that owns MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn

from kernels import moe, moe_reference
from kernels.expert_blocks import Tokens, describe, describe_weights, experts_of, projections
from kernels.expert_subject import ExpertSubject, Tested, mlx_run_of, run_of
from kernels.measure import Path, Run
from kernels.moe_spec import BlockSpec
from kernels.shared_switch import TakenShared
from kernels.switch import Taken, taken_of
from kernels.verdicts import Verdict


@dataclass(frozen=True, slots=True)
class _TestedBeside(Tested):
    """As Tested, while the shared expert has the form that was tested too."""

    shared: TakenShared
    own: BlockSpec

    def takes(self, spec: BlockSpec, num_tokens: int) -> bool:
        return Tested.takes(self, spec, num_tokens) and self.shared.spec(spec.dtype) == self.own


@dataclass(frozen=True, slots=True)
class SharedSubject:
    """A form of block with a shared expert of one form, and mlx-lm's layers that have both."""

    experts: ExpertSubject
    spec: BlockSpec  # of the shared expert

    @property
    def name(self) -> str:
        experts = describe(self.experts.spec, self.experts.layers[0])
        own = describe_weights(self.spec, self.parts)
        return f"{experts}; a shared expert of {self.spec.expert_size}, {own}"

    @property
    def parts(self) -> dict[str, Any]:
        """The first layer's shared expert's matrices by "gate", "up" and "down"."""
        return projections(_shared(self.experts.layers[0]).module)

    @property
    def form(self) -> None:
        """A planner counts a shared expert as the layer of its own that it is."""
        return None

    @property
    def classes(self) -> Sequence[tuple[int, int]]:
        return self.experts.classes

    @property
    def tolerance(self) -> float:
        return self.experts.tolerance

    def has_kernels(self, num_tokens: int) -> bool:
        return self.experts.has_kernels(num_tokens)

    def answers(self, num_tokens: int) -> Iterator[tuple[Callable[[], mx.array], mx.array]]:
        """The sum with the shared expert's answer as it is, and times a factor of each token."""
        layer, spec = self.experts.layers[0], self.experts.spec
        experts, beside = experts_of(layer), _block(layer, self.spec)
        found = self.experts.tokens(num_tokens)
        with mx.stream(mx.cpu):  # a GPU may round products of float32 to less
            total = moe_reference.switch_glu(spec, found.x, found.indices, found.scores, *experts)
            mx.eval(total)
        run = partial(moe.run, moe.Block(spec, *experts), found.x, found.indices, found.scores)
        for factor in (None, found.scores[:, :1]):
            shared = moe.SharedBlock(beside, factor)
            with mx.stream(mx.cpu):
                wanted = total + moe_reference.shared_answer(shared.weights, found.x)
                mx.eval(wanted)
            yield partial(run, shared), wanted

    def inputs(self, num_tokens: int, seed: int) -> Tokens:
        return self.experts.inputs(num_tokens, seed)

    def needed_bytes(self, one: Tokens) -> int:
        block = _block(self.experts.layers[0], self.spec)
        return self.experts.needed_bytes(one) + sum(int(array.nbytes) for array in block.arrays)

    def paths(self, num_tokens: int) -> tuple[Path, Path]:
        """A block's answer is the next one's input. The other way is what the experts alone are best with."""
        layers = self.experts.layers
        return (
            Path([self._joined(layer) for layer in layers], self.needed_bytes),
            Path([self._apart(layer, num_tokens) for layer in layers], self.needed_bytes),
        )

    def _joined(self, layer: Any) -> Run:
        return run_of(self.experts.spec, layer, moe.SharedBlock(_block(layer, self.spec), None))

    def _apart(self, layer: Any, num_tokens: int) -> Run:
        shared, spec = _shared(layer), self.experts.spec
        has_kernels = _taken(layer).chooser.takes(spec, num_tokens)
        experts = run_of(spec, layer) if has_kernels else mlx_run_of(layer)
        return lambda x, one: experts(x, one) + shared.by_mlx(x)

    def use(self, verdicts: Sequence[Verdict]) -> list[Taken]:
        """None: the experts' own subject has counted its layers."""
        for layer in self.experts.layers:
            shared = _shared(layer)
            shared.choose(_TestedBeside(self.experts.spec, tuple(verdicts), shared, self.spec))
        return []


def _taken(layer: nn.Module) -> Taken:
    taken = taken_of(layer)
    assert taken is not None
    return taken


def _block(layer: nn.Module, spec: BlockSpec) -> moe.Block:
    """Of the shared expert, of this form."""
    block = _shared(layer).block(spec)
    if block is None:
        raise ValueError("the shared expert has another form now")
    return block


def _shared(layer: nn.Module) -> TakenShared:
    shared = _taken(layer).shared
    assert shared is not None
    return shared


def shared_subjects(subjects: Iterable[ExpertSubject]) -> list[SharedSubject]:
    """Of each form of block those layers that have a shared expert which may join them, by its form.

    Their model was called once, and seen to add it.
    """
    found: dict[str, SharedSubject] = {}
    for subject in subjects:
        for layer in subject.layers:
            shared = _taken(layer).shared
            if shared is None or not shared.is_added or not shared.can_join(subject.spec):
                continue
            spec = shared.spec(subject.spec.dtype)
            assert isinstance(spec, BlockSpec)
            one = SharedSubject(ExpertSubject(subject.spec, [layer]), spec)
            known = found.setdefault(one.name, one)
            if known is not one:
                known.experts.layers.append(layer)
    return list(found.values())
