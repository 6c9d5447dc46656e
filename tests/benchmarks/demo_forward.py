"""The demo model's forward pass in NumPy, float32: an independent reader of its weights, and much faster
on a CPU than MLX's own products. tests/test_quality.py compares it with mlx-lm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Weights = Mapping[str, Floats]


def logits(weights: Weights, config: Mapping[str, Any], tokens: NDArray[np.int32]) -> Floats:
    """tokens (T,) -> (T, vocab). weights: by mlx-lm's names, experts stacked (E, out, in)."""
    embedding = weights["model.embed_tokens.weight"]
    x = embedding[tokens]  # (T, hidden)
    epsilon = config["rms_norm_eps"]
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        own = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
        x = x + _attention(own, config, _norm(x, own["input_layernorm.weight"], epsilon))
        x = x + _experts(own, config, _norm(x, own["post_attention_layernorm.weight"], epsilon))
    return _norm(x, weights["model.norm.weight"], epsilon) @ embedding.T


def losses(weights: Weights, config: Mapping[str, Any], windows: NDArray[np.int32]) -> NDArray[np.float64]:
    """Cross entropy in nats of each token after the first of each window (B, T + 1) -> (B * T,)."""
    found = []
    for window in windows:
        scores = logits(weights, config, window[:-1]).astype(np.float64)
        scores -= scores.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(scores, window[1:, None], axis=-1)[:, 0]
        found.append(np.log(np.exp(scores).sum(axis=-1)) - chosen)
    return np.concatenate(found)


def _norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(epsilon))
    return np.asarray(x / scale * weight, np.float32)


def _rotate(x: Floats, base: float) -> Floats:
    """Rotary positions for (T, dims)."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    left, right = x[:, :half], x[:, half:]
    return np.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


def _attention(own: Weights, config: Mapping[str, Any], x: Floats) -> Floats:
    dims, epsilon, base = config["head_dim"], config["rms_norm_eps"], config["rope_theta"]
    num_heads, num_shared = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys, values = (
        (x @ own[f"self_attn.{name}_proj.weight"].T).reshape(len(x), -1, dims) for name in "qkv"
    )
    queries = _norm(queries, own["self_attn.q_norm.weight"], epsilon)
    keys = _norm(keys, own["self_attn.k_norm.weight"], epsilon)
    is_later = np.triu(np.ones((len(x), len(x)), bool), 1)
    out = np.empty((len(x), num_heads, dims), np.float32)
    for head in range(num_heads):
        shared = head * num_shared // num_heads
        scores = (
            _rotate(queries[:, head], base) @ _rotate(keys[:, shared], base).T / np.float32(np.sqrt(dims))
        )
        scores[is_later] = -np.inf
        out[:, head] = _softmax(scores) @ values[:, shared]
    return np.asarray(out.reshape(len(x), -1) @ own["self_attn.o_proj.weight"].T, np.float32)


def _experts(own: Weights, config: Mapping[str, Any], x: Floats) -> Floats:
    gates = _softmax(x @ own["mlp.gate.weight"].T)  # (T, E)
    best = np.argsort(-gates, axis=-1, kind="stable")[:, : config["num_experts_per_tok"]]
    scores = np.take_along_axis(gates, best, axis=-1)
    scores = scores / scores.sum(axis=-1, keepdims=True)
    out = np.zeros_like(x)
    gate, up, down = (own[f"mlp.switch_mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    for expert in range(config["num_experts"]):
        rows, place = np.nonzero(best == expert)
        inner = x[rows] @ gate[expert].T
        inner = inner / (1 + np.exp(-inner)) * (x[rows] @ up[expert].T)
        out[rows] += inner @ down[expert].T * scores[rows, place, None]
    return out


def _softmax(x: Floats) -> Floats:
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)
