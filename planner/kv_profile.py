"""What one session keeps per layer between tokens: the caches that mlx-lm's modules make. Pure.

Widths are read off the layer's own tensors where they show them (the rows of k_proj and v_proj, the
channels of a convolution), else from config.json. KVCache grows in steps of 256 tokens; RotatingKVCache
holds its window, and on top of it a prefill chunk while a prompt is read (mlx_lm/models/cache.py).
Recurrent states count as float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.states import is_recurrent, keeps_both, state_elements
from planner.windows import window_of

KV_STEP_TOKENS = 256
PREFILL_CHUNK_TOKENS = 512  # where nothing says otherwise
STATE_DTYPE_BYTES = 4

Config = Mapping[str, Any]  # flat: the text part of config.json
Shapes = Mapping[str, tuple[int, ...]]  # of one layer's tensors, by the name after the layer's index


def in_whole_steps(num_tokens: int) -> int:
    """The places that a cache of so many tokens has, which grows by KV_STEP_TOKENS."""
    return -(-num_tokens // KV_STEP_TOKENS) * KV_STEP_TOKENS


# Modules that cache the compressed latent and the rotary key of multi-head latent attention; a converted
# checkpoint shows it (embed_q), an original one does not. The others expand them to keys and values per
# head.
LATENT_TYPES = frozenset(
    {
        *("bailing_hybrid", "bailing_moe_v3", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
        *("kimi_k2", "kimi_k25", "kimi_k3", "kimi_linear", "kimi_vl", "longcat_flash", "longcat_flash_ngram"),
        "mistral4",
    }
)
_LATENT = "kv_a_proj_with_mqa.weight"
_KEYS = ("k_proj.weight", "c_k.weight", "attn_key.weight")
_VALUES = ("v_proj.weight", "c_v.weight", "attn_value.weight")
_FUSED_QKV = ("qkv", "q_k_v_proj", "c_attn", "query_key_value", "W_pack", "att_proj")
_FUSED_ROWS = ("query_key_value.weight", "qkv_proj.weight", "W_pack.weight", "Wqkv.weight", "wqkv.weight")
KV_HEADS_KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_attention_groups")
HEADS_KEYS = ("num_attention_heads", "n_heads", "n_head", "num_heads", "attention_heads")
HIDDEN_KEYS = ("hidden_size", "d_model", "n_embd", "model_dim", "hidden_dim", "dim")


@dataclass(frozen=True, slots=True)
class CacheProfile:
    """One layer's caches for one session."""

    token_bytes: int = 0  # per cached token
    window: int | None = None  # tokens kept; None: all
    state_bytes: int = 0  # whatever the length
    plain_token_bytes: int = 0  # of quantised caches: per token of the first chunk, before it is quantised
    is_latent: bool = False  # a compressed latent instead of keys and values
    is_expanded: bool = False  # keys and values per head, expanded from such a latent

    @property
    def is_quantized(self) -> bool:
        return self.plain_token_bytes > 0

    def nbytes(self, context: int, chunk_tokens: int = PREFILL_CHUNK_TOKENS) -> int:
        """Bytes for one session of `context` tokens, read in chunks of `chunk_tokens`, at their most."""
        tokens = in_whole_steps(context)
        if self.window is not None:
            tokens = min(tokens, self.window - 1 + chunk_tokens)
        return self.state_bytes + self.token_bytes * tokens

    def read_bytes(self, context: int) -> int:
        """Bytes that one decode step after `context` tokens reads."""
        return self.state_bytes + self.token_bytes * min(context, self.window or context)


def cache_profile(config: Config, index: int, shapes: Shapes, dtype_bytes: int) -> CacheProfile:
    """The caches of layer `index`."""
    if _shares_cache(config, index):
        return CacheProfile()
    state_bytes = STATE_DTYPE_BYTES * state_elements(config, shapes)
    if is_recurrent(shapes) and not keeps_both(shapes):
        return CacheProfile(state_bytes=state_bytes)
    elements = _cached_elements(config, index, shapes) * _num_loops(config)
    has_latent = any(name.endswith(_LATENT) for name in shapes)
    is_latent = has_latent and _caches_latent(config, shapes)
    return CacheProfile(
        elements * dtype_bytes,
        window_of(config, index) if elements else None,
        state_bytes,
        is_latent=is_latent,
        is_expanded=has_latent and not is_latent,
    )


