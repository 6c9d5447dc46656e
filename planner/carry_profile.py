"""How many elements of one token cross a cut: a hidden state, and what a few architectures add. Pure.

What crosses is what a layer of mlx-lm's model returns, and, where later layers read the keys and values of
earlier ones, those of the new tokens. `tests/test_zoo_loading.py` compares with the carries of real models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from planner.kv_profile import HEADS_KEYS, KV_HEADS_KEYS, first_int, head_dim
from planner.layer_profile import LayerProfile

Config = Mapping[str, Any]  # flat: the text part of config.json


def carry_bytes(
    flat: Config, layers: Sequence[LayerProfile], hidden_size: int, dtype_bytes: int
) -> tuple[int, ...]:
    """(L + 1,) bytes of one token that cross a cut before each layer; 0 at both ends."""
    num_layers = len(layers)
    shared = [
        sum(
            layers[source].cache.token_bytes
            for source in {
                layer.cache_source
                for layer in layers[cut:]
                if layer.cache_source is not None and layer.cache_source < cut
            }
        )
        for cut in range(num_layers)
    ]
    own = [round(hidden_size * _streams(flat, cut)) + _more(flat) for cut in range(num_layers)]
    inner = [own[cut] * dtype_bytes + shared[cut] for cut in range(1, num_layers)]
    return (0, *inner, 0)


def _streams(flat: Config, cut: int) -> int:
    """Hidden states of a token that go side by side."""
    match flat.get("model_type"):
        case "gemma3n" | "gemma3n_text":
            return first_int(flat, ("altup_num_inputs",), 4)
        case "deepseek_v41":
            return first_int(flat, ("hc_mult",), 4)
        case "kimi_k3" | "kimi_k3_text" if block := first_int(flat, ("attn_res_block_size",)):
            return 1 + ceil(cut / block)  # the stream before each block of layers stays
        case "rwkv7":
            return 2  # the first layer's values go to all layers
        case _:  # of kimi_k3 the stream before each block of layers stays
            block = first_int(flat, ("attn_res_block_size",))
            return 1 + ceil(cut / block) if block else 1


def _more(flat: Config) -> int:
    """Elements of a token beside its hidden states."""
    if flat.get("model_type") != "hunyuan":
        return 0
    heads = first_int(flat, KV_HEADS_KEYS) or first_int(flat, HEADS_KEYS, 1)
    return 2 * heads * head_dim(flat)  # keys and values that the next layer may share
