"""Makes a model's config tiny without touching its shape: same layers, same pattern, small widths.

Pure functions of the config. `recipes` yields candidates from the smallest to the least changed; which of
them an architecture accepts is found by building it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

Config = dict[str, Any]
Rule = Callable[[int], int]

TINY = "tiny"  # the name of the smallest recipe
VOCAB_SIZE = 128
HIDDEN_SIZE = 64
HEAD_DIM = 16
ROPE_HEAD_DIM = 8
WINDOW = 5  # shorter than the proof's prompt
NUM_EXPERTS = 4
SCALE_LIMIT = 64

_VOCAB = ("vocab_size", "vocab_size_per_layer_input", "num_vocab", "embedding_size")
_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "window_size",
    "window_length",
    "attention_chunk_size",
    "index_topk",
)
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "model_dim", "hidden_dim", "block_dim")
_HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "num_query_heads",
    "swa_num_attention_heads",
    "num_swa_attention_heads",
    "linear_num_value_heads",
    "mamba_n_heads",
    "mamba_num_heads",
)
_KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "kv_n_heads",
    "num_attention_groups",
    "swa_num_key_value_heads",
    "num_swa_key_value_heads",
    "num_global_key_value_heads",
    "linear_num_key_heads",
    "n_groups",
    "mamba_n_groups",
)
_HEAD_DIMS = (
    "head_dim",
    "kv_channels",
    "hidden_size_per_head",
    "qk_nope_head_dim",
    "v_head_dim",
    "swa_head_dim",
    "swa_v_head_dim",
    "global_head_dim",
    "index_head_dim",
    "mamba_d_head",
    "mamba_head_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
)
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)


def _at_most(limit: int) -> Rule:
    return lambda value: min(value, limit)


def _table(entries: list[tuple[tuple[str, ...], Rule]]) -> dict[str, Rule]:
    return {key: rule for keys, rule in entries for key in keys}


_WINDOW_RULES = _table(
    [
        (_WINDOWS, _at_most(WINDOW)),
        (("compress_ratios",), _at_most(4)),  # tokens to a compressed group: several must fit the prompt
        (
            ("candidate_topk_blocks", "candidate_block_size", "index_block_size", "index_topk_blocks"),
            _at_most(2),
        ),
        (("sparse_block_size", "sparse_topk_blocks"), _at_most(2)),
        (("loop_window_size",), _at_most(WINDOW)),
    ]
)
_COUNT_RULES = _table(
    [
        (_VOCAB, _at_most(VOCAB_SIZE)),
        (_EXPERTS, _at_most(NUM_EXPERTS)),
        (_EXPERTS_PER_TOKEN, _at_most(2)),
        (
            ("n_group", "num_expert_group", "n_shared_experts", "num_shared_experts", "zero_expert_num"),
            _at_most(2),
        ),
        (("topk_group",), _at_most(1)),
    ]
)
_WIDTH_RULES = _table(
    [
        (_HIDDEN, _at_most(HIDDEN_SIZE)),
        (_HEADS, _at_most(4)),
        (_KV_HEADS, _at_most(2)),
        (_HEAD_DIMS, _at_most(HEAD_DIM)),
        (("qk_rope_head_dim", "rotary_dim"), _at_most(ROPE_HEAD_DIM)),
        (("qk_head_dim",), _at_most(HEAD_DIM + ROPE_HEAD_DIM)),
        (("index_n_heads", "n_heads_in_group", "o_groups"), _at_most(2)),
        (
            ("kv_lora_rank", "q_lora_rank", "o_lora_rank", "routed_expert_hidden_size", "moe_hidden_size"),
            _at_most(32),
        ),
        (("state_size", "ssm_state_size", "mamba_d_state", "hidden_size_per_layer_input"), _at_most(16)),
        (("time_step_rank", "mamba_dt_rank", "laurel_rank"), _at_most(8)),
        (("a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"), _at_most(16)),
        (("mamba_d_ssm",), _at_most(4 * HEAD_DIM)),
        (("moe_latent_size",), _at_most(32)),
        (("d_ff", "ffn_dim", "n_inner", "block_ff_dim", "share_expert_dim"), _at_most(128)),
    ]
)
_PACKED = ("prism_hadamard_qwen35",)  # there is no other form of its weights
_FIXED_VOCAB = ("phi3small",)  # writes to fixed rows of the logits, unchecked
_UNTOUCHED = (
    "rope",
    "vision",
    "audio",
    "image",
    "quantization",
    "compression",
)  # starts of keys of nested dicts


def recipes(config: Config) -> Iterator[tuple[str, Config]]:
    """(name, smaller config), from the tiniest to the least changed; the layers stay as they are."""
    dropped = () if config.get("model_type") in _PACKED else ("quantiz", "compression")
    plain = {k: v for k, v in copy.deepcopy(config).items() if not k.startswith(dropped)}
    if plain.get("model_type") in _FIXED_VOCAB:
        yield TINY, _tiny(plain) | {"vocab_size": plain["vocab_size"]}
        return
    yield TINY, _tiny(plain)
    yield "scaled", _scaled(plain)
    yield "few experts", _apply(plain, _WINDOW_RULES | _COUNT_RULES)
    yield "short windows", _apply(plain, _WINDOW_RULES)


def _apply(config: Config, rules: dict[str, Rule]) -> Config:
    """`config` with the rules applied to the integers (or lists of them) under their keys, nested too."""
    return {key: _apply_to(value, key, rules) for key, value in config.items()}


def _apply_to(value: Any, key: str, rules: dict[str, Rule]) -> Any:
    if isinstance(value, dict):
        return value if key.startswith(_UNTOUCHED) else _apply(value, rules)
    if isinstance(value, list):
        return [_apply_to(item, key, rules) for item in value]
    rule = rules.get(key)
    if rule is None and rules.keys() >= _WIDTH_RULES.keys():
        rule = _ffn_rule(key)
    if rule is None or type(value) is not int or value <= 0:
        return value
    return rule(value)


def _ffn_rule(key: str) -> Rule | None:
    if "intermediate_size" in key or "ffn_hidden_size" in key or "mlp_hidden_size" in key:
        return _at_most(64 if "moe" in key or "expert" in key else 128)
    return None


def _tiny(config: Config) -> Config:
    """Every known width small, in proportions that attention, rope and expert groups accept."""
    out = _apply(config, _WINDOW_RULES | _COUNT_RULES | _WIDTH_RULES)
    for part, original in zip(_parts(out), _parts(config), strict=True):
        _fit_heads(part, original)
        _fit_rope(part, original)
    return out


def _parts(config: Config) -> list[Config]:
    """The config and those of its nested dicts that describe layers."""
    nested = [v for k, v in config.items() if isinstance(v, dict) and not k.startswith(_UNTOUCHED)]
    return [config, *(part for child in nested for part in _parts(child))]


def _fit_heads(part: Config, original: Config) -> None:
    """As many query heads per key head as before, up to two; hidden_size = heads x head_dim as before."""
    for heads_key, kv_key in _head_pairs(original):
        heads, kv_heads = original[heads_key], original.get(kv_key, original[heads_key])
        if type(heads) is int and type(kv_heads) is int and kv_heads > 0:
            groups = min(kv_heads, 2)
            part[heads_key] = groups * min(max(heads // kv_heads, 1), 2)
            if kv_key in part:
                part[kv_key] = groups
    name = next((key for key in _HEADS if type(original.get(key)) is int), None)
    hidden = next((key for key in _HIDDEN if type(original.get(key)) is int), None)
    if name is None or hidden is None:
        return
    head_dim = original.get("head_dim") or original[hidden] // max(original[name], 1)
    if head_dim * original[name] == original[hidden] and name != "num_heads":
        part[hidden] = part[name] * HEAD_DIM
    if "qk_rope_head_dim" in original and original.get("head_dim") == original["qk_rope_head_dim"]:
        part["head_dim"] = part["qk_rope_head_dim"]


def _head_pairs(original: Config) -> Iterator[tuple[str, str]]:
    pairs = {
        "num_attention_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_attention_groups"),
        "n_heads": ("n_kv_heads", "kv_n_heads"),
        "n_head": ("n_kv_heads", "num_kv_heads"),
        "swa_num_attention_heads": ("swa_num_key_value_heads",),
        "num_swa_attention_heads": ("num_swa_key_value_heads",),
        "linear_num_value_heads": ("linear_num_key_heads",),
    }
    for heads_key, kv_keys in pairs.items():
        if heads_key in original:
            yield heads_key, next((key for key in kv_keys if original.get(key) is not None), kv_keys[0])


def _fit_rope(part: Config, original: Config) -> None:
    """Per-dimension rope factors have one entry per pair of rotated dimensions."""
    rotated = int(HEAD_DIM * float(original.get("partial_rotary_factor") or 1.0))
    for key in ("rope_scaling", "rope_parameters"):
        scaling = part.get(key)
        if not isinstance(scaling, dict):
            continue
        part[key] = scaling = copy.deepcopy(scaling)
        for name in ("short_factor", "long_factor"):
            if isinstance(scaling.get(name), list):
                scaling[name] = scaling[name][: rotated // 2]
        if isinstance(scaling.get("mrope_section"), list):
            scaling["mrope_section"] = [rotated // 2 - 4, 2, 2]


def _scaled(config: Config) -> Config:
    """Every width divided by one power of two, so that every ratio stays; heads keep their number."""
    hidden = next((c[k] for c in _parts(config) for k in _HIDDEN if type(c.get(k)) is int), HIDDEN_SIZE)
    factor = 1
    while hidden // (factor * 2) >= SCALE_LIMIT and hidden % (factor * 2) == 0:
        factor *= 2

    def divide(value: int) -> int:
        return value // factor if value % factor == 0 and value // factor >= 2 else value

    heads = {*_HEADS, *_KV_HEADS, "index_n_heads", "n_heads_in_group", "o_groups"}
    widths = {key: divide for key in _WIDTH_RULES if key not in heads}
    ffn = {key: divide for part in _parts(config) for key in part if _ffn_rule(key) is not None}
    return _apply(config, _WINDOW_RULES | _COUNT_RULES | widths | ffn)
