"""One linear layer into EXL3 tensors: scales, rotation and error feedback around the search for tiles.

A weight W (in, out) is written as diag(suh) H Q H diag(svh) (kernels/exl3_reference.py). The signs in suh and
svh and the rotations H make the numbers that Q stands for look Gaussian, whatever W was; the sizes in suh and
svh are chosen so that their variance is what the codebook codes best. Q is then searched for one row of tiles
(16 input channels) at a time, from the last to the first, each row asked for what it should be *given the
errors of the rows behind it*: with the inputs' covariance H = L D L^T in blocks of 16, the loss tr(E^T H E)
is the sum of the rows' own losses |E_k + sum over j > k of L_jk^T E_j|^2 under D_k (LDLQ: QuIP#, arXiv
2402.04396, section 4; the same feedback as GPTQ's). NumPy alone; all is a function of the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from kernels.exl3_encode import Floats, best_scale, encode_tiles, make_trellis, pack_states
from kernels.exl3_reference import BLOCK, TILE, TILE_WEIGHTS, Codebook, Halves, States, hadamard, positions

Doubles = NDArray[np.float64]
Search = Callable[[Floats, int, Codebook], States]  # encode_tiles, or the same on another device

DAMPING = 0.01  # of the mean of the covariance's diagonal: what the calibration text has not seen
SCALE_POWER = 0.5  # of the input scales that would be best if errors were not fed back


@dataclass(frozen=True, slots=True)
class Encoded:
    """What EXL3 stores of a layer, padded to multiples of 128, and how well it stands for it.

    trellis: (in / 16, out / 16, 16 * bits) int16. suh: (in,), svh: (out,). loss: mean squared error of the
    layer's outputs over their mean square, on the calibration text. error: the same of the weights alone.
    """

    trellis: NDArray[np.int16]
    suh: Halves
    svh: Halves
    loss: float
    error: float


def encode_linear(
    weight: NDArray[Any],
    covariance: NDArray[Any] | None,
    bits: int,
    codebook: Codebook,
    *,
    seed: int,
    search: Search = encode_tiles,
) -> Encoded:
    """weight (out, in); covariance (in, in): sum or mean of x x^T over calibration inputs, None if unknown.

    Raises ValueError for weights that are not finite, or bits that EXL3 has not.
    """
    make_trellis(bits, codebook)
    if not np.isfinite(weight).all():
        raise ValueError("its weights are not finite")
    wide, tall = (-(-size // BLOCK) * BLOCK for size in weight.shape)
    original = np.zeros((tall, wide))  # (in, out)
    original[: weight.shape[1], : weight.shape[0]] = weight.T
    second = _damped(covariance, tall)

    rng = np.random.default_rng(seed)
    sign_in, sign_out = (1.0 - 2.0 * rng.integers(0, 2, size) for size in (tall, wide))
    spread = 1 / best_scale(bits, codebook)
    scale_in = _input_scale(original, second)
    suh = _halves(scale_in * sign_in)
    scale_out = _output_scale(original / suh.astype(np.float64)[:, None], spread)
    svh = _halves(scale_out * sign_out)

    target = _rotated(
        original / suh.astype(np.float64)[:, None] / svh.astype(np.float64)
    )  # what Q stands for
    factor = _feedback(_rotated_covariance(second, suh))
    states, found = _search_rows(target, factor, bits, codebook, search)
    rotated = _rotated(found)
    svh = _refit(original, rotated * suh.astype(np.float64)[:, None], svh, second)
    decoded = rotated * suh.astype(np.float64)[:, None] * svh.astype(np.float64)
    difference = original - decoded
    return Encoded(
        pack_states(states, bits),
        suh,
        svh,
        _ratio(np.sum(difference * (second @ difference)), np.sum(original * (second @ original))),
        _ratio(np.sum(difference**2), np.sum(original**2)),
    )


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0


def _halves(scale: Doubles) -> Halves:
    """As float16, within what it can hold and never 0."""
    size = np.clip(np.abs(scale), 2.0**-14, 60000.0)
    return cast(Halves, np.copysign(size, scale).astype(np.float16))


def _damped(covariance: NDArray[Any] | None, size: int) -> Doubles:
    """(size, size) with a mean of 1 on the diagonal; the identity where nothing was seen."""
    if covariance is None or not np.trace(covariance) > 0:
        return np.eye(size)
    seen = np.zeros((size, size))
    seen[: len(covariance), : len(covariance)] = covariance
    seen *= len(covariance) / np.trace(seen)
    return seen + DAMPING * np.eye(size)


def _rotated(matrix: Doubles) -> Doubles:
    """H M H: blocks of 128 channels on both sides."""
    turn = hadamard()
    rows, columns = matrix.shape
    blocks = matrix.reshape(rows, -1, BLOCK) @ turn
    blocks = turn @ blocks.reshape(-1, BLOCK, columns)
    return cast(Doubles, blocks.reshape(rows, columns))


def _rotated_covariance(second: Doubles, suh: NDArray[Any]) -> Doubles:
    scale = suh.astype(np.float64)
    return _rotated(second * scale[:, None] * scale)


def _input_scale(original: Doubles, second: Doubles) -> Doubles:
    """(in,) positive, mean square 1: a power of the scales that would be best without feedback.

    Errors are equal for all channels after the rotation, so channel i gets its share of them times a_i^2,
    and its weights take sum(w_i^2) / a_i^2 of the variance; a_i^4 = sum(w_i^2) / H_ii is the best of both.
    With feedback a power between 0.25 and 0.75 was best for every layer that was tried, and flat between.
    """
    energy = np.mean(original**2, axis=1)
    used = energy > 0
    best = np.ones(len(energy))
    best[used] = np.sqrt(np.sqrt(energy[used] / np.diag(second)[used]))
    best[~used] = best[used].min() if used.any() else 1.0
    scale = np.clip(best, np.median(best) / 30, np.median(best) * 30) ** SCALE_POWER
    return cast(Doubles, scale / np.sqrt(np.mean(scale**2)))


def _output_scale(scaled: Doubles, spread: float) -> Doubles:
    """(out,) positive: with it, each 128 columns of the rotated weight have the deviation `spread`.

    Within 128 columns b_o^2 goes with the column's own deviation: an error of one size in the rotated weight
    becomes b_o^2 in column o, the variance to encode is the mean of w_o^2 / b_o^2, so their product is least.
    """
    deviation = np.sqrt(np.mean(scaled**2, axis=0))
    scale = np.sqrt(np.maximum(deviation, 1e-3 * deviation.max(initial=0.0)))
    scale[scale == 0] = 1.0
    variance = np.mean((deviation / scale).reshape(-1, BLOCK) ** 2, axis=1)
    variance[variance == 0] = spread**2
    return cast(Doubles, scale * np.repeat(np.sqrt(variance), BLOCK) / spread)


def _feedback(second: Doubles) -> Doubles:
    """L of L D L^T in blocks of 16: unit lower triangular, (in, in)."""
    lower = np.linalg.cholesky(second)
    factor = np.empty_like(lower)
    for start in range(0, len(lower), TILE):
        rows = slice(start, start + TILE)
        factor[:, rows] = lower[:, rows] @ np.linalg.inv(lower[rows, rows])
    return factor


def _search_rows(
    target: Doubles, factor: Doubles, bits: int, codebook: Codebook, search: Search
) -> tuple[States, Doubles]:
    """States (in / 16, out / 16, 256), and the Q that they decode to (in, out)."""
    rows, columns = target.shape
    values = make_trellis(bits, codebook).values
    states = np.empty((rows // TILE, columns // TILE, TILE_WEIGHTS), np.uint16)
    found = np.empty_like(target)
    errors = np.zeros_like(target)
    for row in range(rows // TILE - 1, -1, -1):
        here, behind = slice(row * TILE, (row + 1) * TILE), slice((row + 1) * TILE, rows)
        wanted = target[here] + factor[behind, here].T @ errors[behind]
        states[row] = search(_to_stream(wanted).astype(np.float32), bits, codebook)
        found[here] = _from_stream(values[states[row]])
        errors[here] = target[here] - found[here]
    return states, found


def _to_stream(row: Doubles) -> Doubles:
    """(16, out) to (out / 16, 256): tiles in the order of the stream."""
    tiles = row.reshape(TILE, -1, TILE).swapaxes(0, 1).reshape(-1, TILE_WEIGHTS)
    return tiles[:, positions()]


def _from_stream(tiles: Floats) -> Doubles:
    by_row = np.empty(tiles.shape)
    by_row[:, positions()] = tiles
    return by_row.reshape(-1, TILE, TILE).swapaxes(0, 1).reshape(TILE, -1)


def _refit(original: Doubles, unscaled: Doubles, svh: Halves, second: Doubles) -> Halves:
    """svh with each column's size such that its loss is least, given Q; 0 for a column of zeros."""
    weighted = second @ unscaled
    own = np.sum(unscaled * weighted, axis=0)
    fit = np.divide(np.sum(original * weighted, axis=0), own, out=np.zeros_like(own), where=own > 0)
    before = svh.astype(np.float64)
    is_near = (fit / before > 0.5) & (fit / before < 2.0)
    found = _halves(np.where(is_near, fit, before))
    found[~original.any(axis=0)] = 0
    return found
