"""The launches of a block of experts: which kernel on which grid. What each makes its own file says."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from kernels.moe_constants import SIMD, Block, Constants, matrix_names, more_headers
from kernels.moe_spec import BlockSpec, Shared
from kernels.source import Kernel, Triple

MAX_BATCH_TOKENS = 63
MAX_EXPERTS = 2048
MAX_TOP_K = 30  # moe_gate_up_batch keeps the numbers of an expert's pairs in threadgroup memory
SUM_THREADS = 256


@dataclass(frozen=True, slots=True)
class Tuning:
    """How work is cut. Rows of a simdgroup and simdgroups of a threadgroup; none changes an answer's bits."""

    up_rows: int  # without a gate
    gate_up_rows: int
    inner_simdgroups: int  # of these two
    down_rows: int
    down_simdgroups: int


ONE = Tuning(up_rows=4, gate_up_rows=2, inner_simdgroups=4, down_rows=4, down_simdgroups=8)
FEW = Tuning(up_rows=8, gate_up_rows=4, inner_simdgroups=4, down_rows=16, down_simdgroups=4)

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
UP = Kernel("moe_up", ("x", "indices", *matrix_names("up")), ("inner",), (*HEADERS, "moe_gateless.h"))
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
GATE_UP_BATCH = Kernel("moe_gate_up_batch", ("x", "indices", *GATE_AND_UP), ("inner",), HEADERS)
GATE_UP_BATCH_SHARED = Kernel(
    "moe_gate_up_batch_shared",
    ("x", "indices", *GATE_AND_UP, *SHARED_GATE_AND_UP),
    ("inner", "shared_inner"),
    HEADERS,
)
UP_BATCH = replace(UP, name="moe_up_batch")
DOWN_BATCH = Kernel("moe_down_batch", ("inner", "indices", *matrix_names("down")), ("answers",), HEADERS)
DOWN_BATCH_SHARED = Kernel(
    "moe_down_batch_shared",
    ("inner", "indices", *matrix_names("down"), "shared_inner", *matrix_names("shared_down")),
    ("answers", "shared_answers"),
    HEADERS,
)
SUM = Kernel("moe_sum", ("answers", "scores"), ("out",))
SUM_SHARED = Kernel("moe_sum_shared", ("answers", "scores", "shared_answers", "shared_scores"), ("out",))


@dataclass(frozen=True, slots=True)
class SharedBlock:
    """A shared expert. scores: (T, 1) or None."""

    block: Block
    scores: mx.array | None

    @classmethod
    def of(cls, shared: Shared) -> SharedBlock:
        """Its weights in a block of their own."""
        return cls(Block(shared.spec, shared.gate, shared.up, shared.down), shared.scores)

    @property
    def weights(self) -> Shared:
        """Its weights again, as the reference and MLX's operations take them."""
        one = self.block
        return Shared(one.spec, one.gate, one.up, one.down, self.scores)


@functools.cache
def _behind(kernel: Kernel, headers: tuple[str, ...]) -> Kernel:
    return replace(kernel, headers=(*kernel.headers, *headers)) if headers else kernel


def _run(
    kernel: Kernel,
    arrays: Sequence[mx.array],
    template: Constants,
    *,
    grid: Triple,
    num_threads: int,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[mx.Dtype],
) -> list[mx.array]:
    """The outputs of a launch, behind the headers that its formats and activation need."""
    return _behind(kernel, more_headers(template))(
        arrays,
        template=template,
        grid=grid,
        threadgroup=(num_threads, 1, 1),
        shapes=shapes,
        dtypes=dtypes,
    )


