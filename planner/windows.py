"""Which layers of which architectures attend to a sliding window only, as mlx-lm's modules cache them. Pure.

A module that is not named here keeps all tokens whatever its config.json says of windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By `layer_types`; the number is the period of the module's own default, in which the last layer is full.
# 0: all full.
_BY_LAYER_TYPES = {
    **dict.fromkeys(("afmoe", "exaone_moe", "gear", "gemma3n", "laguna", "llama", "mellum", "ministral3"), 0),
    "gemma4": 5,
    "gemma4_text": 5,
    "gpt_oss": 2,
    "muse_glimmer": 4,
    "muse_spark": 4,
    "olmo3": 4,
    "spark2_5": 4,
    "step3p5": 2,
}
# By `sliding_window_pattern`: every so many layers the last is full. The number is the module's default.
_BY_PATTERN = {"gemma3": 6, "gemma3_text": 6, "cohere2": 4, "plamo3": 8}
_WINDOW_KEYS = ("sliding_window", "sliding_window_size", "attention_window_size", "window_size")


def window_of(config: Mapping[str, Any], index: int) -> int | None:
    """Tokens that the attention of layer `index` keeps, or None for all. `config` is flat."""
    return _window(config) if _is_sliding(config, index) else None


def _is_sliding(config: Mapping[str, Any], index: int) -> bool:
    kind, pattern = config.get("model_type"), config.get("sliding_window_pattern")
    if kind in _BY_LAYER_TYPES:
        types = config.get("layer_types")
        if isinstance(types, list) and index < len(types):
            return bool(types[index] == "sliding_attention")
        period = _BY_LAYER_TYPES[kind]
        return period > 0 and (index + 1) % period != 0
    if kind in _BY_PATTERN:
        period = pattern if isinstance(pattern, int) and pattern > 0 else _BY_PATTERN[kind]
        return (index + 1) % period != 0
    match kind:
        case "exaone4":
            return isinstance(pattern, str) and pattern[index % len(pattern)] == "L"
        case "mimo_v2_flash":
            hybrid = config.get("hybrid_layer_pattern")
            return isinstance(hybrid, list) and index < len(hybrid) and hybrid[index] == 1
        case "baichuan_m1":
            return index in (config.get("sliding_window_layers") or ())
        case "recurrent_gemma":
            return True
    return False


def _window(config: Mapping[str, Any]) -> int | None:
    for key in _WINDOW_KEYS:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
