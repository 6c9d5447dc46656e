"""Taking over the expert layers of models: which, for what calls, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
import pytest
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from kernels import moe, switch
from kernels.emulator import build
from kernels.exl3 import Exl3SwitchLinear
from shard_loader.rehearsal import Rehearsal
from tests.mlx_kernels import without_gpu
from tests.zoo.configs import zoo_config

KERNELS = moe.run
HIDDEN, EXPERT, NUM_EXPERTS, TOP_K = 64, 32, 4, 2


@pytest.fixture(autouse=True)
def _has_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACRAME_KERNELS", "emulate")
    monkeypatch.setattr(moe, "run", moe.run_by_mlx)  # but in the long tests
    mx.random.seed(7)


def layer_of(**options: Any) -> SwitchGLU:
    layer = SwitchGLU(HIDDEN, EXPERT, NUM_EXPERTS, **options)
    layer.eval()
    return layer


def gateless_of(**options: Any) -> SwitchMLP:
    layer = SwitchMLP(HIDDEN, EXPERT, NUM_EXPERTS, **options)
    layer.eval()
    return layer


def call_of(num_tokens: int = 3) -> tuple[mx.array, mx.array, mx.array]:
    """x (1, T, hidden), indices and scores (1, T, k)."""
    x = mx.random.normal((1, num_tokens, HIDDEN))
    scores = mx.random.uniform(shape=(1, num_tokens, TOP_K))
    indices = mx.argpartition(mx.random.uniform(shape=(1, num_tokens, NUM_EXPERTS)), TOP_K)[..., :TOP_K]
    return x, indices, scores


def taken_of(layer: nn.Module) -> switch.Taken:
    taken = switch.taken_of(layer)
    assert taken is not None
    return taken


@pytest.mark.parametrize("asked", ["off", without_gpu("on")])
def test_off_touches_nothing(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("MACRAME_KERNELS", asked)
    layer = layer_of()
    assert switch.take_over([layer], switch.Always()) == []
    assert type(layer) is SwitchGLU


def test_release_gives_back_what_was_there() -> None:
    layer, x = layer_of(), call_of()
    before = layer(*x[:2])
    taken = switch.take_over([layer], switch.Always())
    assert taken == [layer]
    assert switch.take_over([layer], switch.Always()) == []  # it has been
    switch.release(taken)
    assert type(layer) is SwitchGLU
    assert mx.array_equal(layer(*x[:2]), before)


@pytest.mark.parametrize("make", [layer_of, gateless_of])
def test_each_shape_is_watched_once_and_then_fused(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x, indices, scores = call_of()
    wanted = (layer(x, indices) * scores[..., None]).sum(axis=-2)
    switch.take_over([layer], switch.Always())
    taken = taken_of(layer)
    counts = []
    for _ in range(3):
        found = (layer(x, indices) * scores[..., None]).sum(axis=-2)
        assert type(mx.array(found)) is mx.array
        assert mx.allclose(found, wanted, rtol=1e-5, atol=1e-6)
        counts.append((taken.num_plain, taken.num_fused))
    assert counts == [(1, 0), (1, 1), (1, 2)]
    layer(x[:, :1], indices[:, :1])
    assert (taken.num_plain, taken.num_fused) == (2, 2)


@pytest.mark.parametrize("who", [switch.Never(), None])
def test_what_is_not_chosen_is_mlx_lms_own_bit_for_bit(who: Any) -> None:
    layer = layer_of()
    x, indices, _ = call_of()
    wanted = layer(x, indices)
    switch.take_over([layer], who or switch.Always())
    if who is None:
        layer.train()  # kernels have no gradient
    assert mx.array_equal(layer(x, indices), wanted)
    assert taken_of(layer).num_plain == 0


def test_a_kernel_that_raises_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer = layer_of()
    x, indices, scores = call_of()
    wanted = (layer(x, indices) * scores[..., None]).sum(axis=-2)
    switch.take_over([layer], switch.Always())
    (layer(x, indices) * scores[..., None]).sum(axis=-2)

    def fails(*_: Any) -> mx.array:
        raise RuntimeError("no such\nfunction")

    monkeypatch.setattr(moe, "run", fails)
    assert mx.allclose((layer(x, indices) * scores[..., None]).sum(axis=-2), wanted)
    assert taken_of(layer).failure == "RuntimeError: no such function"
    assert "an expert layer goes back to MLX's operations: RuntimeError: no such function" in caplog.text
    monkeypatch.setattr(moe, "run", moe.run_by_mlx)
    assert mx.array_equal((layer(x, indices) * scores[..., None]).sum(axis=-2), wanted)
    assert taken_of(layer).num_fused == 0


def test_an_adapter_in_a_layer_is_left_to_mlx() -> None:
    from mlx_lm.tuner.lora import LoRASwitchLinear

    layer = layer_of()
    x, indices, _ = call_of()
    switch.take_over([layer], switch.Always())
    layer(x, indices)
    base = layer.gate_proj
    layer.gate_proj = LoRASwitchLinear.from_base(base)
    layer.gate_proj.lora_b = mx.ones_like(layer.gate_proj.lora_b)
    wanted = SwitchGLU.__call__(layer, x, indices)
    assert mx.array_equal(layer(x, indices), wanted)
    taken = taken_of(layer)
    assert taken.reasons == ["a LoRASwitchLinear has no kernel"]
    assert taken.num_plain == 1
    layer.gate_proj = base
    layer(x, indices)
    assert taken.num_plain == 2


def test_layers_of_exl3_have_their_own_kernels() -> None:
    layer = layer_of()
    assert switch.expert_layers([layer]) == [layer]
    layer.gate_proj = Exl3SwitchLinear.__new__(Exl3SwitchLinear)
    assert switch.expert_layers([layer]) == []
    other = gateless_of()
    assert switch.expert_layers([other]) == [other]
    other.fc1 = Exl3SwitchLinear.__new__(Exl3SwitchLinear)
    assert switch.expert_layers([other]) == []


def test_other_layers_of_experts_are_not_taken() -> None:
    class Own(SwitchMLP):
        def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
            return x

    assert switch.take_over([Own(HIDDEN, EXPERT, NUM_EXPERTS)], switch.Always()) == []


# -- whole models of every architecture -------------------------------------------------------------------

MIXED = zoo_config("gemma4_text") | {
    "enable_moe_block": True,
    "num_experts": NUM_EXPERTS,
    "top_k_experts": TOP_K,
    "moe_intermediate_size": EXPERT,
}
# Whose shared expert joins the sum of its experts.
JOINED = (
    *("Klear", "afmoe", "bailing_hybrid", "bailing_moe_linear", "bailing_moe_v3", "deepseek", "deepseek_v2"),
    *("deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite"),
    *("glm_moe_dsa", "hunyuan", "kimi_k25", "kimi_linear", "kimi_vl", "laguna", "mimo_v2_flash", "mistral4"),
    *("qwen2_moe", "qwen3_next", "solar_open", "step3p5"),
)
SHAPES = ((1, 9), (1, 1), (1, 1), (2, 1), (1, 9), (2, 1))
NOT_FUSED = {  # what their own code does with the outputs is something else
    "bailing_moe": "the sum is a compiled function",
    "deepseek_v41": "the sum is mx.sum of a product in float32",
    "llama4": "one expert, no scores",
    "longcat_flash": "the sum is mx.sum",
    "longcat_flash_ngram": "the sum is mx.sum",
}
WITH_EXPERTS = (
    *("Klear", "afmoe", "bailing_hybrid", "bailing_moe", "bailing_moe_linear", "bailing_moe_v3", "deepseek"),
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v41", "dots1", "ernie4_5_moe", "exaone_moe"),
    *("gemma4_text", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoehybrid"),
    *("hunyuan", "jamba", "kimi_k25", "kimi_k3", "kimi_linear", "kimi_vl", "laguna", "lfm2_moe", "llama4"),
    *("longcat_flash", "longcat_flash_ngram", "mellum", "mimo_v2_flash", "minimax", "minimax_m3_vl"),
    *(
        "mistral4",
        "mixtral",
        "nemotron_h",
        "olmoe",
        "phimoe",
        "phixtral",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl_moe",
    ),
    *("solar_open", "step3p5"),
)


def logits_of(model: nn.Module) -> list[mx.array]:
    """One sequence in three calls, then others from the start; shapes come again."""
    cache, found = make_prompt_cache(model), []
    for i, (num_rows, num_tokens) in enumerate(SHAPES):
        if i > 2:
            cache = make_prompt_cache(model)
        tokens = (mx.arange(num_rows * num_tokens) * (5 + i) % 128).reshape(num_rows, num_tokens)
        found.append(model(tokens, cache=cache))
        mx.eval(found[-1])
    return found


def check(name: str) -> None:
    model = Rehearsal(MIXED if name == "gemma4_text" else zoo_config(name)).model
    model.eval()
    layers = [layer for _, layer in model.named_modules() if isinstance(layer, SwitchGLU | SwitchMLP)]
    wanted = logits_of(model)
    taken = switch.take_over([model], switch.Always())
    assert len(taken) == len(layers) > 0
    for found, one in zip(logits_of(model), wanted, strict=True):
        assert float(mx.abs(found - one).max()) <= 1e-4 * float(mx.abs(one).max())
    known = [taken_of(layer) for layer in taken]
    assert {one.failure for one in known} == {""}
    assert not [reason for one in known for reason in one.reasons]
    num_fused = sum(one.num_fused for one in known)
    if name in NOT_FUSED:
        assert num_fused == 0
    else:
        assert num_fused == 3 * len(layers)  # of six calls three shapes came for the first time
    assert sum(one.num_joined for one in known) == (num_fused if name in JOINED else 0)
    switch.release(taken)
    assert all(mx.array_equal(*pair) for pair in zip(logits_of(model), wanted, strict=True))


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "gemma4_text", "kimi_k3", "nemotron_h", "phixtral", "deepseek_v3", "qwen2_moe"]
)
def test_models(name: str) -> None:
    check(name)


@pytest.mark.long
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler (g++ or clang++) is here")
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_every_architecture_with_the_kernels_themselves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "run", KERNELS)
    check(name)


def test_no_architecture_is_forgotten() -> None:
    folder = Path(mlx_lm.models.__path__[0])
    texts = {path.stem: path.read_text() for path in folder.glob("*.py")}
    own = {name for name, text in texts.items() if "SwitchGLU(" in text or "SwitchMLP(" in text}
    assert own - {"switch_layers", *WITH_EXPERTS} == {"muse_spark"}  # has no baseline on a CPU
