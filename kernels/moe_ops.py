"""The same block by MLX's own operations, as mlx-lm runs it: what is used where no kernel of ours is."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from kernels.moe_reference import activate
from kernels.moe_spec import Activation, BlockSpec, Experts, Format, Shared

SORT_FROM_PAIRS = 64  # mlx-lm's own limit: from here on MLX's grouped product takes sorted pairs


def _linear(form: Format, experts: Experts, x: mx.array, indices: mx.array, is_sorted: bool) -> mx.array:
    """x (..., 1, K), one expert for each of its rows: (..., 1, N)."""
    if form.mode == "plain":
        y = mx.gather_mm(x, experts.weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=is_sorted)
    else:
        assert experts.scales is not None
        y = mx.gather_qmm(
            x,
            experts.weight,
            experts.scales,
            experts.biases,
            rhs_indices=indices,
            transpose=True,
            group_size=form.group_size,
            bits=form.bits,
            mode=form.mode,
            sorted_indices=is_sorted,
        )
    return y if experts.bias is None else y + experts.bias[indices][..., None, :]


def _activated(activation: Activation, dtype: mx.Dtype, *given: mx.array) -> mx.array:
    *gates, up = (one.astype(mx.float32) for one in given)
    return activate(activation, gates[0] if gates else None, up).astype(dtype)


_compiled: dict[tuple[Activation, mx.Dtype], object] = {}


def _joined(activation: Activation, dtype: mx.Dtype, *given: mx.array) -> mx.array:
    """The activation of gate and up, or of up alone, as one launch."""
    key = (activation, dtype)
    if key not in _compiled:
        _compiled[key] = mx.compile(partial(_activated, activation, dtype), shapeless=True)
    run = _compiled[key]
    assert callable(run)
    joined: mx.array = run(*given)
    return joined


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
    """As `kernels.moe_reference.switch_glu`, in x's dtype and without a look at the indices."""
    tokens, slots = indices.shape
    is_sorted = indices.size >= SORT_FROM_PAIRS
    if is_sorted:
        flat = indices.flatten()
        order = mx.argsort(flat)
        rows, chosen = x[order // slots][:, None, :], flat[order]
    else:
        rows, chosen = x[:, None, None, :], indices
    gates = []
    if spec.gate is not None and gate is not None:
        gates.append(_linear(spec.gate, gate, rows, chosen, is_sorted))
    ups = _linear(spec.up, up, rows, chosen, is_sorted)
    inner = _joined(spec.activation, spec.dtype, *gates, ups)
    answers = _linear(spec.down, down, inner, chosen, is_sorted).squeeze(-2)
    if is_sorted:
        answers = answers[mx.argsort(order)].reshape(tokens, slots, -1)
    if scores is None:
        if shared is not None:
            raise ValueError("a shared expert needs scores: its answer is added to the weighted sum")
        return answers
    total = (answers * scores[..., None]).sum(axis=-2)
    if shared is not None:
        ones = mx.ones((tokens, 1), dtype=spec.dtype) if shared.scores is None else shared.scores
        nought = mx.zeros((tokens, 1), dtype=mx.uint32)
        total = total + switch_glu(shared.spec, x, nought, ones, shared.gate, shared.up, shared.down)
    return total.astype(spec.dtype)
