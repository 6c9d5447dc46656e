"""Tail-biting Viterbi search for EXL3 tiles, in NumPy: the encoder that every machine can run.

A tile of 256 weights is a closed walk through a trellis of 2^16 states; each step shifts `bits` new bits into
the state, and the codebook's value of the state is the weight. A state has 2^bits predecessors, which share
its low 16 - bits bits after the shift; those shared bits are called an edge here. One step of the search is

    cost[state] = best[state >> bits] + (value[state] - weight)^2
    best'[edge] = min over j of cost[j << (16 - bits) | edge]

so that only `best` (2^(16 - bits) floats a step) has to be kept for the way back. The walk is closed by two
searches: one over the `seam`, the weights around the tile's ends, decides the edge there; the other, over the
whole tile, starts and ends at it. Method: QTIP (arXiv 2406.11235), section 3.1 and 4; the format is in
docs/exl3.md. Pure functions of arrays; threads are used inside, results do not depend on their number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import numpy.typing as npt

from kernels.exl3_reference import MAX_BITS, STATE_BITS, TILE_WEIGHTS, Codebook, States, table

Floats = npt.NDArray[np.float32]

MIN_BITS = 1
# The deviation of the values, in units of the source's, at which a Gaussian source loses least.
# As measured for a Gaussian source; the optimum is flat.
BEST_DEVIATION = {1: 0.91, 2: 1.0, 3: 1.064, 4: 1.12, 5: 1.14, 6: 1.18, 7: 1.20, 8: 1.21}
_HISTORY_BYTES = 2**26  # of `best` for the tiles that one thread searches at a time; kept
_kept: list[Floats] = []  # one for each thread that searched at once
_FAR = np.float32(1e30)  # the cost of where a walk may not begin


@dataclass(frozen=True, slots=True)
class Trellis:
    """The codebook as the search reads it.

    values: (65536,) float32, by state. table: the same by (new bits, edge) up to 4 bits, so that the inner
    axis is long in each NumPy call, and by (edge, new bits) from 5 on.
    """

    bits: int
    values: Floats
    table: Floats

    @property
    def num_edges(self) -> int:
        return 1 << (STATE_BITS - self.bits)

    @property
    def num_branches(self) -> int:
        return 1 << self.bits

    @property
    def seam(self) -> int:
        """Weights on each side of the tile's ends that decide the edge: a few times the state's memory."""
        return min(TILE_WEIGHTS // 2, max(32, 96 // self.bits))


@lru_cache(maxsize=8)
def make_trellis(bits: int, codebook: Codebook) -> Trellis:
    """Raises ValueError for bits outside 1..8 or an unknown codebook."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits {bits}: EXL3 has {MIN_BITS} to {MAX_BITS}")
    values = table(codebook).astype(np.float32)
    by_edge = values.reshape(-1, 1 << bits)
    return Trellis(bits, values, np.ascontiguousarray(by_edge.T) if bits <= 4 else by_edge)


def best_scale(bits: int, codebook: Codebook) -> float:
    """What a Gaussian source's deviation is, divided by the deviation that its tiles should have."""
    return BEST_DEVIATION[bits] / float(make_trellis(bits, codebook).values.astype(np.float64).std())


