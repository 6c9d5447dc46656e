"""What the kernels of a block of experts are compiled with: sizes and formats, never a number of tokens.

Values only, but for the arrays of limits, which are made once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx

from kernels.moe_spec import ACTIVATIONS, Activation, BlockSpec, Experts, Format

SIMD = 32
ROWS = 4  # of a simdgroup: MOE_ROWS of moe_weights.h
TILE = 32  # the most pairs of one expert that meet a weight at a time
MODES = {"affine": 0, "mxfp4": 1, "plain": 2}
CHUNKS = (64, 32, 16, 8, 4)
MAX_WORDS = 6  # that a lane holds of one row
MAX_ASKED = 1.25
BUSY = 0.7
Constants = dict[str, int | bool | mx.Dtype]


def stored_bits(form: Format, dtype: mx.Dtype) -> int:
    return dtype.size * 8 if form.mode == "plain" else form.bits


def _asked(form: Format, weights: int, dtype: mx.Dtype) -> float:
    """Bytes that lanes ask for over the different ones among them: lanes of one group each read its scale."""
    if form.mode == "plain":
        return 1.0
    of_group = 1 if form.mode == "mxfp4" else 2 * dtype.size
    packed = weights * form.bits / 8
    return (packed + of_group) / (packed + of_group * weights / form.group_size)


def chunk(width: int, forms: tuple[Format, ...], dtype: mx.Dtype) -> int | None:
    """How many weights of a row a lane takes at a time: whole words of one group, and none left over.

    The largest that leaves registers, asks for few bytes twice and leaves few lanes idle, as far as there is
    such a one; None where no number fits.
    """
    bits = [stored_bits(form, dtype) for form in forms]

    def busy(weights: int) -> float:
        chunks = width // weights
        return chunks / (-(-chunks // SIMD) * SIMD)

    fitting = [
        c
        for c in CHUNKS
        if width % c == 0
        and all(c * b % 32 == 0 for b in bits)
        and all(form.group_size == 0 or form.group_size % c == 0 for form in forms)
    ]
    if not fitting:
        return None
    small = [c for c in fitting if max(bits) * c <= 32 * MAX_WORDS] or fitting[-1:]
    frugal = [c for c in small if all(_asked(form, c, dtype) <= MAX_ASKED for form in forms)] or small[:1]
    return next((c for c in frugal if busy(c) >= BUSY), max(frugal, key=busy))


def matrix_names(name: str) -> tuple[str, ...]:
    """The inputs of a kernel that one matrix of every expert takes."""
    return tuple(f"{name}_{part}" for part in ("weight", "scales", "biases", "bias"))


def matrix_arrays(experts: Experts) -> list[mx.array]:
    """As many as `matrix_names`; another array stands for what the format has not, and is not read."""
    scales = experts.weight if experts.scales is None else experts.scales
    return [
        experts.weight,
        scales,
        scales if experts.biases is None else experts.biases,
        scales if experts.bias is None else experts.bias,
    ]


def _matrix(name: str, form: Format, experts: Experts, dtype: mx.Dtype) -> Constants:
    return {
        f"{name}_MODE": MODES[form.mode],
        f"{name}_BITS": stored_bits(form, dtype),
        f"{name}_GROUP": form.group_size,
        f"{name}_BIASED": experts.bias is not None,
        f"{name}_S": (experts.weight if experts.scales is None else experts.scales).dtype,
    }


@functools.cache
def limits(activation: Activation) -> mx.array:
    """alpha and limit as an input: a template has no fractions."""
    return mx.array([activation.alpha, activation.limit], dtype=mx.float32)


@dataclass(frozen=True, eq=False)
class Block:
    """A spec with its weights. What follows from them is made once: whoever calls often keeps the block."""

    spec: BlockSpec
    gate: Experts
    up: Experts
    down: Experts

    @functools.cached_property
    def gate_up_arrays(self) -> list[mx.array]:
        return [*matrix_arrays(self.gate), *matrix_arrays(self.up), limits(self.spec.activation)]

    @functools.cached_property
    def down_arrays(self) -> list[mx.array]:
        return matrix_arrays(self.down)

    @functools.cached_property
    def reasons(self) -> dict[BlockSpec | None, str | None]:
        """Why kernels cannot run it beside such a shared expert, once that was asked; None: they can."""
        return {}

    @functools.cached_property
    def tile(self) -> int:
        """Pairs of an expert that meet a weight at a time at most.

        Of 63 tokens an expert meets 63 * top_k / num_experts on average. Where that is above 8, more than 16
        are so frequent that weights would be read twice; elsewhere 32 would take registers for nothing.
        """
        return TILE // 2 if self.spec.num_experts >= 8 * self.spec.top_k else TILE

    @functools.cached_property
    def sizes(self) -> Constants:
        spec = self.spec
        return {"T": spec.dtype, "H": spec.hidden_size, "I": spec.expert_size, "TOPK": spec.top_k}

    @functools.cached_property
    def gate_up(self) -> Constants:
        return self.gate_up_as("")

    @functools.cached_property
    def down_sum(self) -> Constants:
        return self.down_sum_as("")

    def gate_up_as(self, prefix: str) -> Constants:
        """The constants of the matrices; `prefix` tells a shared expert's from the others'."""
        spec = self.spec
        weights = chunk(spec.hidden_size, (spec.gate, spec.up), spec.dtype)
        assert weights is not None
        return {
            f"{prefix}C": weights,
            f"{prefix}ACTIVATION": ACTIVATIONS.index(spec.activation.kind),
            **_matrix(f"{prefix}GATE", spec.gate, self.gate, spec.dtype),
            **_matrix(f"{prefix}UP", spec.up, self.up, spec.dtype),
        }

    def down_sum_as(self, prefix: str) -> Constants:
        spec = self.spec
        weights = chunk(spec.expert_size, (spec.down,), spec.dtype)
        assert weights is not None
        return {f"{prefix}C": weights, **_matrix(f"{prefix}DOWN", spec.down, self.down, spec.dtype)}
