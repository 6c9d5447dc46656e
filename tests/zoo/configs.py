"""A tiny config for every model module of the installed mlx-lm.

Each is made of the fields that the module's own argument class has, with values from one table by name, and
of what is special to the module. Seven layers where the architecture allows it, so that five stages and a
real pattern of layer kinds fit.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

import mlx_lm.models

from tests.zoo.common import COMMON, NUM_LAYERS, SLIDING, VOCAB_SIZE, WINDOW, Config

_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_ROPE_BY_TYPE = {"sliding_attention": _ROPE, "full_attention": _ROPE}
_QWEN3_5 = {"full_attention_interval": 3, "rope_parameters": _ROPE | {"partial_rotary_factor": 0.5}}
_KIMI = {
    "linear_attn_config": {
        "kda_layers": [1, 2, 4, 5, 7],
        "full_attn_layers": [3, 6],
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
        "gate_lower_bound": -5.0,
        "use_full_rank_gate": True,
    },
}
_NGRAM = {"zero_expert_num": 2, "zero_expert_type": "identity", "attention_method": "MLA", "q_lora_rank": 16}
_HYBRID = ["mamba", "attention", "mamba", "mamba", "attention", "mamba", "mamba"]

SPECIAL: dict[str, Config] = {
    "afm7": {"num_kv_reuse_layers": 2, "hidden_dim_scale_factor": 2.0},
    "apertus": {"post_norm": False},
    "baichuan_m1": {"sliding_window_layers": [0, 1, 3, 4, 6], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 3, "group_norm_size": 2},
    "bailing_moe_linear": {"layer_group_size": 3, "group_norm_size": 2},
    "bailing_moe_v3": {"layer_group_size": 3, "architectures": ["BailingMoeV3ForCausalLM"]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v41": {
        "compress_ratios": [0, 2, 2, 2, 3, 3, 3],
        "kv_source_layer_ids": [1, 4],
        "index_source_layer_ids": [1, 2, 4, 5],
        "candidate_source_layer_id": 4,
        "candidate_topk_blocks": 2,
        "candidate_block_size": 2,
        "head_dim": 32,
        "index_head_dim": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
    },
    "deepseek_v2": {
        "topk_method": "group_limited_greedy",
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 8,
        },
    },
    "ernie4_5_moe": {"moe_layer_start_index": 1},
    "exaone4": {"sliding_window_pattern": "LLG"},
    "exaone_moe": {"is_moe_layer": [False, True, True, False, True, True, True]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_expand": 1},
    "gear": {
        "layer_types": ["conv_mixer", "sliding_attention", "full_attention", "conv_mixer", *SLIDING[:3]],
        "tie_word_embeddings": True,
    },
    "gemma3n": {
        "num_kv_shared_layers": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 3 + ["full_attention"],
        "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 5,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 3,
        "altup_coef_clip": 1.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
        "rope_local_base_freq": 10.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 3 + ["full_attention"],
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 32,
    },
    "glm_moe_dsa": {"rope_parameters": _ROPE},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_oss": {"layer_types": SLIDING[:NUM_LAYERS]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hunyuan": {"use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2}
    | {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 100.0}},
    "iquestloopcoder": {"loop_window_size": WINDOW},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 3,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_expand": 2,
        "mamba_dt_rank": 8,
    },
    "kimi_k3": _KIMI
    | {
        "model_type": "kimi_linear",
        "hidden_act": "situ",
        "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0,
        "mla_use_nope": True,
        "mla_use_output_gate": True,
        "routed_expert_hidden_size": 32,
        "latent_moe_use_norm": True,
        "attn_res_block_size": 2,
    },
    "kimi_linear": _KIMI,
    "laguna": {"partial_rotary_factor": None, "rope_parameters": None, "gating": True},
    "lfm2": {
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 128,
        "layer_types": ["conv", "conv", "full_attention"] * 2 + ["conv"],
    },
    "lfm2_moe": {
        "use_expert_bias": True,
        "layer_types": ["conv", "conv", "full_attention"] * 2 + ["conv"],
    },
    "lille-130m": {"block_size": 1000},
    "llama4": {"interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    "llama4_text": {"no_rope_layers": [1, 1, 0, 1, 1, 0, 1]},
    "longcat_flash": _NGRAM | {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "longcat_flash_ngram": _NGRAM
    | {
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 4,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mamba": {"time_step_rank": 8},
    "mamba2": {
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": "auto",
        "num_heads": 8,
        "tie_word_embeddings": True,
    },
    "mellum": {"rope_parameters": _ROPE_BY_TYPE},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 0, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "minicpm3": {
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 8,
            "short_factor": [1.1] * 4,
            "long_factor": [1.2] * 4,
        }
    },
    "minimax": {"rotary_dim": 8},
    "minimax_m3_vl": {
        "moe_layer_freq": [0, 1, 1, 1, 1, 1, 1],
        "index_block_size": 2,
        "index_topk_blocks": 2,
        "layer_types": ["full_attention", "sparse", "sparse"] * 2 + ["sparse"],
    },
    "ministral3": {
        "rope_parameters": _ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4}
    },
    "mistral4": {
        "rope_parameters": _ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4}
    },
    "muse_glimmer": {"rope_parameters": None},
    "muse_spark": {
        "post_norm_eps": 1e-8,
        "rope_parameters": _ROPE,
        "layer_rope_theta": [10000.0, 10000.0, 0.0] * 2 + [10000.0],
        "final_logit_softcapping": 20.0,
        "output_multiplier": 0.2,
        "moe_hidden_size": 32,
        "num_shared_experts": 0,
    },
    "nanbeige": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"n_heads_in_group": 2, "no_op": i == 2, "replace_with_linear": i == 4},
                "ffn": {"ffn_mult": 2.0, "no_op": i == 3, "replace_with_linear": i == 5},
            }
            for i in range(NUM_LAYERS)
        ]
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M*-MEM*",
        "layer_types": None,
        "time_step_limit": [0.0, 100.0],
        "mamba_num_heads": 8,
    },
    "olmo": {"mlp_hidden_size": 128},
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2 + ["linear_attention"],
        "linear_allow_neg_eigval": True,
        "linear_num_key_heads": 4,
    },
    "openelm": {
        "ffn_dim_divisor": 8,
        "num_query_heads": [4] * NUM_LAYERS,
        "num_kv_heads": [2] * NUM_LAYERS,
        "ffn_multipliers": [1.0, 2.0] * 3 + [1.0],
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "gegelu_limit": 20.0,
        "vocab_size": 100352,  # writes to fixed rows of the logits
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 2,
    },
    "phimoe": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.1] * 8,
            "long_factor": [1.2] * 8,
            "short_mscale": 1.1,
            "long_mscale": 1.2,
        }
    },
    "phixtral": {"rotary_dim": 8},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"full_attention_idx": [4], "mamba_step": 2},
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_next": {"full_attention_interval": 3},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "block_types": ["recurrent", "recurrent", "attention"],
        "num_key_value_heads": 1,
    },
    "smollm3": {"no_rope_layer_interval": 3, "layer_types": None},
    "spark2_5": {"rope_parameters": _ROPE_BY_TYPE},
    "stablelm": {"use_qkv_bias": True},
    "step3p5": {
        "moe_layers_enum": "2,3,4,5,6",
        "attention_other_setting": {"num_attention_heads": 8, "num_attention_groups": 4, "head_dim": 16},
    },
    "telechat3": {},
}

# The models that wrap a text model: the module and class of its arguments.
NESTED: dict[str, tuple[str, str]] = {
    "gemma3": ("gemma3_text", "ModelArgs"),
    "gemma3n": ("gemma3n", "TextConfig"),
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("deepseek_v3", "ModelArgs"),
    "kimi_k3": ("kimi_k3", "TextArgs"),
    "kimi_vl": ("kimi_vl", "TextArgs"),
    "lfm2-vl": ("lfm2", "ModelArgs"),
    "llama4": ("llama4", "TextArgs"),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs"),
    "mistral3": ("ministral3", "ModelArgs"),
    "muse_spark": ("muse_spark", "TextArgs"),
    "pixtral": ("llama", "ModelArgs"),
    "prism_hadamard_qwen35": ("qwen3_5", "TextModelArgs"),
    "qwen2_vl": ("qwen2", "ModelArgs"),
    "qwen3_5": ("qwen3_5", "TextModelArgs"),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "qwen3_vl": ("qwen3", "ModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}
_NOT_COMMON = {
    "llama": ("layer_types", "sliding_window"),
    "smollm3": ("layer_types", "sliding_window"),
    "qwen3_5": ("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
}

# Beside text_config.
OUTSIDE: dict[str, Config] = {
    "prism_hadamard_qwen35": {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": f"model.layers.{i}.mlp.down_proj", "block": 0, "embedding": False, "dtype": "float16"}
            for i in range(0, NUM_LAYERS, 2)
        ],
    }
}

# What plain mlx-lm itself cannot build or run on a CPU.
NO_BASELINE = {
    "bitnet": "its kernel has no CPU form",
    "olmo": "it needs the package ai2-olmo",
    "muse_spark": "its kernel has no CPU form",
}


def module_names() -> list[str]:
    """Every module of mlx_lm.models that has a Model, by name; a module that cannot be imported counts."""
    names = []
    for found in pkgutil.iter_modules(mlx_lm.models.__path__):
        try:
            module = importlib.import_module(f"mlx_lm.models.{found.name}")
        except (ImportError, SystemExit):
            names.append(found.name)
            continue
        if hasattr(module, "Model"):
            names.append(found.name)
    return sorted(names)


def zoo_config(name: str) -> Config:
    """The tiny config.json of the module `name`; raises KeyError for one without an argument class here."""
    if name not in NESTED:
        return {"model_type": name, **_fields(name, "ModelArgs", SPECIAL.get(name, {}))}
    module, cls = NESTED[name]
    special = SPECIAL.get(name, SPECIAL.get(module, {}))
    text = {"model_type": module, **_fields(module, cls, special)}
    return {"model_type": name, "vocab_size": VOCAB_SIZE, "text_config": text, **OUTSIDE.get(name, {})}


def _fields(module: str, cls: str, special: Config) -> Config:
    arguments = getattr(importlib.import_module(f"mlx_lm.models.{module}"), cls)
    skipped = _NOT_COMMON.get(module, ())
    names = [field.name for field in dataclasses.fields(arguments) if field.name not in skipped]
    return {key: COMMON[key] for key in names if key in COMMON} | special
