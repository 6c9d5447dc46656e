"""Configs as published checkpoints have them (the fields that matter to mlx-lm), by architecture."""

from __future__ import annotations

from typing import Any

# fmt: off
REAL_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}, "tie_word_embeddings": False,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-06,
        "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0,
        "tie_word_embeddings": True, "rope_scaling": None, "sliding_window": None, "quantization":
        {"group_size": 64, "bits": 8},
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size":
        6144, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-06,
        "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step":
        1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
    },
    "gemma3_text": {
        "model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size":
        6912, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        "sliding_window_pattern": 6, "vocab_size": 262144, "query_pre_attn_scalar": 256, "rms_norm_eps":
        1e-06, "rope_local_base_freq": 10000, "rope_theta": 1000000,
    },
    "gemma3": {
        "model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560,
        "num_hidden_layers": 34, "intermediate_size": 10240, "sliding_window": 1024, "rope_scaling":
        {"factor": 8.0, "rope_type": "linear"}}, "vision_config": {"hidden_size": 1152, "model_type":
        "siglip"},
    },
    "gpt_oss": {
        "model_type": "gpt_oss", "num_hidden_layers": 36, "num_local_experts": 128, "num_experts_per_tok":
        4, "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128, "rope_theta": 150000,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
        "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False}, "layer_types":
        ["sliding_attention", "full_attention"] * 18, "quantization_config": {"quant_method": "mxfp4"},
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size":
        18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
        "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": True, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "moe_layer_freq":
        1, "first_k_dense_replace": 3, "max_position_embeddings": 163840, "rms_norm_eps": 1e-06,
        "rope_theta": 10000, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale":
        1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
        "attention_bias": False, "num_nextn_predict_layers": 1, "quantization_config": {"quant_method":
        "fp8", "weight_block_size": [128, 128]},
    },
    "mamba2": {
        "model_type": "mamba2", "num_heads": 80, "head_dim": 64, "vocab_size": 50288, "hidden_size": 2560,
        "intermediate_size": 5120, "state_size": 128, "num_hidden_layers": 64, "layer_norm_epsilon":
        1e-05, "conv_kernel": 4, "n_groups": 1, "use_bias": False, "use_conv_bias": True,
        "tie_word_embeddings": True, "time_step_limit": [0.0, 100.0], "time_step_rank": 160, "expand": 2,
    },
    "gemma2": {
        "model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42, "intermediate_size": 14336,
        "num_attention_heads": 16, "head_dim": 256, "rms_norm_eps": 1e-06, "vocab_size": 256000,
        "num_key_value_heads": 8, "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "mixtral": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    },
    "olmoe": {
        "model_type": "olmoe", "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 1024,
        "num_attention_heads": 16, "rms_norm_eps": 1e-05, "vocab_size": 50304, "num_experts": 64,
        "num_experts_per_tok": 8, "num_key_value_heads": 16, "norm_topk_prob": False,
        "max_position_embeddings": 4096,
    },
    "phi3": {
        "model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "vocab_size": 32064,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_theta":
        10000.0, "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 48, "long_factor": [1.2] *
        48}, "partial_rotary_factor": 1.0, "sliding_window": 262144,
    },
    "gemma3n": {
        "model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text", "hidden_size": 2048,
        "num_hidden_layers": 30, "intermediate_size": [8192] * 30, "num_attention_heads": 8, "head_dim":
        256, "rms_norm_eps": 1e-06, "vocab_size": 262400, "num_key_value_heads": 2,
        "num_kv_shared_layers": 10, "vocab_size_per_layer_input": 262144, "sliding_window": 512,
        "max_position_embeddings": 32768, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
        "final_logit_softcapping": 30.0, "layer_types": ["sliding_attention", "sliding_attention",
        "sliding_attention", "sliding_attention", "full_attention"] * 6, "activation_sparsity_pattern":
        [0.95] * 10 + [0.0] * 20, "hidden_size_per_layer_input": 256, "altup_num_inputs": 4,
        "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 64},
    },
    "gemma4_text": {
        "model_type": "gemma4_text",
    },
    "qwen3_next": {
        "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size":
        5120, "num_attention_heads": 16, "linear_num_value_heads": 32, "linear_num_key_heads": 16,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "num_experts": 512, "num_experts_per_tok": 10, "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 512, "mlp_only_layers": [], "moe_intermediate_size": 512,
        "rms_norm_eps": 1e-06, "vocab_size": 151936, "num_key_value_heads": 2, "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25, "max_position_embeddings": 262144, "norm_topk_prob": True,
        "head_dim": 256, "full_attention_interval": 4, "tie_word_embeddings": False,
    },
    "jamba": {
        "model_type": "jamba", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "attn_layer_offset": 4, "attn_layer_period":
        8, "expert_layer_offset": 1, "expert_layer_period": 2, "mamba_d_conv": 4, "mamba_d_state": 16,
        "mamba_expand": 2, "num_experts": 16, "num_experts_per_tok": 2, "rms_norm_eps": 1e-06,
        "max_position_embeddings": 262144, "vocab_size": 65536, "mamba_dt_rank": 256,
        "tie_word_embeddings": False,
    },
    "rwkv7": {
        "model_type": "rwkv7", "vocab_size": 65536, "hidden_size": 2048, "intermediate_size": 8192,
        "norm_eps": 1e-05, "head_dim": 64, "num_hidden_layers": 24, "a_low_rank_dim": 96,
        "v_low_rank_dim": 64, "gate_low_rank_dim": 256, "decay_low_rank_dim": 96, "tie_word_embeddings":
        False,
    },
    "cohere2": {
        "model_type": "cohere2", "hidden_size": 4096, "head_dim": 128, "num_hidden_layers": 32,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta":
        50000.0, "vocab_size": 256000, "layer_norm_eps": 1e-05, "logit_scale": 0.25, "attention_bias":
        False, "layer_norm_bias": False, "sliding_window": 4096, "sliding_window_pattern": 4,
    },
    "llama4_text": {
        "model_type": "llama4_text", "hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers":
        48, "vocab_size": 202048, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "head_dim": 128,
        "tie_word_embeddings": False, "no_rope_layers": [1, 1, 1, 0] * 12, "use_qk_norm": True,
    },
    "glm4_moe": {
        "model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944,
        "max_position_embeddings": 131072, "moe_intermediate_size": 1408, "norm_topk_prob": True,
        "num_attention_heads": 96, "n_group": 1, "head_dim": 128, "topk_group": 1, "n_shared_experts": 1,
        "n_routed_experts": 128, "routed_scaling_factor": 1.0, "num_experts_per_tok": 8,
        "first_k_dense_replace": 1, "num_hidden_layers": 46, "num_key_value_heads": 8, "rms_norm_eps":
        1e-05, "rope_theta": 1000000, "use_qk_norm": False, "tie_word_embeddings": False,
        "attention_bias": True, "partial_rotary_factor": 0.5, "rope_scaling": None,
    },
    "kimi_k3": {
        "model_type": "kimi_k3", "text_config": {"model_type": "kimi_linear", "vocab_size": 1000,
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 96, "rms_norm_eps": 1e-05, "hidden_act": "situ", "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0, "linear_attn_config": {"kda_layers": [1, 2, 3],
        "full_attn_layers": [4], "num_heads": 2, "head_dim": 32, "short_conv_kernel_size": 4,
        "gate_lower_bound": -5.0, "use_full_rank_gate": True}, "num_experts": 8, "moe_intermediate_size":
        32, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "mla_use_nope": True, "mla_use_output_gate": True, "num_experts_per_token": 2,
        "num_shared_experts": 1, "first_k_dense_replace": 1, "routed_expert_hidden_size": 32,
        "latent_moe_use_norm": True, "attn_res_block_size": 2},
    },
}
