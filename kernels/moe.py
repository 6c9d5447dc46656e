"""A block of experts by the kernels that fit the number of tokens; `moe_reference` says what they answer."""

from __future__ import annotations

import mlx.core as mx

from kernels import moe_ops
from kernels.moe_spec import (
    GEGLU,
    PLAIN,
    SWIGLU,
    Activation,
    BlockSpec,
    Experts,
    Format,
    Shared,
)

__all__ = [
    "GEGLU",
    "PLAIN",
    "SWIGLU",
    "Activation",
    "BlockSpec",
    "Experts",
    "Format",
    "Shared",
    "supports",
    "switch_glu",
]


def supports(spec: BlockSpec, shared: BlockSpec | None = None) -> str | None:
    """Why the kernels cannot run this block, in a few words; None when they can."""
    for name, form, width in (
        ("gate", spec.gate, spec.hidden_size),
        ("up", spec.up, spec.hidden_size),
        ("down", spec.down, spec.expert_size),
    ):
        step = form.group_size or 8
        if width % step:
            return f"the {name} matrix has rows of {width} weights, which is no multiple of {step}"
    return None if shared is None else supports(shared)


def switch_glu(  # noqa: PLR0917
    spec: BlockSpec,
    x: mx.array,
    indices: mx.array,
    scores: mx.array | None,
    gate: Experts,
    up: Experts,
    down: Experts,
    shared: Shared | None = None,
) -> mx.array:
    """x (T, hidden), indices (T, k) uint32, scores (T, k): the weighted sum of the experts, (T, hidden).

    Without scores each expert's own answer, (T, k, hidden). In spec.dtype.
    """
    return moe_ops.switch_glu(spec, x, indices, scores, gate, up, down, shared)
