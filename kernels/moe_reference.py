"""The specification of a block of experts: float32, one expert after the other, nothing clever.

Every kernel is compared with this. It looks at `indices` on the host, so it is not for a hot path; where
matrix products of float32 are rounded to less (TF32), run it under `mx.stream(mx.cpu)`.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from kernels.moe_spec import FLOATS, Activation, BlockSpec, Experts, Format, Shared


def dequantized(form: Format, experts: Experts, expert: int) -> mx.array:
    """One expert's matrix, (N, K) in float32."""
    weight = experts.weight[expert]
    if form.mode == "plain":
        return weight.astype(mx.float32)
    assert experts.scales is not None
    scales = experts.scales[expert]
    if form.mode in FLOATS:
        return mx.dequantize(
            weight, scales, group_size=form.group_size, bits=form.bits, mode=form.mode, dtype=mx.float32
        )
    assert experts.biases is not None
    return mx.dequantize(
        weight,
        scales.astype(mx.float32),
        experts.biases[expert].astype(mx.float32),
        group_size=form.group_size,
        bits=form.bits,
    )


def _linear(form: Format, experts: Experts, expert: int, x: mx.array) -> mx.array:
    """x (n, K) times one expert's matrix: (n, N)."""
    y = x @ dequantized(form, experts, expert).T
    return y if experts.bias is None else y + experts.bias[expert].astype(mx.float32)


def _gelu(x: mx.array) -> mx.array:
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1 + mx.tanh(inner))


def activate(activation: Activation, gate: mx.array | None, up: mx.array) -> mx.array:
    """What goes into down, as `Activation` says; float32 in and out. gate: None where it takes up alone."""
    alpha, limit = activation.alpha, activation.limit
    if gate is None:
        return _gelu(up) if activation.kind == "gelu" else mx.square(mx.maximum(up, 0))
    if activation.kind == "geglu":
        return _gelu(gate) * up
    if activation.kind.startswith("situ"):
        if activation.kind == "situ_both":
            up = limit * mx.tanh(up / limit)
        return alpha * mx.tanh(gate / alpha) * mx.sigmoid(gate) * up
    if activation.kind == "swiglu_oai":
        gate = mx.minimum(gate, limit)
        return gate * mx.sigmoid(alpha * gate) * (mx.clip(up, -limit, limit) + 1)
    if activation.kind == "swiglu_clamped":
        gate, up = mx.minimum(gate, limit), mx.clip(up, -limit, limit)
    silu = gate * mx.sigmoid(gate)
    if activation.kind == "swiglu_clamped_after":
        silu, up = mx.minimum(silu, limit), mx.clip(up, -limit, limit)
    return silu * up


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
    """What the experts of each token make of it, in float32.

    x: (T, hidden); indices: (T, k); scores: (T, k) or None. The answer is the weighted sum, (T, hidden), or
    without scores each expert's own answer, (T, k, hidden).
    """
    x = x.astype(mx.float32)
    used = np.array(indices)
    tokens, slots = used.shape
    pairs = mx.zeros((tokens * slots, spec.hidden_size), dtype=mx.float32)
    for expert in np.unique(used).tolist():
        mine = mx.array(np.flatnonzero(used.reshape(-1) == expert))
        rows = x[mine // slots]
        gates = None
        if spec.gate is not None and gate is not None:
            gates = _linear(spec.gate, gate, expert, rows)
        inner = activate(spec.activation, gates, _linear(spec.up, up, expert, rows))
        pairs[mine] = _linear(spec.down, down, expert, inner)
    answers = pairs.reshape(tokens, slots, spec.hidden_size)
    if scores is None:
        if shared is not None:
            raise ValueError("a shared expert needs scores: its answer is added to the weighted sum")
        return answers
    total = (answers * scores.astype(mx.float32)[..., None]).sum(axis=1)
    if shared is not None:
        total = total + shared_answer(shared, x)
    return total


def shared_answer(shared: Shared, x: mx.array) -> mx.array:
    """What a shared expert adds to the weighted sum, (T, hidden) in float32; x: (T, hidden)."""
    ones = mx.ones((x.shape[0], 1)) if shared.scores is None else shared.scores
    nought = mx.zeros(ones.shape, dtype=mx.uint32)
    return switch_glu(shared.spec, x, nought, ones, shared.gate, shared.up, shared.down)
