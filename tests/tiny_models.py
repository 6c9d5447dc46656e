"""Tiny random checkpoints of real architectures, in Hugging Face layout with a byte-level tokenizer.

`write_checkpoint` is what every test that needs a model calls; the same arguments always give the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

NUM_BYTES = 256
SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>")
VOCAB_SIZE = 320  # bytes, specials, and rows that no text uses
BOS_ID, EOS_ID, PAD_ID = NUM_BYTES, NUM_BYTES + 1, NUM_BYTES + 2
SLIDING_WINDOW = 5  # short, so that a few tokens go past it

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_DENSE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def _alternating(num_layers: int) -> list[str]:
    return ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(num_layers)]


def tiny_config(arch: str, num_layers: int) -> dict[str, Any]:
    """The config.json of a tiny `arch` with `num_layers` layers."""
    config: dict[str, Any] = {"model_type": arch, "num_hidden_layers": num_layers, **_DENSE}
    if arch == "qwen3":
        config |= {"tie_word_embeddings": True}
    elif arch == "qwen3_moe":
        config |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        }
    elif arch == "gemma3_text":
        config |= {
            "tie_word_embeddings": True,
            "sliding_window": SLIDING_WINDOW,
            "sliding_window_pattern": 3,
            "rope_local_base_freq": 10000.0,
            "query_pre_attn_scalar": 16,
        }
    elif arch == "gpt_oss":
        config |= {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": _alternating(num_layers),
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 4096,
            },
        }
    elif arch == "deepseek_v3":
        config |= {
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 64,
            "q_lora_rank": 64,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "qk_nope_head_dim": 32,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "num_key_value_heads": 4,
        }
    elif arch == "mamba2":
        config |= {
            "num_heads": 8,
            "state_size": 16,
            "layer_norm_epsilon": 1e-5,
            "conv_kernel": 4,
            "n_groups": 2,
            "use_bias": False,
            "use_conv_bias": True,
            "time_step_limit": [0.0, 100.0],
            "time_step_rank": "auto",
            "tie_word_embeddings": True,
        }
    elif arch != "llama":
        raise ValueError(f"no tiny config for {arch!r}")
    return config | {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}


def randomise(model: nn.Module, *, seed: int = 0, dtype: Any = mx.float32) -> None:
    """Fills every floating parameter with reproducible values of a size that keeps activations tame."""
    rng = np.random.default_rng(seed)
    fresh = []
    for name, value in sorted(tree_flatten(model.parameters())):
        if not mx.issubdtype(value.dtype, mx.floating):
            continue
        noise = rng.standard_normal(value.shape, dtype=np.float32)
        if value.ndim == 1:
            noise = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            noise *= 1.0 / np.sqrt(value.shape[-1])
        fresh.append((name, mx.array(noise).astype(dtype)))
    model.update(tree_unflatten(fresh))
    model.eval()
    mx.eval(model.parameters())


def build(config: dict[str, Any], *, seed: int = 0, dtype: Any = mx.float32) -> nn.Module:
    """A random model of `config`, in memory only."""
    model_class, args_class = _get_classes(config=config)
    model = model_class(args_class.from_dict(config))
    if config["tie_word_embeddings"] and hasattr(model, "sanitize") and "gemma3" in config["model_type"]:
        model.sanitize({})  # drops the head, as the absence of its weight does on load
    randomise(model, seed=seed, dtype=dtype)
    return model


def write_checkpoint(
    arch: str,
    directory: Path,
    *,
    num_layers: int,
    quantize: dict[str, Any] | None = None,
    max_shard_bytes: int | None = None,
    unstack_experts: bool = False,
    seed: int = 0,
    dtype: Any = mx.float32,
    overrides: dict[str, Any] | None = None,
) -> Path:
    """Writes config.json, safetensors and a tokenizer into `directory` and returns it.

    quantize: {"bits", "group_size"} and optionally per-layer overrides {"path": {"bits", "group_size"} or
    False}, exactly as the "quantization" entry of config.json has them. max_shard_bytes: several files and an
    index. unstack_experts: one tensor per expert, as Hugging Face stores qwen3_moe. overrides: config.json
    entries.
    """
    config = tiny_config(arch, num_layers) | (overrides or {})
    model = build(config, seed=seed, dtype=dtype)
    if quantize is not None:
        _quantize(model, quantize)
        config["quantization"] = quantize
    weights = dict(tree_flatten(model.parameters()))
    if unstack_experts:
        weights = _unstack(weights)
    mx.eval(list(weights.values()))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    _write_weights(directory, weights, max_shard_bytes)
    write_tokenizer(directory)
    return directory


def _quantize(model: nn.Module, quantize: dict[str, Any]) -> None:
    def predicate(path: str, module: nn.Module) -> Any:
        if path in quantize:
            return quantize[path]
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % quantize["group_size"] == 0

    nn.quantize(model, group_size=quantize["group_size"], bits=quantize["bits"], class_predicate=predicate)


def _unstack(weights: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in weights.items():
        if ".mlp.switch_mlp." in name:
            for expert in range(value.shape[0]):
                out[name.replace(".mlp.switch_mlp.", f".mlp.experts.{expert}.")] = value[expert]
        else:
            out[name] = value
    return out


def _write_weights(directory: Path, weights: dict[str, Any], max_shard_bytes: int | None) -> None:
    if max_shard_bytes is None:
        mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
        return
    parts: list[dict[str, Any]] = [{}]
    for name, value in weights.items():
        if parts[-1] and sum(v.nbytes for v in parts[-1].values()) + value.nbytes > max_shard_bytes:
            parts.append({})
        parts[-1][name] = value
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        mx.save_safetensors(str(directory / file), part, {"format": "mlx"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(v.nbytes for v in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def byte_alphabet() -> list[str]:
    """The printable character that GPT-2's byte-level BPE writes for each byte, in byte order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {b: chr(b) for b in printable}
    rest = (b for b in range(NUM_BYTES) if b not in table)
    table |= {b: chr(NUM_BYTES + i) for i, b in enumerate(rest)}
    return [table[b] for b in range(NUM_BYTES)]


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: token id = byte value; the specials follow."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special_entries = [
        {
            "id": NUM_BYTES + i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, text in enumerate(SPECIALS)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special_entries,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {c: i for i, c in enumerate(byte_alphabet())},
            "merges": [],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[1],
        "pad_token": SPECIALS[2],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
