"""Tokens drawn at random for many rows in few operations: each row's is what it gets alone, bit for bit.

No operation looks beyond a row. As `mx.random.categorical` does with one row, it takes the token with the
highest sum of score and Gumbel noise, and the noise is of the row's own key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import mlx.core as mx

Key = tuple[int, int]  # two uint32 words
_NEG_INF = -math.inf


@dataclass(frozen=True, slots=True)
class Odds:
    """What one row draws from. A filter keeps what ties with the least probable token that it keeps."""

    inverse_temperature: float = 1.0
    top_p: float = math.inf  # the smallest set whose mass reaches it; inf: off
    top_k: int = 0  # so many tokens; 0: off, else below the vocabulary's size
    log_min_p: float = _NEG_INF  # this much below the most probable token; -inf: off

    @property
    def cost(self) -> int:
        """What its filters read: 0 each score for itself, 1 the highest ones, 2 all in their order."""
        return 2 if self.top_p < math.inf else int(self.top_k > 0)


def draw_tokens(scores: mx.array, odds: Sequence[Odds], keys: Sequence[Key]) -> mx.array:
    """(B,) uint32 of scores (B, vocab) float32; the rows in the order of their odds' cost."""
    scores = filtered(scores, odds)
    if any(one.inverse_temperature != 1.0 for one in odds):
        scores = scores * _column([one.inverse_temperature for one in odds])
    return mx.argmax(_noise(keys, scores.shape[-1]) + scores, axis=-1)


def filtered(scores: mx.array, odds: Sequence[Odds]) -> mx.array:
    """-inf for what is not to be drawn: top_p of all, then min_p, then top_k of what these left.

    Each of the three is a score below which nothing is kept, so that the highest of them does it all.
    """
    has_min_p = [one.log_min_p > _NEG_INF for one in odds]
    if not odds[-1].cost and not any(has_min_p):
        return scores
    floors, start = [], 0
    for cost, group in groupby(odds, key=lambda one: one.cost):
        alike = list(group)
        rows, start = scores[start : start + len(alike)], start + len(alike)
        floors.append((_no_floors, _top_k_floors, _top_p_floors)[cost](rows, alike))
    floor = mx.concatenate(floors) if len(floors) > 1 else floors[0]
    if any(has_min_p):
        least = mx.max(scores, axis=-1, keepdims=True) + _column([one.log_min_p for one in odds])
        floor = mx.where(mx.array(has_min_p)[:, None], mx.maximum(floor, least), floor)
    return mx.where(scores < floor, _NEG_INF, scores)


def _noise(keys: Sequence[Key], size: int) -> mx.array:
    """(B, size) float32: each row as its key alone gives it."""
    words = mx.array(list(keys), dtype=mx.uint32)
    if len(keys) == 1:  # the same, sooner built
        return mx.random.gumbel((1, size), key=words[0])
    return mx.vmap(lambda key: mx.random.gumbel((size,), key=key))(words)


def _no_floors(scores: mx.array, odds: Sequence[Odds]) -> mx.array:
    """(B, 1)"""
    return mx.full((len(odds), 1), _NEG_INF)


def _top_k_floors(scores: mx.array, odds: Sequence[Odds]) -> mx.array:
    """(B, 1): the top_k-th highest of each row."""
    most = max(one.top_k for one in odds)
    rising = mx.sort(mx.topk(scores, most, axis=-1), axis=-1)
    return mx.take_along_axis(rising, mx.array([[most - one.top_k] for one in odds]), axis=-1)


def _top_p_floors(scores: mx.array, odds: Sequence[Odds]) -> mx.array:
    """(B, 1): the score where the mass from above reaches top_p; or the top_k-th highest, if higher."""
    size = scores.shape[-1]
    rising = mx.sort(scores, axis=-1)
    masses = mx.exp(rising - rising[:, -1:])
    mass_above = mx.cumsum(masses, axis=-1, reverse=True, inclusive=False)
    whole = mass_above[:, :1] + masses[:, :1]
    num_dropped = mx.sum(mass_above >= _column([one.top_p for one in odds]) * whole, axis=-1, keepdims=True)
    if any(one.top_k for one in odds):
        num_beyond = [[size - one.top_k if one.top_k else 0] for one in odds]
        num_dropped = mx.maximum(num_dropped, mx.array(num_beyond))
    return mx.take_along_axis(rising, num_dropped, axis=-1)


def _column(values: list[float]) -> mx.array:
    """(B, 1)"""
    return mx.array(values, dtype=mx.float32)[:, None]
