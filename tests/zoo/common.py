"""The values that the zoo's configs take by the name of a field: sizes small, windows short."""

from __future__ import annotations

from typing import Any

NUM_LAYERS = 7
WINDOW = 5  # shorter than the prompts
VOCAB_SIZE = 128

Config = dict[str, Any]

SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 3

COMMON: Config = {
    "vocab_size": VOCAB_SIZE,
    "num_vocab": VOCAB_SIZE,
    "embedding_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    # layers
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_transformer_layers"), NUM_LAYERS
    ),
    "layer_types": SLIDING[:NUM_LAYERS],
    # widths
    **dict.fromkeys(("hidden_size", "hidden_dim", "d_model", "n_embd", "model_dim", "block_dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "ff_intermediate_size", "n_inner"),
        128,
    ),
    "dense_intermediate_size": 128,
    "dim_model_base": 64,
    # attention
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_head", "num_swa_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_swa_key_value_heads"), 2),
    "num_attention_groups": 2,
    **dict.fromkeys(("head_dim", "kv_channels", "hidden_size_per_head"), 16),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), WINDOW
    ),
    "attention_chunk_size": WINDOW,
    "sliding_window_pattern": 3,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    **dict.fromkeys(("qk_norm", "use_qk_norm"), True),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "model_max_length"), 1000),
    **dict.fromkeys(("rope_theta", "swa_rope_theta"), 10000.0),
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "query_pre_attn_scalar": 16,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": WINDOW,
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(
        ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"), 1
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
            "share_expert_dim",
        ),
        32,
    ),
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    **dict.fromkeys(
        ("first_k_dense_replace", "num_dense_layers", "moe_layer_freq", "decoder_sparse_step"), 1
    ),
    "mlp_only_layers": [],
    # state spaces and linear attention
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 16),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv", "linear_conv_kernel_dim", "short_conv_kernel_size"), 4),
    **dict.fromkeys(("linear_num_value_heads", "mamba_num_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "n_groups", "mamba_n_groups"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "mamba_d_head"), 16),
    "use_bias": False,
    "use_conv_bias": True,
    "conv_bias": False,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "conv_L_cache": 3,
    **dict.fromkeys(("a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"), 16),
    # scalars
    **dict.fromkeys(
        (
            "rms_norm_eps",
            "layer_norm_eps",
            "layer_norm_epsilon",
            "layernorm_epsilon",
            "norm_eps",
            "norm_epsilon",
        ),
        1e-5,
    ),
    **dict.fromkeys(
        ("logits_scaling", "attention_multiplier", "embedding_multiplier", "residual_multiplier"), 1.5
    ),
    **dict.fromkeys(("scale_depth", "scale_emb"), 1.5),
}
