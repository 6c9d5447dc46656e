"""Predicted bytes against those of mlx-lm's own loaded models and caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from planner.cost import CostModel
from planner.headers import ModelFilesError
from planner.model_profile import NO_LIMIT_TOKENS, profile_model, read_model_profile
from planner.node_profile import GB, make_node
from planner.workload import Workload
from tests.fake_models import headers_of, llama_config, llama_tensors
from tests.tiny_models import write_checkpoint

ARCHS = ("llama", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss", "deepseek_v3", "mamba2")
NUM_LAYERS = 5
CHUNK = 512


def loaded_bytes(folder: Path, part: str = "") -> int:
    model, _ = load_model(folder)
    return sum(value.nbytes for name, value in tree_flatten(model.parameters()) if part in name)


def cache_bytes(cache: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(cache.state) if isinstance(array, mx.array))


@pytest.mark.parametrize("arch", ARCHS)
def test_bytes_are_those_that_mlx_lm_loads(tmp_path: Path, arch: str) -> None:
    folder = write_checkpoint(arch, tmp_path, num_layers=NUM_LAYERS)
    profile = read_model_profile(folder)
    assert profile.num_layers == NUM_LAYERS
    assert profile.full_bytes == loaded_bytes(folder)
    for i, layer in enumerate(profile.layers):
        assert layer.weight_bytes == loaded_bytes(folder, f".layers.{i}."), i
    assert profile.embed_bytes == loaded_bytes(folder, "embed_tokens") + loaded_bytes(folder, "embeddings")
    assert profile.head_bytes == loaded_bytes(folder, "lm_head")
    assert profile.is_tied == (arch in ("qwen3", "gemma3_text", "mamba2"))
    assert profile.dtype_bytes == 4


@pytest.mark.parametrize("arch", ARCHS)
def test_cache_bytes_are_those_that_mlx_lm_keeps(tmp_path: Path, arch: str) -> None:
    folder = write_checkpoint(arch, tmp_path, num_layers=NUM_LAYERS)
    profile = read_model_profile(folder)
    model, _ = load_model(folder)
    caches = make_prompt_cache(model)
    num_tokens = 2 * CHUNK
    tokens = mx.zeros((1, num_tokens), mx.int32)
    for at in range(0, num_tokens, CHUNK):
        model(tokens[:, at : at + CHUNK], cache=caches)
        mx.eval([cache.state for cache in caches])
    assert [layer.cache.nbytes(num_tokens) for layer in profile.layers] == [cache_bytes(c) for c in caches]


@pytest.mark.parametrize(
    ("arch", "num_chunks"),
    [
        pytest.param(arch, num_chunks, marks=pytest.mark.long if num_chunks > 2 and arch != "llama" else [])
        for arch in ARCHS
        for num_chunks in (2, 4)
    ],
)
def test_scratch_covers_a_prefill_chunk_on_this_cpu(tmp_path: Path, arch: str, num_chunks: int) -> None:
    folder = write_checkpoint(arch, tmp_path, num_layers=NUM_LAYERS)
    node = make_node(0, "n", "h", memory_bytes=8 * GB, chip="AMD EPYC")
    cost = CostModel(read_model_profile(folder), [node], (), Workload(num_chunks * CHUNK, 1))
    model, _ = load_model(folder)
    caches = make_prompt_cache(model)
    old_limit = mx.set_cache_limit(0)
    try:
        before_bytes = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(num_chunks):
            logits = model(mx.zeros((1, CHUNK), mx.int32), cache=caches)
            mx.eval(logits, [cache.state for cache in caches])
            del logits
        used_bytes = mx.get_peak_memory() - before_bytes
    finally:
        mx.set_cache_limit(old_limit)
    allowed_bytes = cost.kv_bytes(0, NUM_LAYERS) + cost.activation_bytes(0, 0, NUM_LAYERS)
    assert used_bytes <= 1.05 * allowed_bytes


@pytest.mark.parametrize("chunk", [128, 1024, pytest.param(2048, marks=pytest.mark.long)])
@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt_oss"])
def test_bytes_hold_for_chunks_of_another_size(tmp_path: Path, arch: str, chunk: int) -> None:
    """Caches to the byte, windows with a chunk on top among them; and the peak, which scratch covers."""
    folder = write_checkpoint(arch, tmp_path, num_layers=NUM_LAYERS)
    node = make_node(0, "n", "h", memory_bytes=8 * GB, chip="AMD EPYC")
    cost = CostModel(read_model_profile(folder), [node], (), Workload(2 * chunk, 1, chunk_tokens=chunk))
    model, _ = load_model(folder)
    caches = make_prompt_cache(model)
    old_limit = mx.set_cache_limit(0)
    try:
        before_bytes = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(2):
            logits = model(mx.zeros((1, chunk), mx.int32), cache=caches)
            mx.eval(logits, [cache.state for cache in caches])
            del logits
        used_bytes = mx.get_peak_memory() - before_bytes
    finally:
        mx.set_cache_limit(old_limit)
    kv_bytes = cost.kv_bytes(0, NUM_LAYERS)
    assert sum(map(cache_bytes, caches)) == pytest.approx(kv_bytes, rel=0.03)
    assert used_bytes <= 1.05 * (kv_bytes + cost.activation_bytes(0, 0, NUM_LAYERS))


def test_caches_grow_by_256_tokens(tmp_path: Path) -> None:
    profile = read_model_profile(write_checkpoint("llama", tmp_path, num_layers=3))
    layer = profile.layers[0].cache
    assert layer.token_bytes == 2 * 2 * 16 * 4
    assert [layer.nbytes(n) // layer.token_bytes for n in (1, 256, 257, 700)] == [256, 256, 512, 768]
    assert layer.read_bytes(300) == 300 * layer.token_bytes


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_caches_have_the_dtype_of_the_weights(tmp_path: Path, dtype: Any) -> None:
    profile = read_model_profile(write_checkpoint("llama", tmp_path, num_layers=3, dtype=dtype))
    assert profile.dtype_bytes == dtype.size


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_quantised_models_compute_in_the_dtype_of_their_scales(tmp_path: Path, arch: str) -> None:
    quantize = {"bits": 8, "group_size": 64, "model.layers.1.mlp.down_proj": {"bits": 4, "group_size": 32}}
    for dtype, expected in ((mx.float32, 4), (mx.bfloat16, 2)):
        folder = write_checkpoint(
            arch, tmp_path / str(expected), num_layers=3, quantize=quantize, dtype=dtype
        )
        profile = read_model_profile(folder)
        assert profile.dtype_bytes == expected
        assert profile.full_bytes == loaded_bytes(folder)
    plain = read_model_profile(write_checkpoint(arch, tmp_path / "plain", num_layers=3))
    assert profile.layers[0].active_params == plain.layers[0].active_params
    assert profile.layers[1].active_params == plain.layers[1].active_params
    assert profile.layers[0].cache.token_bytes * 2 == plain.layers[0].cache.token_bytes


def test_only_chosen_experts_are_active(tmp_path: Path) -> None:
    layer = read_model_profile(write_checkpoint("qwen3_moe", tmp_path, num_layers=3)).layers[1]
    experts_bytes = 8 * 3 * 64 * 64 * 4
    assert layer.weight_bytes - layer.active_bytes == experts_bytes * 6 // 8


def test_experts_in_tensors_of_their_own_weigh_the_same(tmp_path: Path) -> None:
    stacked = read_model_profile(write_checkpoint("qwen3_moe", tmp_path / "a", num_layers=3))
    single = read_model_profile(
        write_checkpoint("qwen3_moe", tmp_path / "b", num_layers=3, unstack_experts=True)
    )
    assert single.layers == stacked.layers


def test_a_moe_layer_beside_a_dense_one(tmp_path: Path) -> None:
    profile = read_model_profile(write_checkpoint("deepseek_v3", tmp_path, num_layers=3))
    dense, sparse = profile.layers[0], profile.layers[1]
    assert dense.active_bytes == dense.weight_bytes
    assert sparse.active_bytes < sparse.weight_bytes
    assert dense.cache == sparse.cache
    assert dense.cache.token_bytes == (64 + 16) * 4  # the latent and the rotary key, not 4 heads of both


def test_what_mlx_lm_drops_does_not_count() -> None:
    config, tensors = llama_config(), llama_tensors()
    plain = profile_model(config, headers_of(tensors), "m")
    extra = {
        "vision_tower.encoder.layers.0.weight": ("BF16", (999, 999)),
        "multi_modal_projector.linear.weight": ("BF16", (999, 999)),
        "model.layers.4.eh_proj.weight": ("BF16", (999, 999)),  # multi-token prediction
        "mtp.layers.0.weight": ("BF16", (999, 999)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (8,)),
    }
    full = profile_model(config, headers_of(tensors | extra), "m")
    assert (full.layers, full.full_bytes) == (plain.layers, plain.full_bytes)


def test_a_head_in_the_files_of_a_tied_model_does_not_count() -> None:
    profile = profile_model(llama_config(tie_word_embeddings=True), headers_of(llama_tensors()), "m")
    assert profile.is_tied
    assert profile.head_bytes == 0


def test_a_model_without_a_head_is_tied() -> None:
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    config = llama_config()
    del config["tie_word_embeddings"]
    assert profile_model(config, headers_of(tensors), "m").is_tied


def test_a_nested_text_config_is_read() -> None:
    text = llama_config()
    tensors = {f"language_model.{name}": value for name, value in llama_tensors().items()}
    tensors["vision_tower.blocks.0.weight"] = ("BF16", (5000, 5000))
    config = {"model_type": "mistral3", "text_config": text, "vision_config": {"num_hidden_layers": 99}}
    profile = profile_model(config, headers_of(tensors), "m")
    plain = profile_model(text, headers_of(llama_tensors()), "m")
    assert profile.layers == plain.layers
    assert profile.full_bytes == plain.full_bytes
    assert (profile.model_type, profile.max_context) == ("mistral3", 4096)


def test_fp8_blocks_count_as_bfloat16() -> None:
    tensors = llama_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    fp8 = tensors | {name: ("F8_E4M3", (128, 64)), f"{name}_scale_inv": ("F32", (1, 1))}
    assert profile_model(llama_config(), headers_of(fp8), "m").layers == (
        profile_model(llama_config(), headers_of(tensors), "m").layers
    )


def test_a_checkpoint_that_lacks_layers_is_an_error() -> None:
    with pytest.raises(ModelFilesError, match=r"tensors for 4 layers, its config\.json names 6"):
        profile_model(llama_config(num_layers=6), headers_of(llama_tensors(4)), "m")
    tensors = {name: value for name, value in llama_tensors(4).items() if ".layers.2." not in name}
    with pytest.raises(ModelFilesError, match="no tensors for layer 2"):
        profile_model(llama_config(), headers_of(tensors), "m")
    with pytest.raises(ModelFilesError, match="no numbered layers"):
        profile_model(llama_config(), headers_of({"w": ("F32", (1,))}), "m")


def test_a_model_without_a_context_has_no_limit() -> None:
    config = llama_config()
    del config["max_position_embeddings"]
    assert profile_model(config, headers_of(llama_tensors()), "m").max_context == NO_LIMIT_TOKENS


def test_a_latent_cache_has_the_width_of_its_paper() -> None:
    """DeepSeek-V3 keeps 576 elements a token and layer (arXiv 2412.19437, section 2.1.1)."""
    tensors = {
        "model.embed_tokens.weight": ("BF16", (129280, 7168)),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": ("BF16", (576, 7168)),
        "model.layers.0.self_attn.kv_b_proj.weight": ("BF16", (32768, 512)),
    }
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 1,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
    }
    assert profile_model(config, headers_of(tensors), "m").layers[0].cache.token_bytes == 576 * 2
