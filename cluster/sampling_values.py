"""Which values a request may ask its tokens to be drawn with. Pure."""

from __future__ import annotations

import math

from proto import ring_pb2

GREEDY_BELOW = 1e-5  # a temperature under this is 0, as in vLLM: its reciprocal would overflow
MAX_PENALTY = 2.0  # of presence and frequency, either sign (OpenAI API reference)
MAX_BIAS = 100.0  # either sign (OpenAI API reference)


def validate(spec: ring_pb2.Sampling, vocab_size: int) -> None:
    """Raises ValueError naming field, value and limit for anything out of range or not finite."""
    limits = (
        ("temperature", spec.temperature, 0.0, math.inf),
        ("top_p", spec.top_p, 0.0, 1.0),
        ("min_p", spec.min_p, 0.0, 1.0),
        ("repetition_penalty", spec.repetition_penalty, 0.0, math.inf),
        ("presence_penalty", spec.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
        ("frequency_penalty", spec.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
    )
    for field, value, low, high in limits:
        _check_range(field, value, low, high)
    if spec.grammar and spec.min_tokens:
        raise ValueError(
            "min_tokens: with a grammar (response_format) it must be 0, for that says where an answer ends"
        )
    for token, bias in spec.logit_bias.items():
        if token >= vocab_size:
            raise ValueError(f"logit_bias: token id {token} is not below the vocabulary size {vocab_size}")
        _check_range(f"logit_bias[{token}]", bias, -MAX_BIAS, MAX_BIAS)


def _check_range(field: str, value: float, low: float, high: float) -> None:
    """Raises ValueError unless value is finite and in [low, high]."""
    if not math.isfinite(value) or not low <= value <= high:
        limit = f"from {low:g} to {high:g}" if math.isfinite(high) else f"finite and at least {low:g}"
        raise ValueError(f"{field}: {value:g} is not allowed, it must be {limit}")
