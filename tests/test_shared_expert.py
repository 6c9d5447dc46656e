"""Which module beside an expert layer is its shared expert, and of what form."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.deepseek_v3 import DeepseekV3MLP
from mlx_lm.models.switch_layers import SwitchGLU

from kernels import moe_reference, shared_expert
from kernels.moe_spec import GEGLU, PLAIN, SWIGLU, Activation, BlockSpec, Format, Shared

HIDDEN, SIZE = 64, 96


class Mlp(nn.Module):
    """As models have it; `call` says what it does with its matrices."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, SIZE, bias=bias)
        self.up_proj = nn.Linear(HIDDEN, SIZE, bias=bias)
        self.down_proj = nn.Linear(SIZE, HIDDEN, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


def doing(call: Any) -> Mlp:
    module = type("Own", (Mlp,), {"__call__": call})()
    assert isinstance(module, Mlp)
    return module


def oai(self: Any, x: mx.array) -> mx.array:
    gate, up = mx.minimum(self.gate_proj(x), 7.0), mx.clip(self.up_proj(x), -7.0, 7.0)
    return self.down_proj(gate * mx.sigmoid(1.702 * gate) * (up + 1))


def clamped(self: Any, x: mx.array) -> mx.array:
    return self.down_proj(nn.silu(mx.minimum(self.gate_proj(x), 7.0)) * mx.clip(self.up_proj(x), -7.0, 7.0))


KNOWN: dict[str, tuple[Any, Activation]] = {
    "silu": (Mlp.__call__, SWIGLU),
    "swiglu": (lambda self, x: self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x))), SWIGLU),
    "geglu": (lambda self, x: self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x)), GEGLU),
    "the experts' own": (oai, Activation("swiglu_oai")),
}


def counted(self: Any, x: mx.array) -> mx.array:
    self.num_calls = getattr(self, "num_calls", 0) + 1
    return Mlp.__call__(self, x)


def grown(self: Any, x: mx.array) -> mx.array:
    x += 1
    return Mlp.__call__(self, x)


def inner(module: Any, x: mx.array) -> mx.array:
    return nn.silu(module.gate_proj(x)) * module.up_proj(x)


def cut_at(limit: float) -> Any:
    def call(self: Any, x: mx.array) -> mx.array:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(nn.silu(mx.minimum(gate, limit)) * mx.clip(up, -limit, limit))

    return call


UNKNOWN: dict[str, Any] = {
    "another activation": lambda self, x: self.down_proj(nn.relu(self.gate_proj(x)) * self.up_proj(x)),
    "the exact gelu": lambda self, x: self.down_proj(nn.gelu(self.gate_proj(x)) * self.up_proj(x)),
    "gate and up changed": lambda self, x: self.down_proj(nn.silu(self.up_proj(x)) * self.gate_proj(x)),
    "a norm before": lambda self, x: Mlp.__call__(self, x * 2),
    "a factor behind": lambda self, x: 0.5 * Mlp.__call__(self, x),
    "cut where experts are not": clamped,
    "what fails": lambda self, x: self.down_proj(self.gate_proj(x)[..., :-1] @ self.up_proj(x)),
    "more to give": lambda self, x, mask: x,
    "x's mean too": lambda self, x: Mlp.__call__(self, x) + x.mean(axis=-1, keepdims=True),
    "a factor of x": lambda self, x: Mlp.__call__(self, x) * (1 + mx.abs(x).max(axis=-1, keepdims=True)),
    "cut far away": cut_at(30.0),
    "cut further away": cut_at(1000.0),
    "of all tokens": lambda self, x: self.down_proj(inner(self, x) / mx.abs(inner(self, x)).max()),
    "one token otherwise": lambda self, x: Mlp.__call__(self, x) * (2 if x.shape[-2] == 1 else 1),
    "down twice": lambda self, x: self.down_proj(self.down_proj(inner(self, x))),
    "something else while it is used": lambda self, x: Mlp.__call__(self, x) * (1 if self.training else 2),
    "a count of its calls": counted,
    "a change of x": grown,
}


@pytest.mark.parametrize("name", KNOWN)
def test_an_activation_is_known_by_what_it_makes(name: str) -> None:
    call, known = KNOWN[name]
    module = doing(call)
    before = dict(module)
    assert shared_expert.activation_of(module, Activation("swiglu_oai")) == known
    assert dict(module) == before, "its twin is asked"


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_does_something_else_is_not_known(name: str) -> None:
    assert shared_expert.activation_of(doing(UNKNOWN[name])) is None


def test_mlx_lms_own_is_known() -> None:
    config: Any = type("Args", (), {"hidden_size": HIDDEN, "intermediate_size": SIZE})
    assert shared_expert.activation_of(DeepseekV3MLP(config)) == SWIGLU


