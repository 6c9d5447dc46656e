"""The search of kernels/exl3_encode.py in MLX's own operations, for many tiles at once: for a GPU.

The same sums in the same order; on a CPU the states are NumPy's bit for bit (a GPU may fuse the
multiplication with the addition). For the thread that owns MLX.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from kernels.exl3_encode import Floats, make_trellis
from kernels.exl3_reference import STATE_BITS, TILE_WEIGHTS, Codebook, States

HISTORY_BYTES = 2**31  # of the costs that one search keeps
_EVERY = 16  # steps that are evaluated together
_FAR = 1e30


def encode_tiles(tiles: Floats, bits: int, codebook: Codebook) -> States:
    """As kernels.exl3_encode.encode_tiles."""
    seam = make_trellis(bits, codebook).seam
    values = mx.array(make_trellis(bits, codebook).values)
    num_edges = 1 << (STATE_BITS - bits)
    at_once = max(1, HISTORY_BYTES // ((TILE_WEIGHTS + 1) * num_edges * 4))
    states = []
    for start in range(0, len(tiles), at_once):
        part = mx.array(tiles[start : start + at_once])
        around = mx.concatenate([part[:, -seam:], part[:, :seam]], axis=1)
        history = _search(values, around, mx.zeros((len(part), num_edges)), bits)
        found = _way_back(values, around, history, mx.argmin(history[-1], axis=1), bits=bits, stop=seam)
        edge = found[:, 0] >> bits
        first = mx.where(mx.arange(num_edges)[None] == edge[:, None], 0.0, _FAR)
        history = _search(values, part, first, bits)
        states.append(np.array(_way_back(values, part, history, edge, bits=bits, stop=0)).astype(np.uint16))
        del history
    return np.concatenate(states) if states else np.empty((0, TILE_WEIGHTS), np.uint16)


def _step(values: mx.array, weight: mx.array, best: mx.array) -> mx.array:
    """values (num_edges, num_branches), weight (B,), best (B, num_edges) -> best after it."""
    num_branches = values.shape[1]
    distance = values - weight[:, None, None]
    cost = distance * distance + best[:, :, None]
    return cost.reshape(len(best), num_branches, -1).min(axis=1)


def _search(values: mx.array, weights: mx.array, first: mx.array, bits: int) -> list[mx.array]:
    by_edge = values.reshape(-1, 1 << bits)
    history = [first.astype(mx.float32)]
    advance = mx.compile(_step) if mx.default_device() == mx.gpu else _step
    for step in range(weights.shape[1]):
        history.append(advance(by_edge, weights[:, step], history[-1]))
        if step % _EVERY == _EVERY - 1:
            mx.eval(history[-_EVERY:])
    mx.eval(history)
    return history


def _way_back(
    values: mx.array, weights: mx.array, history: list[mx.array], edge: mx.array, *, bits: int, stop: int
) -> mx.array:
    """(B, num_steps - stop) states."""
    fallen = (mx.arange(1 << bits) << (STATE_BITS - bits))[None].astype(mx.uint32)
    edge = edge.astype(mx.uint32)
    states = []
    for step in range(weights.shape[1] - 1, stop - 1, -1):
        state = fallen | edge[:, None]  # (B, num_branches)
        before = state >> bits
        distance = values[state] - weights[:, step, None]
        cost = distance * distance + mx.take_along_axis(history[step], before, axis=1)
        chosen = mx.argmin(cost, axis=1)[:, None]
        states.append(mx.take_along_axis(state, chosen, axis=1)[:, 0])
        edge = mx.take_along_axis(before, chosen, axis=1)[:, 0]
        if len(states) % _EVERY == 0:
            mx.eval(edge, states[-_EVERY:])
    return mx.stack(states[::-1], axis=1)
