"""The launches of a block of experts: which kernel on which grid. What each makes its own file says."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx

from kernels.moe_constants import ROWS, SIMD, Block, matrix_names
from kernels.moe_spec import BlockSpec
from kernels.source import Kernel

GATE_UP_SIMDGROUPS = 2
DOWN_SIMDGROUPS = 8
DOWN_BATCH_SIMDGROUPS = 4  # of a kernel that takes many registers
PLAN_THREADS = 1024
MAX_BATCH_TOKENS = 63
MAX_EXPERTS = 2048  # moe_plan keeps three numbers of each in threadgroup memory
MAX_TOP_K = 30  # moe_down_batch keeps ROWS floats of each pair there, and a shared expert's

HEADERS = ("moe_weights.h", "moe.h")
GATE_AND_UP = (*matrix_names("gate"), *matrix_names("up"), "limits")
SHARED_GATE_AND_UP = tuple(f"shared_{name}" for name in GATE_AND_UP)
GATE_UP = Kernel("moe_gate_up", ("x", "indices", *GATE_AND_UP), ("inner",), HEADERS)
GATE_UP_SHARED = Kernel(
    "moe_gate_up_shared",
    ("x", "indices", *GATE_AND_UP, *SHARED_GATE_AND_UP),
    ("inner", "shared_inner"),
    HEADERS,
)
DOWN_SUM = Kernel("moe_down_sum", ("inner", "indices", "scores", *matrix_names("down")), ("out",), HEADERS)
DOWN_SUM_SHARED = Kernel(
    "moe_down_sum_shared",
    (
        *("inner", "indices", "scores", *matrix_names("down")),
        *("shared_inner", "shared_scores", *matrix_names("shared_down")),
    ),
    ("out",),
    HEADERS,
)
PLAN = Kernel("moe_plan", ("indices",), ("order", "tiles"), HEADERS)
GATE_UP_BATCH = Kernel("moe_gate_up_batch", ("x", "order", "tiles", *GATE_AND_UP), ("inner",), HEADERS)
DOWN_BATCH = Kernel(
    "moe_down_batch",
    ("inner", "order", "tiles", "indices", "scores", *matrix_names("down")),
    ("out",),
    HEADERS,
)
DOWN_BATCH_SHARED = Kernel(
    "moe_down_batch_shared",
    (
        *("inner", "order", "tiles", "indices", "scores", *matrix_names("down")),
        *("shared_inner", "shared_order", "shared_scores", *matrix_names("shared_down")),
    ),
    ("out",),
    HEADERS,
)


@dataclass(frozen=True, slots=True)
class SharedBlock:
    """A shared expert. scores: (T, 1) or None."""

    block: Block
    scores: mx.array | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The pairs (token, choice) sorted by expert, and cut into tiles.

    order: (pairs,) uint32; tiles: (1 + room, 4) uint32, as moe_plan.metal says; room: how many fit.
    """

    order: mx.array
    tiles: mx.array
    room: int


