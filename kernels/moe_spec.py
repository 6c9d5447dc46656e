"""What a block of experts is: its sizes, how its weights are stored, its activation. Values only."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
FLOATS = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # bits and group_size
MODES = ("affine", "mxfp4", "plain", "nvfp4", "mxfp8")  # in the order of their numbers in kernels/metal
GATELESS = ("relu2", "gelu")  # of up alone
ACTIVATIONS = (  # in that order too
    *("swiglu", "geglu", "swiglu_oai", "swiglu_clamped", "swiglu_clamped_after", "situ", "situ_both"),
    *GATELESS,
)
_ALPHA = ("swiglu_oai", "situ", "situ_both")  # these look at alpha, and these at limit
_LIMIT = ("swiglu_oai", "swiglu_clamped", "swiglu_clamped_after", "situ_both")
DTYPES = (mx.float16, mx.bfloat16, mx.float32)


@dataclass(frozen=True, slots=True)
class Format:
    """How one matrix of every expert is stored.

    "affine" and the floats "mxfp4", "mxfp8" and "nvfp4" (without a scale of the whole matrix) are those of
    `mx.quantize`; "plain" has neither bits nor groups (both 0).
    Raises ValueError for what MLX has no such format for.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode == "affine":
            if self.bits not in AFFINE_BITS:
                raise ValueError(f"bits of an affine format are one of {AFFINE_BITS}, not {self.bits}")
            if self.group_size not in AFFINE_GROUPS:
                raise ValueError(
                    f"group_size of an affine format is one of {AFFINE_GROUPS}, not {self.group_size}"
                )
        elif self.mode in FLOATS:
            if (self.bits, self.group_size) != (known := FLOATS[self.mode]):
                raise ValueError(
                    f"{self.mode} has {known[0]} bits in groups of {known[1]}, "
                    f"not {self.bits} in {self.group_size}"
                )
        elif self.mode == "plain":
            if (self.bits, self.group_size) != (0, 0):
                raise ValueError("a plain format has bits 0 and group_size 0")
        else:
            raise ValueError(f'mode is one of {", ".join(MODES)}, not "{self.mode}"')


PLAIN = Format(0, 0, "plain")


@dataclass(frozen=True, slots=True)
class Activation:
    """What joins gate and up, or is made of up alone: all in float32, with silu(g) = g / (1 + exp(-g)).

    swiglu                silu(gate) * up
    geglu                 gelu(gate) * up, gelu by its tanh form
    swiglu_oai            g * sigmoid(alpha * g) * (u + 1), g = min(gate, limit), u = clip(up, +-limit)
    swiglu_clamped        silu(g) * u with g and u cut the same way
    swiglu_clamped_after  min(silu(gate), limit) * clip(up, +-limit)
    situ                  alpha * tanh(gate / alpha) * sigmoid(gate) * up
    situ_both             the same with limit * tanh(up / limit) for up
    relu2                 max(up, 0) squared, without a gate
    gelu                  gelu(up) by its tanh form, without a gate
    """

    kind: str = "swiglu"
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATIONS:
            raise ValueError(f'an activation is one of {", ".join(ACTIVATIONS)}, not "{self.kind}"')
        if self.kind in _LIMIT and not self.limit > 0:
            raise ValueError(f"limit of {self.kind} must be above 0, not {self.limit}")
        if self.kind.startswith("situ") and not self.alpha > 0:
            raise ValueError(f"alpha of {self.kind} must be above 0, not {self.alpha}")

    @property
    def has_gate(self) -> bool:
        return self.kind not in GATELESS

    @property
    def numbers(self) -> tuple[float, ...]:
        """Those of alpha and limit that it looks at."""
        given = ((_ALPHA, self.alpha), (_LIMIT, self.limit))
        return tuple(number for kinds, number in given if self.kind in kinds)


SWIGLU = Activation()
GEGLU = Activation("geglu")
RELU2 = Activation("relu2")
GELU = Activation("gelu")


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One block of experts. dtype: of x, of what lies between gate/up and down, and of the answer.

    gate: None where up alone is activated.
    """

    num_experts: int
    hidden_size: int
    expert_size: int
    top_k: int
    gate: Format | None
    up: Format
    down: Format
    activation: Activation = SWIGLU
    dtype: mx.Dtype = mx.bfloat16

    def __post_init__(self) -> None:
        for name in ("num_experts", "hidden_size", "expert_size", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be float16, bfloat16 or float32, not {self.dtype}")
        if self.activation.has_gate != (self.gate is not None):
            takes = "joins gate and up" if self.activation.has_gate else "takes up alone"
            raise ValueError(f"the activation {self.activation.kind} {takes}: give it what it takes")

    @property
    def inner(self) -> tuple[Format, ...]:
        """Of the matrices that x is multiplied with: gate and up, or up alone."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def forms(self) -> dict[str, Format]:
        """By the names "gate", where there is one, "up" and "down"."""
        gate = {} if self.gate is None else {"gate": self.gate}
        return {**gate, "up": self.up, "down": self.down}

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Of the matrices of all experts, (E, N, K), by the names of `forms`."""
        inner = self.num_experts, self.expert_size, self.hidden_size
        outer = self.num_experts, self.hidden_size, self.expert_size
        return {name: outer if name == "down" else inner for name in self.forms}


# Of models that people run: num_experts, hidden_size, expert_size, top_k.
REAL_SIZES = {
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "glm-4.7-flash": (64, 2048, 1536, 4),
    "nemotron-3-nano": (128, 2688, 1856, 6),
}
REAL_ACTIVATIONS = {"nemotron-3-nano": RELU2}  # of the others SwiGLU


REAL_SHARED = {"glm-4.7-flash": 1536}  # the width of the shared expert, where there is one


def real_shared_spec(name: str, form: Format, dtype: mx.Dtype = mx.bfloat16) -> BlockSpec | None:
    """Of the shared expert of one of REAL_SIZES; None: it has none."""
    if name not in REAL_SHARED:
        return None
    return BlockSpec(1, REAL_SIZES[name][1], REAL_SHARED[name], 1, form, form, form, dtype=dtype)


def real_spec(name: str, form: Format, dtype: mx.Dtype = mx.bfloat16) -> BlockSpec:
    """One of REAL_SIZES, all matrices in one format."""
    activation = REAL_ACTIVATIONS.get(name, SWIGLU)
    gate = form if activation.has_gate else None
    return BlockSpec(*REAL_SIZES[name], gate, form, form, activation, dtype)


@dataclass(frozen=True, slots=True)
class Experts:
    """One matrix of every expert, as mlx-lm's SwitchLinear and QuantizedSwitchLinear hold it.

    weight: (E, N, K) or (E, N, K * bits / 32) uint32; scales and biases: (E, N, K / group_size), absent where
    the format has none; bias: (E, N) or None.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bias: mx.array | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """An expert that every token uses, with its own width and formats; its arrays have E = 1.

    gate: None where the spec has none.
    scores: (T, 1), what its answer is multiplied by, or None for 1.
    """

    spec: BlockSpec
    gate: Experts | None
    up: Experts
    down: Experts
    scores: mx.array | None = None

    def __post_init__(self) -> None:
        if (self.spec.num_experts, self.spec.top_k) != (1, 1):
            raise ValueError("a shared expert is a block of one expert that every token uses once")
