"""Trials of one form of block: is the kernels' answer right, and how long do they and MLX's operations take.

The weights are those of the layers that are given, so nothing is allocated but tokens. One thread, the one
that owns MLX.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU

from kernels import moe, moe_reference
from kernels.moe_spec import BlockSpec, Experts
from kernels.source import recorded

TOLERANCE = {mx.float16: 1e-3, mx.bfloat16: 8e-3, mx.float32: 1e-4}  # of the largest value
CACHE_BYTES = 512 << 20  # what is read before the same experts come again, where there are as many
MIN_GAIN = 1.02  # less is noise, and MLX's operations are kept
MAX_CALLS = 64  # blocks in a row, as a forward pass of a model has them
NUM_ROUNDS = 5
NUM_ROUTINGS = 32
FEW_EXPERTS = 16  # the reference takes one after the other

Run = Callable[[Any, mx.array, mx.array, mx.array], mx.array]  # layer, x, indices, scores -> (T, hidden)


@dataclass(frozen=True, slots=True)
class Tokens:
    """x (T, hidden), indices (T, k) uint32 and scores (T, k), evaluated."""

    x: mx.array
    indices: mx.array
    scores: mx.array

    @property
    def num_experts(self) -> int:
        """Different ones."""
        return len(np.unique(np.array(self.indices)))


@dataclass(frozen=True, slots=True)
class Times:
    """us of one block, the best of several rounds each, and the bytes that it needs at least.

    Building the graph in Python counts; the times without it are those of the same rounds.
    """

    ours_us: float
    mlx_us: float
    ours_eval_us: float
    mlx_eval_us: float
    needed_bytes: float

    @property
    def ratio(self) -> float:
        return self.mlx_us / self.ours_us

    @property
    def gb_s(self) -> float:
        """Of the kernels, while they are evaluated."""
        return self.needed_bytes / self.ours_eval_us / 1e3


def experts_of(layer: Any) -> tuple[Experts, Experts, Experts]:
    """Gate, up and down of a SwitchGLU as the kernels take them."""
    gate, up, down = (
        Experts(part["weight"], part.get("scales"), part.get("biases"), part.get("bias"))
        for part in (layer.gate_proj, layer.up_proj, layer.down_proj)
    )
    return gate, up, down


def tokens(spec: BlockSpec, num_tokens: int, seed: int, *, num_experts: int | None = None) -> Tokens:
    """Random ones, each with different experts: the first and the last, and others up to `num_experts`."""
    rng = np.random.default_rng(seed)
    limit = spec.num_experts if num_experts is None else max(num_experts, spec.top_k)
    others = rng.permutation(np.arange(1, spec.num_experts - 1))[: max(0, limit - 2)]
    known = np.concatenate([[0], others, [spec.num_experts - 1]])[: spec.num_experts]
    chosen = np.stack([rng.permutation(known)[: spec.top_k] for _ in range(num_tokens)])
    weights = rng.random(chosen.shape) + 0.1
    made = Tokens(
        mx.array(rng.standard_normal((num_tokens, spec.hidden_size), dtype=np.float32)).astype(spec.dtype),
        mx.array(chosen.astype(np.uint32)),
        mx.array((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)).astype(spec.dtype),
    )
    mx.eval(made.x, made.indices, made.scores)
    return made


def by_kernels(spec: BlockSpec, layers: Sequence[Any]) -> Run:
    """A block of one of the layers as the kernels compute it."""
    blocks = {id(layer): moe.Block(spec, *experts_of(layer)) for layer in layers}
    return lambda layer, x, indices, scores: moe.run(blocks[id(layer)], x, indices, scores)


def by_mlx(layer: Any, x: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
    """The same as mlx-lm computes it."""
    y: mx.array = SwitchGLU.__call__(layer, x, indices)
    return (y * scores[..., None]).sum(axis=-2).astype(y.dtype)


def error_of(spec: BlockSpec, layer: Any, num_tokens: int) -> tuple[float, int]:
    """The kernels' error beside the reference, weighted sum and single outputs, and the sum's launches.

    The error is infinite where something is not a number. Raises whatever the kernels raise.
    """
    found = tokens(spec, num_tokens, num_tokens, num_experts=FEW_EXPERTS)
    experts, errors, num_launches = experts_of(layer), [], 0
    with mx.stream(mx.cpu):  # a GPU may round products of float32 to less
        answers = moe_reference.switch_glu(spec, found.x, found.indices, None, *experts)  # (T, k, hidden)
        mx.eval(answers)
    for scores in (found.scores, found.scores.astype(mx.float32), None):  # as models have them
        with recorded() as calls:
            ours = moe.run(moe.Block(spec, *experts), found.x, found.indices, scores)
            mx.eval(ours)
        num_launches = num_launches or len(calls)
        with mx.stream(mx.cpu):
            wanted = answers
            if scores is not None:
                wanted = (answers * scores.astype(mx.float32)[..., None]).sum(axis=1)
            difference = mx.abs(ours.astype(mx.float32) - wanted).max() / mx.abs(wanted).max()
            mx.eval(difference)
        error = float(difference)
        errors.append(error if np.isfinite(error) else np.inf)
    return max(errors), num_launches


def times_of(
    spec: BlockSpec, layers: Sequence[Any], num_tokens: int, on_step: Callable[[], None] = lambda: None
) -> Times:
    """One block after the other, each with the answer of the one before and with other experts.

    As many as read CACHE_BYTES, if MAX_CALLS allows. Ours and MLX's in turn, round after round.
    """
    routings = [tokens(spec, num_tokens, seed) for seed in range(NUM_ROUTINGS)]
    expert_bytes = expert_nbytes(spec, layers[0])
    needed = float(np.mean([one.num_experts for one in routings])) * expert_bytes
    num_calls = int(min(MAX_CALLS, max(4, -(-CACHE_BYTES // needed))))
    ours = by_kernels(spec, layers)
    best: dict[bool, tuple[float, float]] = {}
    for number in range(NUM_ROUNDS + 1):  # the first round compiles
        for is_ours in (True, False):
            run = ours if is_ours else by_mlx
            us = _chain(run, layers, routings, num_calls)
            if number:
                best[is_ours] = min(us, best.get(is_ours, us))
            on_step()
    (ours_us, ours_eval_us), (mlx_us, mlx_eval_us) = best[True], best[False]
    return Times(ours_us, mlx_us, ours_eval_us, mlx_eval_us, needed)


def _chain(
    run: Run, layers: Sequence[Any], routings: Sequence[Tokens], num_calls: int
) -> tuple[float, float]:
    """us of a block in all, and of its evaluation."""
    started = time.perf_counter()
    x = routings[0].x
    for layer, one in itertools.islice(
        zip(itertools.cycle(layers), itertools.cycle(routings), strict=False), num_calls
    ):
        x = run(layer, x, one.indices, one.scores)
    built = time.perf_counter()
    mx.eval(x)
    ended = time.perf_counter()
    return (ended - started) * 1e6 / num_calls, (ended - built) * 1e6 / num_calls


def expert_nbytes(spec: BlockSpec, layer: Any) -> int:
    """Bytes of one expert's weights."""
    arrays = (a for part in experts_of(layer) for a in (part.weight, part.scales, part.biases, part.bias))
    return sum(int(array.nbytes) for array in arrays if array is not None) // spec.num_experts
