"""A block of experts by the kernels that fit the number of tokens; `moe_reference` says what they answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from kernels import backend, moe_constants, moe_kernels, moe_ops, source
from kernels.moe_constants import DOWN_CHUNK, Block, chunk
from kernels.moe_kernels import SharedBlock
from kernels.moe_spec import (
    GEGLU,
    GELU,
    PLAIN,
    RELU2,
    SWIGLU,
    Activation,
    BlockSpec,
    Experts,
    Format,
    Shared,
)

__all__ = [
    "GEGLU",
    "GELU",
    "PLAIN",
    "RELU2",
    "SWIGLU",
    "Activation",
    "Block",
    "BlockSpec",
    "Experts",
    "Format",
    "Shared",
    "SharedBlock",
    "num_launches",
    "run",
    "run_by_mlx",
    "supports",
    "switch_glu",
]


def supports(spec: BlockSpec, shared: BlockSpec | None = None) -> str | None:
    """Why the kernels cannot run this block, in a few words; None when they can."""
    if spec.num_experts > moe_kernels.MAX_EXPERTS:
        return f"{spec.num_experts} experts are more than {moe_kernels.MAX_EXPERTS}"
    if spec.top_k > moe_kernels.MAX_TOP_K:
        return f"{spec.top_k} experts for each token are more than {moe_kernels.MAX_TOP_K}"
    inner = "up matrix has" if spec.gate is None else "gate and up matrices have"
    for names, forms, width in (
        (inner, spec.inner, spec.hidden_size),
        ("down matrix has", (spec.down,), spec.expert_size),
    ):
        step = max(form.group_size or 4 for form in forms)
        if width % step:
            return f"the {names} rows of {width} weights, which is no multiple of {step}"
        if chunk(width, forms, spec.dtype, DOWN_CHUNK) is None:
            return f"the {names} formats without a common number of weights in whole words of one group"
    if shared is None:
        return None
    if spec.gate is None or shared.gate is None:
        return "a shared expert has a kernel only where both have a gate"
    if (shared.hidden_size, shared.dtype) != (spec.hidden_size, spec.dtype):
        return "the shared expert has another hidden size or dtype"
    return supports(shared)


def num_launches(tokens: int, *, is_summed: bool = True) -> int | None:
    """How many launches the kernels take; None from 64 tokens on, where MLX's own operations run."""
    if tokens > moe_kernels.MAX_BATCH_TOKENS:
        return None
    return 3 if tokens > 1 and is_summed else 2


def switch_glu(  # noqa: PLR0917
    spec: BlockSpec,
    x: mx.array,
    indices: mx.array,
    scores: mx.array | None,
    gate: Experts | None,
    up: Experts,
    down: Experts,
    shared: Shared | None = None,
) -> mx.array:
    """`run` for weights that are used once."""
    other = None if shared is None else SharedBlock.of(shared)
    return run(Block(spec, gate, up, down), x, indices, scores, other)


def run(
    block: Block,
    x: mx.array,
    indices: mx.array,
    scores: mx.array | None,
    shared: SharedBlock | None = None,
) -> mx.array:
    """x (T, hidden), indices (T, k) uint32, scores (T, k): the weighted sum of the experts, (T, hidden).

    Without scores each expert's own answer, (T, k, hidden). In spec.dtype. By MLX's operations from 64 tokens
    on and where no kernel fits; by the kernels an answer has the same bits in any company of other tokens.
    Raises ValueError for a shared expert without scores.
    """
    spec, tokens = block.spec, x.shape[0]
    other = None if shared is None else shared.block
    if other not in block.reasons:
        if other is not None:
            _forget_shared(block)
        block.reasons[other] = supports(spec, None if other is None else other.spec)
    is_few = 0 < tokens <= moe_kernels.MAX_BATCH_TOKENS
    if not is_few or backend.current() is None or block.reasons[other] is not None:
        return run_by_mlx(block, x, indices, scores, shared)
    if shared is not None and scores is None:
        raise ValueError("a shared expert needs scores: its answer is added to the weighted sum")
    x, indices = x.astype(spec.dtype), indices.astype(mx.uint32)
    if backend.current() == "emulated" or source.is_watched():
        return _launched(block, x, indices, scores, shared)
    key = other, scores is not None, shared is not None and shared.scores is not None
    replay = block.replays.get(key)
    if replay is None:
        replay = block.replays[key] = _replay(_form(block, scores, shared))
    given = [] if scores is None else [scores]
    if shared is not None:
        given += shared.block.arrays if shared.scores is None else [shared.scores, *shared.block.arrays]
    return replay(x, indices, *given, *block.arrays)


def run_by_mlx(
    block: Block,
    x: mx.array,
    indices: mx.array,
    scores: mx.array | None,
    shared: SharedBlock | None = None,
) -> mx.array:
    """As `run`, by MLX's own operations."""
    other = None if shared is None else shared.weights
    return moe_ops.switch_glu(block.spec, x, indices, scores, block.gate, block.up, block.down, other)


def _forget_shared(block: Block) -> None:
    """One with new weights is a new block; what is remembered of the older one holds its weights."""
    for known in [one for one in block.reasons if one is not None]:
        del block.reasons[known]
    for key in [key for key in block.replays if key[0] is not None]:
        del block.replays[key]


def _launched(
    block: Block,
    x: mx.array,
    indices: mx.array,
    scores: mx.array | None,
    shared: SharedBlock | None,
) -> mx.array:
    compute = moe_kernels.one_token if x.shape[0] == 1 else moe_kernels.few_tokens
    return compute(block, x, indices, scores, shared)


@dataclass(frozen=True, slots=True)
class _Form:
    """What a call's launches are made of, but for its arrays. shared, shared_parts: of a shared expert."""

    spec: BlockSpec
    parts: tuple[bool, ...]
    is_summed: bool
    shared: BlockSpec | None = None
    shared_parts: tuple[bool, ...] = ()
    is_scored: bool = False  # the shared expert


def _form(block: Block, scores: mx.array | None, shared: SharedBlock | None) -> _Form:
    if shared is None:
        return _Form(block.spec, block.parts, scores is not None)
    other = shared.block
    return _Form(block.spec, block.parts, True, other.spec, other.parts, shared.scores is not None)


@functools.cache
def _replay(form: _Form) -> Callable[..., mx.array]:
    """The block as a function of its arrays that MLX compiles.

    MLX makes a launch's whole source, its template values and its names anew whenever a kernel is called. A
    compiled function calls it once for each shape and from then on repeats the graph with other arrays.
    """
    for spec in (form.spec, form.shared):
        if spec is not None:
            moe_constants.limits(spec.activation)  # made outside of what is traced

    def compute(x: mx.array, indices: mx.array, *arrays: mx.array) -> mx.array:
        given = iter(arrays)
        scores = next(given) if form.is_summed else None
        shared = None
        if form.shared is not None:
            shared_scores = next(given) if form.is_scored else None
            shared = SharedBlock(_block(form.shared, form.shared_parts, given), shared_scores)
        return _launched(_block(form.spec, form.parts, given), x, indices, scores, shared)

    compiled: Callable[..., mx.array] = mx.compile(compute)
    return compiled


def _block(spec: BlockSpec, parts: tuple[bool, ...], given: Iterator[mx.array]) -> Block:
    """Of as many of the arrays that are left as `parts` names."""
    each = [next(given) if is_there else None for is_there in parts]
    size = len(moe_constants.PARTS)
    gate, up, down = (Experts(*each[first : first + size]) for first in range(0, len(each), size))  # type: ignore[arg-type]
    return Block(spec, gate if spec.gate else None, up, down)
