"""What plain mlx-lm answers on one machine: the reference that every ring is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from cluster.room import DEFAULT_PREFILL_CHUNK


@lru_cache(maxsize=2)
def _model(directory: Path) -> Any:
    return load_model(directory)[0]


def greedy(
    directory: Path, prompt: Sequence[int], max_tokens: int, *, chunk: int = DEFAULT_PREFILL_CHUNK
) -> tuple[list[int], list[float]]:
    """mlx-lm's own greedy tokens, and the float32 log-probability of each; asked again, as before."""
    tokens, logprobs = _greedy(directory, tuple(prompt), max_tokens, chunk)
    return list(tokens), list(logprobs)


@lru_cache(maxsize=256)
def _greedy(
    directory: Path, prompt: tuple[int, ...], max_tokens: int, chunk: int
) -> tuple[list[int], list[float]]:
    return greedy_of(_model(directory), prompt, max_tokens, chunk=chunk)


def greedy_of(
    model: Any, prompt: Sequence[int], max_tokens: int, *, chunk: int = DEFAULT_PREFILL_CHUNK
) -> tuple[list[int], list[float]]:
    """As `greedy`, of a model that is in memory."""
    tokens, logprobs = [], []
    steps = generate_step(mx.array(list(prompt)), model, max_tokens=max_tokens, prefill_step_size=chunk)
    for token, logprob in steps:
        tokens.append(int(token))
        logprobs.append(float(logprob[int(token)].item()))
    return tokens, logprobs
