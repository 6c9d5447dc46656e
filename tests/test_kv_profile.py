"""Caches of architectures that keep more than plain keys and values, against mlx-lm's own caches."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from planner.headers import TensorHeader
from planner.kv_profile import CacheProfile
from planner.model_profile import profile_model
from planner.windows import window_of

BASE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 100,
    "max_position_embeddings": 1000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "tie_word_embeddings": False,
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "cohere2": BASE
    | {"head_dim": 16, "sliding_window": 40, "sliding_window_pattern": 2, "layer_norm_eps": 1e-5},
    "exaone4": BASE
    | {"head_dim": 16, "sliding_window": 40, "sliding_window_pattern": "LLGL", "rope_scaling": None},
    "olmo3": BASE | {"num_key_value_heads": 4, "sliding_window": 40, "attention_bias": False},
    "deepseek_v2": BASE
    | LATENT
    | {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64}},
    "minicpm3": BASE
    | LATENT
    | {"dim_model_base": 64, "scale_depth": 1.0, "scale_emb": 1.0, "v_head_dim": 16}
    | {
        "rope_scaling": {
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4,
        }
    },
    "jamba": BASE
    | {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2}
    | {"mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_dt_rank": 8, "num_experts": 4}
    | {"num_experts_per_tok": 2, "mamba_conv_bias": True},
    "qwen3_next": BASE
    | DELTA
    | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    | {"shared_expert_intermediate_size": 32, "moe_intermediate_size": 32, "mlp_only_layers": []}
    | {"partial_rotary_factor": 0.5, "full_attention_interval": 4},
    "lfm2": BASE
    | {"norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 64, "block_ff_dim": 64}
    | {"block_multiple_of": 4, "block_ffn_dim_multiplier": 2, "block_auto_adjust_ff_dim": True}
    | {"layer_types": ["full_attention", "conv", "full_attention", "conv"]},
    "rwkv7": BASE
    | {"head_dim": 16, "norm_eps": 1e-5, "a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8}
    | {"decay_low_rank_dim": 8},
    "gpt2": {"n_ctx": 1000, "n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 1000, "vocab_size": 100}
    | {"layer_norm_epsilon": 1e-5},
    "phi3": BASE | {"partial_rotary_factor": 1.0, "original_max_position_embeddings": 1000},
}
CHUNK = 512


def nbytes(cache: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(cache.state) if isinstance(array, mx.array))


@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_caches_are_those_that_mlx_lm_keeps(arch: str) -> None:
    config = {"model_type": arch} | CONFIGS[arch]
    model_class, args_class = _get_classes(config=config)
    model = model_class(args_class.from_dict(config))
    parameters = tree_flatten(model.parameters())
    headers = {
        name: TensorHeader(name, "F32", tuple(value.shape), "f", 0, value.nbytes)
        for name, value in parameters
    }
    profile = profile_model(config, headers, arch)
    assert profile.full_bytes == sum(value.nbytes for _, value in parameters)
    caches = make_prompt_cache(model)
    for _ in range(2):
        model(mx.zeros((1, CHUNK // 2), mx.int32), cache=caches)
        mx.eval([cache.state for cache in caches])
    context = CHUNK
    expected = [
        # the second chunk is half of the largest, so a window keeps that much less
        layer.cache.nbytes(context) - (_spare(layer.cache) if layer.cache.window else 0)
        for layer in profile.layers
    ]
    assert expected == [nbytes(cache) for cache in caches]


def _spare(cache: CacheProfile) -> int:
    assert cache.window is not None
    return (CHUNK - (cache.window - 1 + CHUNK // 2)) * cache.token_bytes


def test_states_do_not_grow_and_windows_end() -> None:
    state = CacheProfile(state_bytes=100)
    assert state.nbytes(1) == state.nbytes(10**6) == state.read_bytes(5) == 100
    window = CacheProfile(token_bytes=2, window=100)
    assert window.nbytes(10**6) == 2 * (99 + CHUNK)
    assert window.read_bytes(10**6) == 200
    assert window.read_bytes(50) == 100


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 9}, [None] * 4),
        ({"model_type": "qwen2", "sliding_window": 9, "layer_types": ["sliding_attention"] * 4}, [None] * 4),
        ({"model_type": "gpt_oss", "sliding_window": 9}, [9, None, 9, None]),
        ({"model_type": "gemma3_text", "sliding_window": 9}, [9] * 4),
        ({"model_type": "gemma3_text", "sliding_window": 9, "sliding_window_pattern": 2}, [9, None, 9, None]),
        (
            {"model_type": "mimo_v2_flash", "sliding_window_size": 9, "hybrid_layer_pattern": [0, 1]},
            [None, 9, None],
        ),
        ({"model_type": "recurrent_gemma", "attention_window_size": 9}, [9]),
        ({"model_type": "baichuan_m1", "sliding_window": 9, "sliding_window_layers": [1]}, [None, 9]),
        ({"model_type": "gpt_oss"}, [None]),
    ],
)
def test_windows_are_those_of_the_module_not_of_the_config(
    config: dict[str, Any], windows: list[int | None]
) -> None:
    assert [window_of(config, index) for index in range(len(windows))] == windows