def _gate_up_grid(expert_size: int, groups: int) -> tuple[int, int, int]:
    rows = ROWS * GATE_UP_SIMDGROUPS
    return -(-expert_size // rows) * GATE_UP_SIMDGROUPS * SIMD, groups, 1


def _answers(spec: BlockSpec, tokens: int, scores: mx.array | None) -> tuple[int, ...]:
    return (tokens, spec.hidden_size) if scores is not None else (tokens, spec.top_k, spec.hidden_size)


def one_token(
    block: Block, x: mx.array, indices: mx.array, scores: mx.array | None, shared: SharedBlock | None = None
) -> mx.array:
    """Two launches: x (1, hidden), indices (1, k) -> (1, hidden), or (1, k, hidden) without scores."""
    spec = block.spec
    threadgroup = (GATE_UP_SIMDGROUPS * SIMD, 1, 1)
    threads = min(DOWN_SIMDGROUPS, spec.top_k + (shared is not None)) * SIMD
    down_grid = (-(-spec.hidden_size // ROWS) * threads, 1, 1)
    if shared is None:
        inner = GATE_UP(
            [x, indices, *block.gate_up_arrays],
            template={**block.sizes, **block.gate_up},
            grid=_gate_up_grid(spec.expert_size, spec.top_k),
            threadgroup=threadgroup,
            shapes=[(spec.top_k, spec.expert_size)],
            dtypes=[spec.dtype],
        )[0]
        return DOWN_SUM(
            [inner, indices, indices if scores is None else scores, *block.down_arrays],
            template={**block.sizes, **block.down_sum, "WEIGHTED": scores is not None},
            grid=down_grid,
            threadgroup=(threads, 1, 1),
            shapes=[_answers(spec, 1, scores)],
            dtypes=[spec.dtype],
        )[0]
    assert scores is not None
    other = shared.block
    sizes = {**block.sizes, "SHARED_I": other.spec.expert_size}
    inner, shared_inner = GATE_UP_SHARED(
        [x, indices, *block.gate_up_arrays, *other.gate_up_arrays],
        template={**sizes, **block.gate_up, **other.gate_up_as("SHARED_")},
        grid=_gate_up_grid(max(spec.expert_size, other.spec.expert_size), spec.top_k + 1),
        threadgroup=threadgroup,
        shapes=[(spec.top_k, spec.expert_size), (1, other.spec.expert_size)],
        dtypes=[spec.dtype, spec.dtype],
    )
    shared_scores = scores if shared.scores is None else shared.scores
    return DOWN_SUM_SHARED(
        [inner, indices, scores, *block.down_arrays, shared_inner, shared_scores, *other.down_arrays],
        template={
            **sizes,
            **block.down_sum,
            **other.down_sum_as("SHARED_"),
            "SHARED_SCORED": shared.scores is not None,
        },
        grid=down_grid,
        threadgroup=(threads, 1, 1),
        shapes=[(1, spec.hidden_size)],
        dtypes=[spec.dtype],
    )[0]


def plan(block: Block, indices: mx.array) -> Plan:
    """One launch, and no look at the indices: the grids behind it have room for all tiles there can be."""
    room = min(indices.size, block.spec.num_experts + indices.size // block.tile)
    order, tiles = PLAN(
        [indices],
        template={"E": block.spec.num_experts, "TOPK": block.spec.top_k, "TILE": block.tile},
        grid=(PLAN_THREADS, 1, 1),
        threadgroup=(PLAN_THREADS, 1, 1),
        shapes=[(max(indices.size, 8),), (1 + room, 4)],
        dtypes=[mx.uint32, mx.uint32],
    )
    return Plan(order, tiles, room)


@functools.cache
def everyones_plan(tokens: int, tile: int) -> Plan:
    """That of an expert which every token uses: known beforehand, so no launch."""
    cuts = [(0, first, min(tile, tokens - first), 0) for first in range(0, tokens, tile)]
    return Plan(
        mx.arange(MAX_BATCH_TOKENS + 1, dtype=mx.uint32),
        mx.array([(len(cuts), 0, 0, 0), *cuts], dtype=mx.uint32),
        len(cuts),
    )


def _gate_up_batch(block: Block, x: mx.array, made: Plan, tile: int) -> mx.array:
    """(T * k, expert size), in the order of the pairs."""
    spec = block.spec
    return GATE_UP_BATCH(
        [x, made.order, made.tiles, *block.gate_up_arrays],
        template={**block.sizes, **block.gate_up, "TILE": tile},
        grid=_gate_up_grid(spec.expert_size, made.room),
        threadgroup=(GATE_UP_SIMDGROUPS * SIMD, 1, 1),
        shapes=[(x.shape[0] * spec.top_k, spec.expert_size)],
        dtypes=[spec.dtype],
    )[0]


def few_tokens(
    block: Block, x: mx.array, indices: mx.array, scores: mx.array | None, shared: SharedBlock | None = None
) -> mx.array:
    """Three launches, four with a shared expert, for up to 63 tokens; shapes as those of `one_token`."""
    spec, tokens = block.spec, x.shape[0]
    assert tokens <= MAX_BATCH_TOKENS
    made = plan(block, indices)
    inner = _gate_up_batch(block, x, made, block.tile)
    constants = {**block.sizes, **block.down_sum, "MAX_TOKENS": MAX_BATCH_TOKENS, "TILE": block.tile}
    grid = (-(-spec.hidden_size // ROWS) * DOWN_BATCH_SIMDGROUPS * SIMD, 1, 1)
    threadgroup = (DOWN_BATCH_SIMDGROUPS * SIMD, 1, 1)
    arrays = [
        inner,
        made.order,
        made.tiles,
        indices,
        indices if scores is None else scores,
        *block.down_arrays,
    ]
    if shared is None:
        return DOWN_BATCH(
            arrays,
            template={**constants, "WEIGHTED": scores is not None},
            grid=grid,
            threadgroup=threadgroup,
            shapes=[_answers(spec, tokens, scores)],
            dtypes=[spec.dtype],
        )[0]
    assert scores is not None
    other, everyone = shared.block, everyones_plan(tokens, block.tile)
    shared_inner = _gate_up_batch(other, x, everyone, block.tile)
    shared_scores = scores if shared.scores is None else shared.scores
    return DOWN_BATCH_SHARED(
        [*arrays, shared_inner, everyone.order, shared_scores, *other.down_arrays],
        template={
            **constants,
            "SHARED_I": other.spec.expert_size,
            **other.down_sum_as("SHARED_"),
            "SHARED_SCORED": shared.scores is not None,
        },
        grid=grid,
        threadgroup=threadgroup,
        shapes=[(tokens, spec.hidden_size)],
        dtypes=[spec.dtype],
    )[0]