class Parent(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self[name] = part


def test_the_one_beside_a_layer_is_found() -> None:
    layer, mlp = SwitchGLU(HIDDEN, SIZE, 4), Mlp()
    parent = Parent(experts=layer, gate=nn.Linear(HIDDEN, 4), shared=mlp)
    deep = Parent(block=parent, other=Mlp())
    assert shared_expert.beside([layer], [deep]) == {id(layer): mlp}
    assert shared_expert.beside([layer], [layer]) == {}
    assert shared_expert.beside([], [deep]) == {}


def test_two_are_none() -> None:
    layers = SwitchGLU(HIDDEN, SIZE, 4), SwitchGLU(HIDDEN, SIZE, 4)
    assert shared_expert.beside(layers[:1], [Parent(experts=layers[0], a=Mlp(), b=Mlp())]) == {}
    assert shared_expert.beside(layers, [Parent(one=layers[0], other=layers[1], shared=Mlp())]) == {}


@pytest.mark.parametrize("more", ["a matrix", "an array", "an adapter"])
def test_a_module_with_more_is_none(more: str) -> None:
    module: Any = Mlp()
    assert shared_expert.is_shared_expert(module)
    if more == "a matrix":
        module.norm = nn.RMSNorm(HIDDEN)
    elif more == "an array":
        module.scale = mx.ones((1,))
    else:
        from mlx_lm.tuner.lora import LoRALinear

        module.up_proj = LoRALinear.from_base(module.up_proj)
    assert not shared_expert.is_shared_expert(module)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("form", [PLAIN, Format(4, 32), Format(8, 32), Format(4, 32, "mxfp4")])
def test_form_and_weights_are_the_modules(form: Format, has_bias: bool) -> None:
    module = Mlp(bias=has_bias)
    if form != PLAIN:  # up keeps another form than the others
        module.gate_proj = module.gate_proj.to_quantized(form.group_size, form.bits, form.mode)
        module.down_proj = module.down_proj.to_quantized(form.group_size, form.bits, form.mode)
    spec = shared_expert.spec_of(module, SWIGLU, mx.float32)
    assert spec == BlockSpec(1, HIDDEN, SIZE, 1, form, PLAIN, form, SWIGLU, mx.float32)
    x = mx.random.normal((3, HIDDEN), key=mx.random.key(1))
    found = moe_reference.shared_answer(Shared(spec, *shared_expert.experts_of(module)), x)
    assert mx.allclose(found, module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "stored", "given", "said"),
    [
        (PLAIN, mx.float32, mx.bfloat16, "it has weight of float32 where x is bfloat16"),
        (PLAIN, mx.bfloat16, mx.float32, "it has weight of bfloat16 where x is float32"),
        (Format(4, 32), mx.float16, mx.bfloat16, "it has scales of float16 where x is bfloat16"),
        (Format(4, 32), mx.float32, mx.bfloat16, "it has scales of float32 where x is bfloat16"),
        (Format(4, 32, "mxfp4"), mx.float32, mx.bfloat16, "it has bias of float32 where x is bfloat16"),
        (Format(4, 32), mx.bfloat16, mx.float32, None),
    ],
)
def test_a_form_is_known_only_where_mlxs_answer_has_xs_dtype(
    form: Format, stored: mx.Dtype, given: mx.Dtype, said: str | None
) -> None:
    module = Mlp(bias=form.mode == "mxfp4")
    if form != PLAIN:
        nn.quantize(module, form.group_size, form.bits, mode=form.mode)
    module.set_dtype(stored)
    spec = shared_expert.spec_of(module, SWIGLU, given)
    assert spec == said if said else isinstance(spec, BlockSpec)
    answer = module(mx.zeros((1, HIDDEN), given))
    assert (answer.dtype == given) == (said is None or (form, given) == (PLAIN, mx.float32))


def test_forms_that_no_kernel_knows_say_why() -> None:
    module = Mlp()
    module.up_proj = nn.Linear(HIDDEN // 2, SIZE, bias=False)
    module.gate_proj = nn.Linear(HIDDEN // 2, SIZE, bias=False)
    assert shared_expert.spec_of(module, SWIGLU, mx.float32) == "it has other outputs than inputs"
    adapted: Any = Mlp()
    adapted.up_proj = nn.Sequential()
    assert shared_expert.spec_of(adapted, SWIGLU, mx.float32) == "a Sequential has no kernel"
    nvfp4: Any = Mlp()
    nvfp4.down_proj = nvfp4.down_proj.to_quantized(16, 4, mode="nvfp4")
    nvfp4.down_proj.global_scale = mx.ones((1,))
    said = shared_expert.spec_of(nvfp4, SWIGLU, mx.float32)
    assert said == "nvfp4 with a scale of a whole matrix has no kernel"
