"""What headers predict of quantised and cast weights is what a load gives, within 1 %; the plan shows it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import _get_classes, quantize_model

from cluster.dry_run import main
from planner.headers import ModelFilesError, TensorHeader
from planner.load_options import LoadOptions, Quantization
from planner.loaded_bytes import LoadedBytes
from planner.model_profile import profile_model, read_model_profile
from shard_loader.weights import load_shard
from tests.fake_models import headers_of
from tests.real_configs import REAL_CONFIGS
from tests.tiny_models import write_checkpoint

NUM_LAYERS = 3
PROPORTIONS: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
WIDER: dict[str, dict[str, Any]] = {
    "llama": PROPORTIONS,
    "qwen3": PROPORTIONS,
    "gemma3_text": PROPORTIONS,
    "qwen3_moe": {"hidden_size": 512, "moe_intermediate_size": 512},
    "deepseek_v3": {
        "hidden_size": 512,
        "moe_intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "kv_lora_rank": 128,
        "v_head_dim": 64,
        "qk_nope_head_dim": 64,
    },
    "mamba2": {"hidden_size": 512, "num_heads": 32, "head_dim": 32},
}


OPTIONS = {
    "affine4": LoadOptions(Quantization.of("affine")),
    "mxfp4": LoadOptions(Quantization.of("mxfp4"), "bfloat16"),
    "nvfp4": LoadOptions(Quantization.of("nvfp4"), "float16"),
    "cast": LoadOptions(dtype="float32"),
}


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        pytest.param(
            *(arch, options),
            id=f"{arch}-{name}",
            marks=pytest.mark.long if name in ("mxfp4", "nvfp4") and arch != "llama" else [],
        )
        for arch in WIDER
        for name, options in OPTIONS.items()
    ],
)
def test_predicted_bytes_are_the_loaded_ones(arch: str, options: LoadOptions, tmp_path: Path) -> None:
    source = write_checkpoint(
        arch,
        tmp_path,
        num_layers=NUM_LAYERS,
        dtype=mx.bfloat16,
        overrides=WIDER[arch] | {"torch_dtype": "bfloat16"},
        unstack_experts=arch == "qwen3_moe",
    )
    predicted = read_model_profile(source, options=options).full_bytes
    measured = load_shard(source, 0, NUM_LAYERS, options=options).footprint.total_bytes
    assert predicted == pytest.approx(measured, rel=0.01), json.dumps([predicted, measured])


def test_the_plan_counts_weights_as_they_will_be_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_checkpoint("llama", tmp_path / "wide", num_layers=3, overrides={"hidden_size": 256})
    full_bytes = {}
    for name, part in (("plain", {}), ("4 bits", {"quantize": {"bits": 4}}), ("half", {"dtype": "float16"})):
        path = tmp_path / "cluster.json"
        node = {"host": "localhost", "memory_gb": 16, "chip": "Apple M4"}
        path.write_text(json.dumps({"model": str(model), "nodes": [node], "load": part}))
        assert main(["--config", str(path), "--json"]) == 0
        full_bytes[name] = json.loads(capsys.readouterr().out)["memory"]["full_model_bytes"]
    assert full_bytes["half"] * 2 == full_bytes["plain"]
    assert full_bytes["4 bits"] / full_bytes["plain"] == pytest.approx(5 / 32, rel=0.02)  # float32 scales


def test_quantising_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = {"bits": 4, "group_size": 32}
    model = write_checkpoint("llama", tmp_path / "packed", num_layers=3, quantize=how)
    path = tmp_path / "cluster.json"
    node = {"host": "localhost", "memory_gb": 16}
    path.write_text(json.dumps({"model": str(model), "nodes": [node], "load": {"quantize": {}}}))
    assert main(["--config", str(path)]) == 3
    assert "is quantised already: remove load.quantize" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "name", "bits"),
    [
        ("granite", "model.layers.0.mlp.down_proj.weight", 8.5),
        ("granite", "model.layers.0.mlp.up_proj.weight", 4.5),
        ("granite", "lm_head.weight", 8.5),
        ("rwkv7", "model.embeddings.weight", 8.5),
        ("bailing_hybrid", "model.layers.0.attention.kv_b_proj.weight", 16),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight", 8.5),
        ("llama", "model.layers.0.mlp.gate_proj.weight", 4.5),
        ("llama", "model.layers.0.input_layernorm.weight", 16),
        ("jamba", "model.layers.0.mamba.conv1d.weight", 16),
        ("jamba", "model.layers.0.mamba.A_log", 16),
    ],
)
def test_what_mlx_lms_models_except_is_counted_so(model_type: str, name: str, bits: float) -> None:
    header = TensorHeader(name, "BF16", (256, 128), "model.safetensors", 0, 256 * 128 * 2)
    options = LoadOptions(Quantization.of("affine"))
    found = LoadedBytes({name: header}, {"model_type": model_type}, "m", options)
    assert found.bytes_of(header) * 8 == bits * 256 * 128


def test_a_router_with_a_correction_is_no_linear() -> None:
    name = "model.layers.3.mlp.gate"
    router = TensorHeader(f"{name}.weight", "BF16", (256, 128), "f", 0, 256 * 128 * 2)
    bias = TensorHeader(f"{name}.e_score_correction_bias", "F32", (256,), "f", 0, 1024)
    headers = {header.name: header for header in (router, bias)}
    found = LoadedBytes(headers, {}, "m", LoadOptions(Quantization.of("affine")))
    assert found.bytes_of(router) == router.nbytes


def test_fp8_is_widened_and_then_packed() -> None:
    weight = TensorHeader("a.weight", "F8_E4M3", (256, 128), "f", 0, 256 * 128)
    scale = TensorHeader("a.weight_scale_inv", "F32", (2, 1), "f", 0, 8)
    headers = {header.name: header for header in (weight, scale)}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    for options, expected in ((LoadOptions(), 2.0), (LoadOptions(Quantization.of("affine")), 0.5625)):
        found = LoadedBytes(headers, config, "m", options)
        assert (found.bytes_of(weight), found.bytes_of(scale)) == (expected * 256 * 128, 0)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization": {"bits": 4, "group_size": 64}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}},
        {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]}},
    ],
)
def test_packed_formats_are_not_packed_again(config: dict[str, Any]) -> None:
    with pytest.raises(ModelFilesError, match=r"^m is quantised already: remove load\.quantize"):
        LoadedBytes({}, config, "m", LoadOptions(Quantization.of("affine")))
    LoadedBytes({}, config, "m", LoadOptions(dtype="float16"))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("BF16", "affine4/64"), ("F16", "affine4/64+float16"), ("F32", "affine4/64+float32")],
)
def test_a_format_names_its_scales(dtype: str, name: str) -> None:
    """On load and in the file alike; vectors are of their own dtype."""
    plain = headers_of({"a.weight": (dtype, (128, 64)), "b.weight": (dtype, (64,))})
    packing = LoadedBytes(plain, {}, "m", LoadOptions(Quantization(4, 64)))
    assert packing.format_of(plain["a.weight"]) == name
    packed = headers_of(
        {"a.weight": ("U32", (128, 8)), "a.scales": (dtype, (128, 1)), "b.weight": (dtype, (64,))}
    )
    config = {"quantization": {"bits": 4, "group_size": 64}}
    stored = LoadedBytes(packed, config, "m", LoadOptions())
    assert {stored.format_of(packed[key]) for key in ("a.weight", "a.scales")} == {name}
    floats = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    assert stored.format_of(packed["b.weight"]) == floats[dtype]


def real_parameters(config: dict[str, Any]) -> tuple[dict[str, TensorHeader], int]:
    """The headers of a model of a published config in bf16, and its bytes quantised; all of it lazy."""
    model_class, args_class = _get_classes(config=config)
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    model.update(
        tree_map(
            lambda a: a.astype(mx.bfloat16) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters()
        )
    )
    headers = {
        name: TensorHeader(name, "BF16", tuple(array.shape), "f", 0, array.nbytes)
        for name, array in tree_flatten(model.parameters())
    }
    quantize_model(model, {}, 64, 4)
    return headers, sum(array.nbytes for _, array in tree_flatten(model.parameters()))


# The other configs want a checkpoint of another layout than their parameters.
REAL = sorted(set(REAL_CONFIGS) - {"gemma3", "gemma3n", "gemma3_text"})


@pytest.mark.parametrize("arch", REAL)
def test_published_shapes_are_predicted_as_mlx_lm_packs_them(arch: str) -> None:
    config = {key: value for key, value in REAL_CONFIGS[arch].items() if not key.startswith("quant")}
    headers, packed_bytes = real_parameters(config)
    predicted = profile_model(config, headers, arch, LoadOptions(Quantization.of("affine"))).full_bytes
    assert predicted == pytest.approx(packed_bytes, rel=0.002)
