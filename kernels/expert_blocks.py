"""What trials of an expert layer need: its weights as the kernels take them, random tokens, and its name.

For the thread that owns MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from kernels.moe_spec import BlockSpec, Experts, Format


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


NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}  # in a SwitchGLU and in a shared expert
_GATELESS = {"up": "fc1", "down": "fc2"}  # in a SwitchMLP


def projection_names(layer: Any) -> dict[str, str]:
    """What a layer or a shared expert calls its gate, where it has one, up and down."""
    return _GATELESS if isinstance(layer, SwitchMLP) else NAMES


def projections(layer: Any) -> dict[str, Any]:
    """The modules of a layer or a shared expert by "gate", where it has one, "up" and "down"."""
    return {part: layer[name] for part, name in projection_names(layer).items()}


def experts_of(layer: Any) -> tuple[Experts | None, Experts, Experts]:
    """Gate, up and down of a SwitchGLU or SwitchMLP as the kernels take them."""
    found = {
        name: Experts(part["weight"], part.get("scales"), part.get("biases"), part.get("bias"))
        for name, part in projections(layer).items()
    }
    return found.get("gate"), found["up"], found["down"]


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


def by_mlx(layer: Any, x: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
    """The same as mlx-lm computes it."""
    kind = SwitchMLP if isinstance(layer, SwitchMLP) else SwitchGLU
    y: mx.array = kind.__call__(layer, x, indices)
    return (y * scores[..., None]).sum(axis=-2).astype(y.dtype)


def expert_nbytes(spec: BlockSpec, layer: Any) -> int:
    """Bytes of one expert's weights."""
    parts = (part for part in experts_of(layer) if part is not None)
    arrays = (a for part in parts for a in (part.weight, part.scales, part.biases, part.bias))
    return sum(int(array.nbytes) for array in arrays if array is not None) // spec.num_experts


def describe(spec: BlockSpec, layer: Any) -> str:
    """A form of block in a line; different forms have different ones."""
    experts = f"{spec.top_k} of {spec.num_experts} experts, {spec.hidden_size} x {spec.expert_size}"
    dtype = str(spec.dtype).removeprefix("mlx.core.")
    return f"{experts}, {describe_weights(spec, projections(layer))}, {dtype}"


def describe_weights(spec: BlockSpec, made: Mapping[str, Any]) -> str:
    """The formats of modules by "gate", where there is one, "up" and "down", and the activation."""
    parts = [f"{name} {_format(form, made[name])}" for name, form in spec.forms.items()]
    return ", ".join([*parts, " ".join([spec.activation.kind, *(f"{n:g}" for n in spec.activation.numbers)])])


def format_names(spec: BlockSpec, layer: Any) -> list[str]:
    """Of gate, up and down, as the planner names them: affine weights by the dtype of their scales too.

    A block without a gate has two.
    """
    names = []
    made = projections(layer)
    for name, form in spec.forms.items():
        dtype = _stored_dtype(made[name])
        if form.mode == "affine":
            more = "" if dtype == "bfloat16" else f"+{dtype}"
            names.append(f"affine{form.bits}/{form.group_size}{more}")
        else:
            names.append(dtype if form.mode == "plain" else form.mode)
    return names


def _stored_dtype(projection: Any) -> str:
    stored = projection.get("scales")
    return str((projection["weight"] if stored is None else stored).dtype).removeprefix("mlx.core.")


def _format(form: Format, projection: Any) -> str:
    dtype = _stored_dtype(projection)
    width = "" if form.mode.endswith(str(form.bits)) else form.bits  # mxfp4 says it
    name = dtype if form.mode == "plain" else f"{form.mode}{width}/{form.group_size} ({dtype})"
    return name + (" with bias" if projection.get("bias") is not None else "")