def _rows_grid(num_rows: int, rows: int, simdgroups: int, groups: int) -> tuple[int, int, int]:
    return -(-num_rows // (rows * simdgroups)) * simdgroups * SIMD, groups, 1


def _answers(spec: BlockSpec, tokens: int, scores: mx.array | None) -> tuple[int, ...]:
    return (tokens, spec.hidden_size) if scores is not None else (tokens, spec.top_k, spec.hidden_size)


def one_token(
    block: Block, x: mx.array, indices: mx.array, scores: mx.array | None, shared: SharedBlock | None = None
) -> mx.array:
    """Two launches: x (1, hidden), indices (1, k) -> (1, hidden), or (1, k, hidden) without scores."""
    spec = block.spec
    kernel, rows = (UP, ONE.up_rows) if spec.gate is None else (GATE_UP, ONE.gate_up_rows)
    simdgroups = ONE.inner_simdgroups
    threads = min(ONE.down_simdgroups, spec.top_k + (shared is not None)) * SIMD
    down_grid = (-(-spec.hidden_size // ONE.down_rows) * threads, 1, 1)
    if shared is None:
        inner = _run(
            kernel,
            [x, indices, *block.inner_arrays],
            {**block.sizes, **block.inner, "ROWS": rows},
            grid=_rows_grid(spec.expert_size, rows, simdgroups, spec.top_k),
            num_threads=simdgroups * SIMD,
            shapes=[(spec.top_k, spec.expert_size)],
            dtypes=[spec.dtype],
        )[0]
        return _run(
            DOWN_SUM,
            [inner, indices, indices if scores is None else scores, *block.down_arrays],
            {**block.sizes, **block.down_sum, "ROWS": ONE.down_rows, "WEIGHTED": scores is not None},
            grid=down_grid,
            num_threads=threads,
            shapes=[_answers(spec, 1, scores)],
            dtypes=[spec.dtype],
        )[0]
    assert scores is not None
    other = shared.block
    sizes = {**block.sizes, "SHARED_I": other.spec.expert_size}
    inner, shared_inner = _run(
        GATE_UP_SHARED,
        [x, indices, *block.inner_arrays, *other.inner_arrays],
        {**sizes, **block.inner, **other.inner_as("SHARED_"), "ROWS": rows},
        grid=_rows_grid(max(spec.expert_size, other.spec.expert_size), rows, simdgroups, spec.top_k + 1),
        num_threads=simdgroups * SIMD,
        shapes=[(spec.top_k, spec.expert_size), (1, other.spec.expert_size)],
        dtypes=[spec.dtype, spec.dtype],
    )
    shared_scores = scores if shared.scores is None else shared.scores
    is_scored = shared.scores is not None
    return _run(
        DOWN_SUM_SHARED,
        [inner, indices, scores, *block.down_arrays, shared_inner, shared_scores, *other.down_arrays],
        {
            **sizes,
            **block.down_sum,
            **other.down_sum_as("SHARED_"),
            "ROWS": ONE.down_rows,
            "SHARED_SCORED": is_scored,
        },
        grid=down_grid,
        num_threads=threads,
        shapes=[(1, spec.hidden_size)],
        dtypes=[spec.dtype],
    )[0]


def few_tokens(
    block: Block, x: mx.array, indices: mx.array, scores: mx.array | None, shared: SharedBlock | None = None
) -> mx.array:
    """Three launches for up to 63 tokens, two without scores; shapes as those of `one_token`."""
    spec, tokens = block.spec, x.shape[0]
    assert tokens <= MAX_BATCH_TOKENS
    sizes = {**block.sizes, "E": spec.num_experts, "TILE": block.tile, "MAX_TOKENS": MAX_BATCH_TOKENS}
    num_pairs = tokens * spec.top_k
    slots = min(spec.num_experts, num_pairs)
    kernel, rows = (UP_BATCH, FEW.up_rows) if spec.gate is None else (GATE_UP_BATCH, FEW.gate_up_rows)
    simdgroups, down_rows, down_simdgroups = FEW.inner_simdgroups, FEW.down_rows, FEW.down_simdgroups
    if shared is None:
        inner = _run(
            kernel,
            [x, indices, *block.inner_arrays],
            {**sizes, **block.inner, "ROWS": rows},
            grid=_rows_grid(spec.expert_size, rows, simdgroups, slots),
            num_threads=simdgroups * SIMD,
            shapes=[(num_pairs, spec.expert_size)],
            dtypes=[spec.dtype],
        )[0]
        answers = _run(
            DOWN_BATCH,
            [inner, indices, *block.down_arrays],
            {**sizes, **block.down_sum, "ROWS": down_rows},
            grid=_rows_grid(spec.hidden_size, down_rows, down_simdgroups, slots),
            num_threads=down_simdgroups * SIMD,
            shapes=[(tokens, spec.top_k, spec.hidden_size)],
            dtypes=[spec.dtype if scores is None else mx.float32],
        )[0]
        return answers if scores is None else _summed(SUM, block, [answers, scores], block.sizes)
    assert scores is not None
    other = shared.block
    slots += -(-tokens // block.tile)
    sizes |= {"SHARED_I": other.spec.expert_size}
    inner, shared_inner = _run(
        GATE_UP_BATCH_SHARED,
        [x, indices, *block.inner_arrays, *other.inner_arrays],
        {**sizes, **block.inner, **other.inner_as("SHARED_"), "ROWS": rows},
        grid=_rows_grid(max(spec.expert_size, other.spec.expert_size), rows, simdgroups, slots),
        num_threads=simdgroups * SIMD,
        shapes=[(num_pairs, spec.expert_size), (tokens, other.spec.expert_size)],
        dtypes=[spec.dtype, spec.dtype],
    )
    answers, shared_answers = _run(
        DOWN_BATCH_SHARED,
        [inner, indices, *block.down_arrays, shared_inner, *other.down_arrays],
        {**sizes, **block.down_sum, **other.down_sum_as("SHARED_"), "ROWS": down_rows},
        grid=_rows_grid(spec.hidden_size, down_rows, down_simdgroups, slots),
        num_threads=down_simdgroups * SIMD,
        shapes=[(num_pairs, spec.hidden_size), (tokens, spec.hidden_size)],
        dtypes=[mx.float32, mx.float32],
    )
    shared_scores = scores if shared.scores is None else shared.scores
    constants = {**block.sizes, "SHARED_SCORED": shared.scores is not None}
    return _summed(SUM_SHARED, block, [answers, scores, shared_answers, shared_scores], constants)


def _summed(kernel: Kernel, block: Block, arrays: list[mx.array], constants: Constants) -> mx.array:
    """(T, hidden) of answers, scores (T, k) and what a shared expert adds."""
    shape = arrays[1].shape[0], block.spec.hidden_size
    grid = -(-shape[0] * shape[1] // SUM_THREADS) * SUM_THREADS, 1, 1
    made = _run(
        kernel,
        arrays,
        constants,
        grid=grid,
        num_threads=SUM_THREADS,
        shapes=[shape],
        dtypes=[block.spec.dtype],
    )
    return made[0]
