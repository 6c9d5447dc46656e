"""What a block of experts is: its sizes, how its weights are stored, its activation. Values only."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
ACTIVATIONS = ("swiglu", "geglu", "swiglu_oai", "swiglu_clamped", "swiglu_clamped_after")
DTYPES = (mx.float16, mx.bfloat16, mx.float32)


@dataclass(frozen=True, slots=True)
class Format:
    """How one matrix of every expert is stored.

    "affine" and "mxfp4" are those of `mx.quantize`; "plain" has neither bits nor groups (both 0).
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
        elif self.mode == "mxfp4":
            if (self.bits, self.group_size) != (4, 32):
                raise ValueError(f"mxfp4 has 4 bits in groups of 32, not {self.bits} in {self.group_size}")
        elif self.mode == "plain":
            if (self.bits, self.group_size) != (0, 0):
                raise ValueError("a plain format has bits 0 and group_size 0")
        else:
            raise ValueError(f'mode is "affine", "mxfp4" or "plain", not "{self.mode}"')


PLAIN = Format(0, 0, "plain")


@dataclass(frozen=True, slots=True)
class Activation:
    """What joins gate and up: all in float32, with silu(g) = g / (1 + exp(-g)).

    swiglu                silu(gate) * up
    geglu                 gelu(gate) * up, gelu by its tanh form
    swiglu_oai            g * sigmoid(alpha * g) * (u + 1), g = min(gate, limit), u = clip(up, +-limit)
    swiglu_clamped        silu(g) * u with g and u cut the same way
    swiglu_clamped_after  min(silu(gate), limit) * clip(up, +-limit)
    """

    kind: str = "swiglu"
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATIONS:
            raise ValueError(f'an activation is one of {", ".join(ACTIVATIONS)}, not "{self.kind}"')
        if self.kind not in {"swiglu", "geglu"} and not self.limit > 0:
            raise ValueError(f"limit of {self.kind} must be above 0, not {self.limit}")


SWIGLU = Activation()
GEGLU = Activation("geglu")


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One block of experts. dtype: of x, of what lies between gate/up and down, and of the answer."""

    num_experts: int
    hidden_size: int
    expert_size: int
    top_k: int
    gate: Format
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


# Of models that people run: num_experts, hidden_size, expert_size, top_k.
REAL_SIZES = {"qwen3-30b-a3b": (128, 2048, 768, 8), "glm-4.7-flash": (64, 2048, 1536, 4)}


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

    scores: (T, 1), what its answer is multiplied by, or None for 1.
    """

    spec: BlockSpec
    gate: Experts
    up: Experts
    down: Experts
    scores: mx.array | None = None

    def __post_init__(self) -> None:
        if (self.spec.num_experts, self.spec.top_k) != (1, 1):
            raise ValueError("a shared expert is a block of one expert that every token uses once")