def _cached_elements(config: Config, index: int, shapes: Shapes) -> int:
    """Cached keys and values of one token; 0 for a layer without attention."""
    latents = [shape[0] for name, shape in shapes.items() if name.endswith(_LATENT)]
    if latents:
        indexer = 2 * _rows(shapes, ("indexer.wk.weight",))
        is_latent = _caches_latent(config, shapes)
        return (sum(latents) if is_latent else _expanded_elements(config) * len(latents)) + indexer
    keys, values = _rows(shapes, _KEYS), _rows(shapes, _VALUES)
    if keys:
        return keys + (values or keys) + _rows(shapes, ("index_k_proj.weight",))
    fused, heads = _rows(shapes, _FUSED_ROWS), first_int(config, HEADS_KEYS)
    if heads and fused > heads * head_dim(config):  # queries, keys and values of all heads, in this order
        return fused - heads * head_dim(config)
    is_attention = any(word in name for name in shapes for word in (*_FUSED_QKV, "q_proj."))
    return 2 * _num_kv_heads(config, index) * head_dim(config) if is_attention else 0


def _caches_latent(config: Config, shapes: Shapes) -> bool:
    return any("embed_q" in name for name in shapes) or config.get("model_type") in LATENT_TYPES


def _expanded_elements(config: Config) -> int:
    """Keys and values per head, expanded from the latent."""
    key_dim = first_int(config, ("qk_nope_head_dim",)) + first_int(config, ("qk_rope_head_dim",))
    hidden, heads = first_int(config, HIDDEN_KEYS), first_int(config, HEADS_KEYS, 1)
    value_dim = first_int(config, ("v_head_dim",)) or hidden // heads
    return heads * (key_dim + value_dim)


def _shares_cache(config: Config, index: int) -> bool:
    """True for the last layers of a model that re-use the keys and values of an earlier layer."""
    shared = first_int(config, ("num_kv_shared_layers", "num_kv_reuse_layers"))
    return shared > 0 and index >= first_int(config, ("num_hidden_layers", "num_layers")) - shared


def cache_source(config: Config, index: int) -> int | None:
    """The layer whose cache layer `index` reads: the last one like it that has its own; None: no other's."""
    if not _shares_cache(config, index):
        return None
    window = window_of(config, index)
    own = [i for i in range(index) if not _shares_cache(config, i)]
    return next((i for i in reversed(own) if window_of(config, i) == window), own[-1] if own else None)


def _num_loops(config: Config) -> int:
    """How often the layers run, each time with a cache of their own."""
    keys = {"nanbeige": "num_loops", "iquestloopcoder": "loop_num"}
    key = keys.get(str(config.get("model_type")))
    return 1 if key is None else first_int(config, (key,), 2 if key == "loop_num" else 1)


def _num_kv_heads(config: Config, index: int) -> int:
    if config.get("multi_query") is True:
        return 1
    for key in KV_HEADS_KEYS:
        per_layer = config.get(key)
        if isinstance(per_layer, list) and index < len(per_layer) and isinstance(per_layer[index], int):
            return int(per_layer[index])
    return first_int(config, KV_HEADS_KEYS, first_int(config, HEADS_KEYS, 1))


def head_dim(config: Config) -> int:
    """Elements of one head, at least 1."""
    own = first_int(config, ("head_dim", "hidden_size_per_head"))
    return own or max(1, first_int(config, HIDDEN_KEYS) // first_int(config, HEADS_KEYS, 1))


def _rows(shapes: Shapes, suffixes: Sequence[str]) -> int:
    """Rows of the matrix of that name; the packing of quantised weights leaves rows alone."""
    ends = tuple(f".{suffix}" for suffix in suffixes)
    return next((shape[0] for name, shape in shapes.items() if f".{name}".endswith(ends)), 0)


def first_int(config: Config, keys: Sequence[str], default: int = 0) -> int:
    """The first of `keys` that holds a whole number above 0."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default
