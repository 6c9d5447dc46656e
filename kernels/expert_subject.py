"""Expert layers under test: the fused kernels beside the reference, and beside mlx-lm's own operations.

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
from kernels.expert_blocks import Tokens, by_mlx, describe, expert_nbytes, experts_of, format_names, tokens
from kernels.measure import Path, Run
from kernels.moe_spec import BlockSpec
from kernels.switch import Taken, taken_of
from kernels.verdicts import Form, Verdict

# The first and last number of tokens; 0: no end.
CLASSES = ((1, 1), (2, 4), (5, 8), (9, 16), (17, 32), (33, 63), (64, 0))
TOLERANCE = {mx.float16: 1e-3, mx.bfloat16: 8e-3, mx.float32: 1e-4}  # of the largest value
FEW_EXPERTS = 16  # the reference takes one after the other


@dataclass(frozen=True, slots=True)
class Tested:
    """Decides for layers of one form by its verdicts."""

    spec: BlockSpec
    verdicts: tuple[Verdict, ...]

    def takes(self, spec: BlockSpec, num_tokens: int) -> bool:
        return spec == self.spec and any(v.is_taken and v.covers(num_tokens) for v in self.verdicts)


@dataclass(frozen=True, slots=True)
class ExpertSubject:
    """A form of block, with mlx-lm's layers that have it."""

    spec: BlockSpec
    layers: list[Any]

    @property
    def name(self) -> str:
        return describe(self.spec, self.layers[0])

    @property
    def form(self) -> Form:
        spec = self.spec
        names = tuple(sorted(format_names(spec, self.layers[0])))
        return Form(spec.num_experts, spec.top_k, spec.hidden_size, spec.expert_size, names)

    @property
    def classes(self) -> Sequence[tuple[int, int]]:
        return CLASSES

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.spec.dtype]

    def has_kernels(self, num_tokens: int) -> bool:
        return moe.num_launches(num_tokens) is not None

    def answers(self, num_tokens: int) -> Iterator[tuple[Callable[[], mx.array], mx.array]]:
        """The weighted sum, with scores of both types that models have, and single outputs."""
        spec, experts = self.spec, experts_of(self.layers[0])
        found = self.tokens(num_tokens)
        with mx.stream(mx.cpu):  # a GPU may round products of float32 to less
            outputs = moe_reference.switch_glu(spec, found.x, found.indices, None, *experts)  # (T, k, hidden)
            mx.eval(outputs)
        for scores in (found.scores, found.scores.astype(mx.float32), None):
            with mx.stream(mx.cpu):
                wanted = outputs
                if scores is not None:
                    wanted = (outputs * scores.astype(mx.float32)[..., None]).sum(axis=1)
            yield partial(moe.run, moe.Block(spec, *experts), found.x, found.indices, scores), wanted

    def tokens(self, num_tokens: int) -> Tokens:
        """Of few experts, for who compares."""
        return tokens(self.spec, num_tokens, num_tokens, num_experts=FEW_EXPERTS)

    def inputs(self, num_tokens: int, seed: int) -> Tokens:
        return tokens(self.spec, num_tokens, seed)

    def needed_bytes(self, one: Tokens) -> int:
        return one.num_experts * expert_nbytes(self.spec, self.layers[0])

    def paths(self, _: int) -> tuple[Path, Path]:
        """A block's answer is the next one's input."""
        ours = [run_of(self.spec, layer) for layer in self.layers]
        mlx = [mlx_run_of(layer) for layer in self.layers]
        return Path(ours, self.needed_bytes), Path(mlx, self.needed_bytes)

    def use(self, verdicts: Sequence[Verdict]) -> list[Taken]:
        found = [taken for layer in self.layers if (taken := taken_of(layer)) is not None]
        for taken in found:
            taken.choose(Tested(self.spec, tuple(verdicts)))
        return found


def run_of(spec: BlockSpec, layer: Any, shared: moe.SharedBlock | None = None) -> Run:
    """A layer's call by the kernels."""
    block = moe.Block(spec, *experts_of(layer))
    return lambda x, one: moe.run(block, x, one.indices, one.scores, shared)


def mlx_run_of(layer: Any) -> Run:
    """A layer's call as mlx-lm computes it."""
    return lambda x, one: by_mlx(layer, x, one.indices, one.scores)


def expert_subjects(layers: Iterable[nn.Module]) -> tuple[list[ExpertSubject], list[str]]:
    """Those of layers that were taken over and called once, and why layers have no form that kernels know."""
    found: dict[tuple[BlockSpec, str], list[nn.Module]] = {}
    reasons: list[str] = []
    for layer in layers:
        taken = taken_of(layer)
        if taken is None:
            continue
        for spec in taken.forms[:1]:  # a model calls a layer in one way
            found.setdefault((spec, describe(spec, layer)), []).append(layer)
        reasons += [reason for reason in taken.reasons if reason not in reasons]
    return [ExpertSubject(spec, members) for (spec, _), members in found.items()], reasons
