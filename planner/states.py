"""The states of fixed size that recurrent and convolutional layers keep, read off their tensors. Pure.

Covers mamba and mamba2, gated delta networks, Kimi and Bailing linear attention, RWKV-7, RG-LRU and short
convolutions as mlx-lm 0.32 builds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]  # of one layer's tensors, by the name after the layer's index

SCAN_TOKENS = 256

_STATE_KEYS = ("state_size", "ssm_state_size", "mamba_d_state", "d_state")
_DELTA_KEYS = ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")


def is_recurrent(shapes: Shapes) -> bool:
    """True for a layer that keeps a state of fixed size."""
    return bool(
        _convolutions(shapes) or _find(shapes, "A_log") or _is_rwkv(shapes) or _is_gated_linear(shapes)
    )


def keeps_both(shapes: Shapes) -> bool:
    """True for a layer with a recurrent and an attention part side by side."""
    return any("mamba" in name for name in shapes) and any("self_attn." in name for name in shapes)


def state_elements(config: Mapping[str, Any], shapes: Shapes) -> int:
    """Elements of the layer's states for one session; 0 for plain attention."""
    short = [
        shape for name, shape in shapes.items() if name.endswith(("conv_k", "conv_v")) and len(shape) == 5
    ]
    if short:  # baichuan_m1: the last key and value before the convolution over them
        return sum(shape[2] for shape in short) * _head_dim(config)
    if not is_recurrent(shapes):
        return 0
    if _is_rwkv(shapes):  # two shifted hidden states, one matrix a head
        hidden = _int(config, "hidden_size")
        return 2 * hidden + hidden * _int(config, "head_dim")
    kept = sum(channels * (width - 1) for channels, width in _convolutions(shapes))
    return kept + _matrix_elements(config, shapes)


def scratch_elements(shapes: Shapes, state: int) -> int:
    """float32 elements that a prefill chunk takes beside the outputs of the layer's linears; an upper
    bound.

    mamba2's scan (mlx_lm/models/ssm.py) works on 256 tokens at a time: it multiplies the state with each
    of them, which copies it, and builds about a dozen matrices of 256 x 256 a head. The others hold some
    states at once.
    """
    decay = _find(shapes, "A_log")
    if decay is not None and len(decay) == 1 and _find(shapes, "in_proj.weight"):
        return SCAN_TOKENS * state + 12 * decay[0] * SCAN_TOKENS**2
    return 16 * state


def _matrix_elements(config: Mapping[str, Any], shapes: Shapes) -> int:
    """The recurrent state beside the convolution's."""
    if _is_gated_linear(shapes):
        rows = _first(shapes, "query_key_value.weight")[0]
        return rows // 3 * _head_dim(config)
    decay = _find(shapes, "A_log")
    if decay is None:
        return math.prod(_find(shapes, "recurrent_param") or (0,))
    if len(decay) == 2:  # mamba: (inner, state)
        return decay[0] * decay[1]
    if _find(
        shapes, "in_proj.weight"
    ):  # mamba2: in_proj gives gate, convolved channels and one step size a head
        channels = sum(c for c, _ in _convolutions(shapes))
        inner = _first(shapes, "in_proj.weight")[0] - channels - decay[0]
        if _find(shapes, "bcdt_proj.weight"):  # plamo2 convolves the inner channels alone
            inner = channels
        return inner * next((_int(config, key) for key in _STATE_KEYS if _int(config, key)), 0)
    if all(_int(config, key) for key in _DELTA_KEYS):
        return math.prod(_int(config, key) for key in _DELTA_KEYS)
    width = next((c for c, _ in _convolutions(shapes)), 0)  # Kimi: one square matrix a head
    width = width // 3 if _find(shapes, "qkv_conv.conv.weight") else width
    heads = _first(shapes, ".b_proj.weight")[0]
    return width * width // max(heads, 1)


def _convolutions(shapes: Shapes) -> list[tuple[int, int]]:
    """(channels, width) of each causal convolution.

    Stored as (channels, width, 1) or (channels, 1, width).
    """
    return [
        (shape[0], max(shape[1], shape[2]))
        for name, shape in shapes.items()
        if "conv" in name and name.endswith(".weight") and len(shape) == 3
    ]


def _is_rwkv(shapes: Shapes) -> bool:
    return _find(shapes, "attn.x_r") is not None


def _is_gated_linear(shapes: Shapes) -> bool:
    """Bailing's lightning attention has a gate beside its fused projection, its full attention has not."""
    names = ("attention.query_key_value.weight", "attention.g_proj.weight")
    return all(_find(shapes, name) is not None for name in names)


def _find(shapes: Shapes, suffix: str) -> tuple[int, ...] | None:
    return next((shape for name, shape in shapes.items() if name.endswith(suffix)), None)


def _first(shapes: Shapes, suffix: str) -> tuple[int, ...]:
    return _find(shapes, suffix) or (0,)


def _head_dim(config: Mapping[str, Any]) -> int:
    return _int(config, "head_dim") or _int(config, "hidden_size") // max(
        _int(config, "num_attention_heads"), 1
    )


def _int(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