def encode_tiles(tiles: Floats, bits: int, codebook: Codebook, num_threads: int | None = None) -> States:
    """The closed walks nearest to `tiles` (num_tiles, 256) in stream order -> states (num_tiles, 256).

    Near means squared distance. The best of all walks through the edge that the seam chose; that is not
    always the best of all closed walks, but within 1 % of it. Raises ValueError as make_trellis.
    """
    trellis = make_trellis(bits, codebook)
    num_threads = num_threads or os.cpu_count() or 1
    at_once = max(1, _HISTORY_BYTES // ((TILE_WEIGHTS + 1) * trellis.num_edges * 4))
    at_once = min(at_once, max(1, -(-len(tiles) // num_threads)))
    parts = [tiles[start : start + at_once] for start in range(0, len(tiles), at_once)]
    with ThreadPoolExecutor(num_threads) as pool:
        states = list(pool.map(lambda part: _encode(trellis, part), parts))
    return np.concatenate(states) if states else np.empty((0, TILE_WEIGHTS), np.uint16)


@contextmanager
def _memory(size: int) -> Iterator[Floats]:
    """(size,) or more, kept from one search to the next: fresh pages take a third of the time."""
    try:
        held = _kept.pop()  # a list's pop and append are whole in any thread
    except IndexError:
        held = np.empty(0, np.float32)
    if held.size < size:
        held = np.empty(max(size, _HISTORY_BYTES // 4), np.float32)
    try:
        yield held
    finally:
        _kept.append(held)


def _encode(trellis: Trellis, tiles: Floats) -> States:
    num_tiles, num_edges, seam = len(tiles), trellis.num_edges, trellis.seam
    whole, around = (num_tiles, TILE_WEIGHTS + 1, num_edges), (num_tiles, 2 * seam + 1, num_edges)
    with _memory(prod(whole)) as memory:
        history = memory[: prod(around)].reshape(around)
        history[:, 0] = 0.0
        ends = np.concatenate([tiles[:, -seam:], tiles[:, :seam]], axis=1)
        _search(trellis, ends, history)
        states = _way_back(trellis, ends, history, history[:, -1].argmin(axis=1), seam)
        edge = states[:, seam].astype(np.int64) >> trellis.bits

        history = memory[: prod(whole)].reshape(whole)
        history[:, 0] = _FAR
        history[np.arange(num_tiles), 0, edge] = 0.0
        _search(trellis, tiles, history)
        return _way_back(trellis, tiles, history, edge, 0)


@lru_cache(maxsize=1)
def _compiled_search() -> Callable[[Floats, Floats, Floats], None] | None:
    try:
        from kernels.exl3_encode_jit import search
    except ImportError:
        return None
    found: Callable[[Floats, Floats, Floats], None] = search
    return found


def _search(trellis: Trellis, weights: Floats, history: Floats) -> None:
    """Fills `best` after each step. history: (num_tiles, num_steps + 1, num_edges), its first step filled."""
    num_tiles, num_steps = weights.shape
    branches = trellis.num_branches
    compiled = _compiled_search()
    if trellis.bits <= 4 and compiled is not None:
        compiled(trellis.table.reshape(branches, branches, -1), weights, history)
        return
    cost = np.empty_like(trellis.table)
    by_branch: Floats
    if trellis.bits <= 4:
        by_branch = cost.reshape(branches, branches, -1)  # (new bits, bits that fall out, the rest)
        least = np.empty((branches, trellis.num_edges // branches), np.float32)
        for tile in range(num_tiles):
            best = history[tile]
            by_rest = best.reshape(num_steps + 1, -1, branches)
            for step in range(num_steps):
                np.subtract(trellis.table, weights[tile, step], out=cost)
                np.multiply(cost, cost, out=cost)
                np.add(cost, best[step], out=cost)
                np.minimum.reduce(by_branch, axis=1, out=least)
                by_rest[step + 1] = least.T
        return
    by_branch = cost.reshape(branches, -1)  # (bits that fall out, edge)
    for tile in range(num_tiles):
        best = history[tile]
        for step in range(num_steps):
            np.subtract(trellis.table, weights[tile, step], out=cost)
            np.multiply(cost, cost, out=cost)
            np.add(cost, best[step][:, None], out=cost)
            np.minimum.reduce(by_branch, axis=0, out=best[step + 1])


def _way_back(
    trellis: Trellis, weights: Floats, history: Floats, edge: npt.NDArray[np.int64], stop: int
) -> States:
    """The states of the walks that end in `edge`, from the last step down to step `stop`."""
    num_tiles, num_steps = weights.shape
    states = np.zeros((num_tiles, num_steps), np.uint16)
    row = np.arange(num_tiles)
    fallen = np.arange(trellis.num_branches)[None] << (STATE_BITS - trellis.bits)
    for step in range(num_steps - 1, stop - 1, -1):
        state = fallen | edge[:, None]  # (num_tiles, num_branches)
        before = state >> trellis.bits
        distance = trellis.values[state] - weights[:, step, None]
        cost = distance * distance + history[row[:, None], step, before]
        chosen = cost.argmin(axis=1)
        states[:, step] = state[row, chosen]
        edge = before[row, chosen]
    return states


def pack_states(states: States, bits: int) -> npt.NDArray[np.int16]:
    """States (..., 256) of closed walks -> the words that EXL3 stores, (..., 16 * bits) int16.

    The stream holds each state's `bits` newest bits, first bit first; its 16-bit word j lies at j ^ 1.
    """
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint16)
    stream = ((states[..., None] >> shifts) & 1).reshape(*states.shape[:-1], 16 * bits, 16)
    words = (stream.astype(np.uint16) << np.arange(15, -1, -1, dtype=np.uint16)).sum(-1, dtype=np.uint16)
    swapped = words.reshape(*words.shape[:-1], -1, 2)[..., ::-1].reshape(words.shape)
    return np.ascontiguousarray(swapped).view(np.int16)
