"""The shared expert beside an expert layer: which module it is, and its form and weights for the kernels.

A module is known by what it does, not by its name: its own call is asked once what it makes of given numbers
from its gate and up matrices. For the thread that owns MLX.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn

from kernels import failure
from kernels.expert_blocks import NAMES, projections
from kernels.expert_form import format_of
from kernels.moe_constants import PARTS
from kernels.moe_reference import activate
from kernels.moe_spec import GEGLU, SWIGLU, Activation, BlockSpec, Experts

logger = logging.getLogger(__name__)

# The numbers that a module is asked about: close where activations bend, and beyond any limit of a model.
_NEAR = 24.0
_FAR = (50.0, 150.0, 600.0, 3000.0, 20000.0)
_SHAPES = ((41, 41), (1, 1, 41 * 41))  # in which it is: of some tokens, and of one as models have it
_TOLERANCE = 1e-4


def is_shared_expert(module: object) -> bool:
    """Whether it has the matrices of one: gate, up and down, and nothing else."""
    return (
        isinstance(module, nn.Module)
        and set(module.children()) == set(NAMES.values())
        and all(type(part) in (nn.Linear, nn.QuantizedLinear) for part in module.children().values())
        and not any(isinstance(value, mx.array) for value in module.values())
    )


def beside(layers: Iterable[nn.Module], roots: Iterable[nn.Module]) -> dict[int, nn.Module]:
    """The shared expert of each of `layers`, by the layer's id: the only such module with the same parent."""
    wanted = {id(layer) for layer in layers}
    found = {}
    for root in roots:
        for parent in root.modules():
            parts = list(parent.children().values())
            mine = [id(part) for part in parts if id(part) in wanted]
            shared = [part for part in parts if is_shared_expert(part)]
            if len(mine) == len(shared) == 1:
                found[mine[0]] = shared[0]
    return found


def experts_of(module: Any) -> tuple[Experts, Experts, Experts]:
    """Gate, up and down as the kernels take them, of one expert; they share the module's memory."""
    gate, up, down = (_experts(part) for part in projections(module).values())
    return gate, up, down


def _experts(part: Any) -> Experts:
    given = (part.get(name) for name in PARTS)
    return Experts(*(None if array is None else array[None] for array in given))  # type: ignore[arg-type]


def spec_of(module: Any, activation: Activation, dtype: mx.Dtype) -> BlockSpec | str:
    """Its form for x of `dtype`, or why the kernels do not know it."""
    made = projections(module)
    try:
        formats = {name: format_of(part) for name, part in made.items()}
        for part in made.values():
            _check_dtypes(part, dtype)
        size, hidden_size = made["down"]["weight"].shape[0], _width(made["up"])
        return (
            BlockSpec(
                num_experts=1,
                hidden_size=hidden_size,
                expert_size=_width(made["down"]),
                top_k=1,
                activation=activation,
                dtype=dtype,
                **formats,
            )
            if size == hidden_size
            else "it has other outputs than inputs"
        )
    except ValueError as error:
        return str(error)


def _check_dtypes(part: Any, dtype: mx.Dtype) -> None:
    """Raises ValueError where MLX's answer for x of `dtype` has another, or kernels read other words."""
    for name in PARTS:
        array = part.get(name)
        if array is None or not mx.issubdtype(array.dtype, mx.floating) or array.dtype == dtype:
            continue
        if name == "weight" or dtype != mx.float32:
            raise ValueError(f"it has {name} of {array.dtype} where x is {dtype}".replace("mlx.core.", ""))


def _width(part: Any) -> int:
    stored: int = part["weight"].shape[1]
    return stored if type(part) is nn.Linear else stored * 32 // part.bits


# -- what a module does -----------------------------------------------------------------------------------


def activation_of(module: Any, likely: Activation = SWIGLU) -> Activation | None:
    """What its own call makes of gate and up before down; None: nothing that kernels know, or more than that.

    `likely`: one more that it may be, beside SwiGLU and GeGLU.
    """
    near, far = mx.linspace(-_NEAR, _NEAR, 31), mx.array(_FAR)
    line = mx.concatenate([near, far, -far])
    given = mx.meshgrid(line, line + 0.5)
    try:
        for known in (likely, SWIGLU, GEGLU):
            if all(_does(module, known, *(one.reshape(shape) for one in given)) for shape in _SHAPES):
                return known
    except Exception as error:  # border: a module of any kind may need what it is not given here
        logger.info("a shared expert stays mlx-lm's: %s", failure.line(error))
    return None


def _does(module: Any, known: Activation, gate: mx.array, up: mx.array) -> bool:
    """gate, up: of one shape."""
    wanted, found = _down(activate(known, gate, up)), _asked(module, gate, up)
    return found.shape == wanted.shape and _differ_by(found, wanted) < _TOLERANCE


def _down(inner: mx.array) -> mx.array:
    """In the place of the last matrix: nothing else may be done before it or behind it, nor this twice."""
    return 0.5 * inner + 3


def _asked(module: Any, gate: mx.array, up: mx.array) -> mx.array:
    """What it makes of gate and up.

    Raises ValueError if these are not of x, or the call leaves a mark on the module or on x.
    """
    x = mx.arange(1, 8 * gate[..., 0].size + 1, dtype=mx.float32).reshape(*gate.shape[:-1], 8) / 64
    same_x = mx.array(x)

    def matrix(answer: mx.array, given: mx.array) -> mx.array:
        if given is not x:
            raise ValueError("its matrices are given something else than x")
        return answer

    twin: Any = nn.Module.__new__(type(module))
    twin.__dict__.update(module.__dict__, _training=False)
    dict.update(twin, module)
    answers = partial(matrix, gate), partial(matrix, up), _down
    dict.update(twin, zip(NAMES.values(), answers, strict=True))
    before = _content(twin)
    found: mx.array = twin(x)
    if _content(twin) != before or not mx.array_equal(x, same_x):
        raise ValueError("its call changes the module or what it is given")
    return found


def _content(module: Any) -> dict[str, int]:
    return {name: id(value) for name, value in (*module.__dict__.items(), *module.items())}


def _differ_by(found: mx.array, wanted: mx.array) -> float:
    return float((mx.abs(found - wanted) / (1 + mx.abs(wanted))).max())
