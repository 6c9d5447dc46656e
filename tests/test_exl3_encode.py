"""The encoder of EXL3 tiles: walks that are closed, near to the bound, and packed as decoders read them."""

from __future__ import annotations

import numpy as np
import pytest

from kernels import exl3_encode, exl3_encode_mlx
from kernels.exl3_encode import best_scale, encode_tiles, make_trellis, pack_states
from kernels.exl3_reference import Codebook, decode, positions, states, values


def random_walks(rng: np.random.Generator, num_tiles: int, bits: int) -> np.ndarray:
    """Words of a tile's stream are free: any of them is a closed walk."""
    return rng.integers(-(2**15), 2**15, (num_tiles, 16 * bits)).astype(np.int16)


def gaussian_error(bits: int, codebook: Codebook, num_tiles: int = 3) -> float:
    """Mean squared error for a source of variance 1."""
    source = np.random.default_rng(7).standard_normal((num_tiles, 256)).astype(np.float32)
    scale = np.float32(best_scale(bits, codebook))
    found = encode_tiles(source / scale, bits, codebook)
    return float(np.mean((values(found, codebook).astype(np.float32) * scale - source) ** 2))


def scalar_error(bits: int) -> float:
    """The same for the best uniform grid of 2^bits numbers."""
    source = np.random.default_rng(7).standard_normal(3 * 256)
    grid = np.arange(2**bits) - (2**bits - 1) / 2
    return min(
        float(np.mean((np.abs(source[:, None] - grid * step).min(axis=1)) ** 2))
        for step in np.linspace(0.02, 2.0, 200)
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_packed_states_are_what_the_reference_reads(bits: int) -> None:
    words = random_walks(np.random.default_rng(bits), 5, bits)
    np.testing.assert_array_equal(pack_states(states(words), bits), words)


@pytest.mark.parametrize(("bits", "codebook"), [(2, "mcg"), (3, "3inst"), (4, "mul1"), (8, "mcg")])
def test_a_walk_of_the_codebook_is_found_again(bits: int, codebook: Codebook) -> None:
    """Weights that a walk gives exactly come back exactly, with the walk closed."""
    words = random_walks(np.random.default_rng(bits), 1, bits)
    wanted = values(states(words), codebook).astype(np.float32)
    found = encode_tiles(wanted, bits, codebook)
    np.testing.assert_array_equal(values(found, codebook), wanted)


@pytest.mark.parametrize(("bits", "codebook"), [(1, "mcg"), (3, "mcg"), (5, "3inst")])
def test_walks_are_closed_and_decode_to_what_the_encoder_thought(bits: int, codebook: Codebook) -> None:
    source = np.random.default_rng(3).standard_normal((2, 256)).astype(np.float32)
    found = encode_tiles(source, bits, codebook)
    before = np.roll(found, 1, axis=1).astype(np.uint32)
    np.testing.assert_array_equal(found >> bits, before & ((1 << (16 - bits)) - 1))
    words = pack_states(found, bits)
    np.testing.assert_array_equal(states(words), found)
    tile = decode(words[:1, None, None].reshape(1, 1, -1), codebook)
    np.testing.assert_array_equal(
        tile.reshape(-1)[positions()], make_trellis(bits, codebook).values[found[0]].astype(np.float16)
    )


@pytest.mark.parametrize(("bits", "most"), [(2, 1.20), (3, 1.19), (4, 1.25)])
def test_the_error_is_near_the_bound_and_far_below_a_grids(bits: int, most: float) -> None:
    """Rate and distortion of a Gaussian source: 4^-bits (Shannon)."""
    error = gaussian_error(bits, "mcg")
    assert error < most * 4.0**-bits
    assert error < 0.75 * scalar_error(bits)


def test_the_number_of_threads_changes_nothing() -> None:
    source = np.random.default_rng(5).standard_normal((3, 256)).astype(np.float32)
    np.testing.assert_array_equal(
        encode_tiles(source, 4, "mcg", num_threads=1), encode_tiles(source, 4, "mcg", num_threads=3)
    )


def test_no_tiles_and_wrong_bits() -> None:
    assert encode_tiles(np.empty((0, 256), np.float32), 3, "mcg").shape == (0, 256)
    with pytest.raises(ValueError, match="bits 9: EXL3 has 1 to 8"):
        make_trellis(9, "mcg")


@pytest.mark.long
@pytest.mark.parametrize("bits", [3, 5])
def test_mlx_finds_the_walks_that_numpy_finds(bits: int) -> None:
    """On a CPU, bit for bit; the same source runs on a GPU."""
    source = np.random.default_rng(6).standard_normal((2, 256)).astype(np.float32)
    np.testing.assert_array_equal(
        exl3_encode_mlx.encode_tiles(source, bits, "mcg"), encode_tiles(source, bits, "mcg")
    )


@pytest.mark.long
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_numba_computes_what_numpy_does(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    source = np.random.default_rng(8).standard_normal((2, 256)).astype(np.float32)
    compiled = encode_tiles(source, bits, "mcg")
    monkeypatch.setattr(exl3_encode, "_compiled_search", lambda: None)
    np.testing.assert_array_equal(compiled, encode_tiles(source, bits, "mcg"))
