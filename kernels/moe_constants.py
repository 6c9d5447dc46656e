"""What the kernels of a block of experts are compiled with: sizes and formats, never a number of tokens.

Values only, but for the arrays of limits, which are made once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from kernels.moe_spec import ACTIVATIONS, MODES, Activation, BlockSpec, Experts, Format

SIMD = 32
TILE = 32  # the most pairs of one expert that meet a weight at a time
CHUNKS = (64, 32, 16, 8, 4)
INNER_CHUNK, DOWN_CHUNK = 8, 16  # weights of a row that a lane takes at a time, where they fit
MAX_WORDS = 4  # that a lane holds of one row, where it can
BUSY = 0.8  # of the lanes
PARTS = ("weight", "scales", "biases", "bias")  # of Experts
Constants = dict[str, int | bool | mx.Dtype]


def stored_bits(form: Format, dtype: mx.Dtype) -> int:
    return dtype.size * 8 if form.mode == "plain" else form.bits


def chunk(width: int, forms: tuple[Format, ...], dtype: mx.Dtype, most: int) -> int | None:
    """How many weights of a row a lane takes at a time: whole words of one group, and none left over.

    The largest up to `most` that leaves few lanes idle, as far as there is such a one, or the smallest above;
    None where no number fits.
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
    small = [c for c in fitting if c <= most and max(bits) * c <= 32 * MAX_WORDS] or fitting[-1:]
    return next((c for c in small if busy(c) >= BUSY), max(small, key=busy))


def matrix_names(name: str) -> tuple[str, ...]:
    """The inputs of a kernel that one matrix of every expert takes."""
    return tuple(f"{name}_{part}" for part in PARTS)


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
        f"{name}_MODE": MODES.index(form.mode),
        f"{name}_BITS": stored_bits(form, dtype),
        f"{name}_GROUP": form.group_size,
        f"{name}_BIASED": experts.bias is not None,
        f"{name}_S": (experts.weight if experts.scales is None else experts.scales).dtype,
    }


@functools.cache
def limits(activation: Activation) -> mx.array:
    """alpha and limit as an input: a template has no fractions."""
    return mx.array([activation.alpha, activation.limit], dtype=mx.float32)


def more_headers(constants: Constants) -> tuple[str, ...]:
    """Those of kernels/metal that only some formats and activations need.

    They follow from the constants, which are part of a kernel's name in MLX: MLX compiles anew, each time,
    what has one name and two texts.
    """
    modes = {MODES[number] for key, number in constants.items() if key.endswith("_MODE")}  # type: ignore[index]
    kinds = {ACTIVATIONS[number] for key, number in constants.items() if key.endswith("ACTIVATION")}  # type: ignore[index]
    fp8 = ("moe_fp8.h",) if modes & {"nvfp4", "mxfp8"} else ()
    return (*fp8, "moe_situ.h") if kinds & {"situ", "situ_both"} else fp8


@dataclass(frozen=True, eq=False)
class Block:
    """A spec with its weights. What follows from them is made once: whoever calls often keeps the block."""

    spec: BlockSpec
    gate: Experts | None
    up: Experts
    down: Experts

    @functools.cached_property
    def inner_arrays(self) -> list[mx.array]:
        """Of what makes the numbers between x and down."""
        if self.gate is None:
            return matrix_arrays(self.up)
        return [*matrix_arrays(self.gate), *matrix_arrays(self.up), limits(self.spec.activation)]

    @functools.cached_property
    def down_arrays(self) -> list[mx.array]:
        return matrix_arrays(self.down)

    @functools.cached_property
    def arrays(self) -> list[mx.array]:
        """All that the matrices have, in the order of `parts`."""
        given = (
            getattr(experts, part, None) for experts in (self.gate, self.up, self.down) for part in PARTS
        )
        return [array for array in given if array is not None]

    @functools.cached_property
    def parts(self) -> tuple[bool, ...]:
        """Which of PARTS gate, up and down have."""
        return tuple(
            getattr(experts, part, None) is not None
            for experts in (self.gate, self.up, self.down)
            for part in PARTS
        )

    @functools.cached_property
    def replays(self) -> dict[tuple[Block | None, bool, bool], Callable[..., mx.array]]:
        """What builds the graph again but not its launches, by the shared expert's block and who has scores:
        these experts, that one. Of shared experts only the last one's are kept."""
        return {}

    @functools.cached_property
    def reasons(self) -> dict[Block | None, str | None]:
        """Why kernels cannot run it beside this shared expert, once that was asked; None: they can.

        Of shared experts only the last one's are kept."""
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
    def inner(self) -> Constants:
        return self.inner_as("")

    @functools.cached_property
    def down_sum(self) -> Constants:
        return self.down_sum_as("")

    def inner_as(self, prefix: str) -> Constants:
        """The constants of the matrices; `prefix` tells a shared expert's from the others'."""
        spec = self.spec
        weights = chunk(spec.hidden_size, spec.inner, spec.dtype, INNER_CHUNK)
        assert weights is not None
        gate: Constants = {}
        if spec.gate is not None and self.gate is not None:
            gate = _matrix(f"{prefix}GATE", spec.gate, self.gate, spec.dtype)
        return {
            f"{prefix}C": weights,
            f"{prefix}ACTIVATION": ACTIVATIONS.index(spec.activation.kind),
            **gate,
            **_matrix(f"{prefix}UP", spec.up, self.up, spec.dtype),
        }

    def down_sum_as(self, prefix: str) -> Constants:
        spec = self.spec
        weights = chunk(spec.expert_size, (spec.down,), spec.dtype, DOWN_CHUNK)
        assert weights is not None
        return {f"{prefix}C": weights, **_matrix(f"{prefix}DOWN", spec.down, self.down, spec.dtype)}
