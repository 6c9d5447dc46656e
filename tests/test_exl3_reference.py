"""The first-principles decoder of EXL3: what is known of the format, by other ways than its own code."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from kernels import exl3_reference as reference
from kernels.exl3_reference import CODEBOOKS, Codebook

RNG = np.random.default_rng(0)


def words(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    return RNG.integers(-(1 << 15), 1 << 15, shape, np.int16)


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_state_is_the_one_before_moved_on_by_its_bits(bits: int) -> None:
    state = reference.states(words(2, 3, 16 * bits)).astype(np.uint32)
    before = np.roll(state, 1, axis=-1)
    assert np.array_equal((before << bits & 0xFFFF) >> bits, state >> bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_states_are_windows_of_one_large_number(bits: int) -> None:
    (tile,) = words(1, 16 * bits)
    number = int.from_bytes(tile.view("<u4").astype(">u4").tobytes(), "big")  # the first bit is the highest
    size = 256 * bits
    twice = number << size | number
    for t, state in enumerate(reference.states(tile).tolist()):
        end = (t + 1) * bits + (size if (t + 1) * bits < 16 else 0)
        assert state == twice >> (2 * size - end) & 0xFFFF


def test_every_place_of_a_tile_is_taken_once_and_the_first_are_those_of_the_format() -> None:
    places = reference.positions()
    assert sorted(places) == list(range(256))
    assert [divmod(p, 16) for p in places[:8].tolist()] == [
        *((0, 0), (1, 0), (8, 0), (9, 0), (0, 8), (1, 8), (8, 8), (9, 8))
    ]
    assert divmod(int(places[8]), 16) == (2, 0)
    assert divmod(int(places[32]), 16) == (0, 1)


def exact(state: int, codebook: Codebook) -> np.float16:
    """One value, in Python's integers and exact fractions of two, rounded once."""
    if codebook == "mul1":
        total = sum((state * 0x83DCD12D % 2**32).to_bytes(4, "little"))
        scale, offset = (float(np.array(w, np.uint16).view(np.float16)) for w in (0x1EEE, 0xC931))
        return np.float16((1024 + total) * scale + offset)  # exact in float64
    product = state * 89226354 + 64248484 if codebook == "3inst" else state * 0xCBAC1FED
    word = (product % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
    low, high = (float(np.array(part, np.uint16).view(np.float16)) for part in (word & 0xFFFF, word >> 16))
    return np.float16(low + high)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_codebooks_equal_exact_arithmetic_and_are_nearly_normal(codebook: Codebook) -> None:
    table = reference.table(codebook)
    for state in range(0, 1 << 16, 251):
        assert table[state].view(np.uint16) == exact(state, codebook).view(np.uint16)
    assert abs(float(table.astype(np.float64).mean())) < 0.02
    assert 0.99 < float(table.astype(np.float64).std()) < 1.3


def test_the_rotation_is_its_own_inverse() -> None:
    x = RNG.standard_normal((3, 256))
    assert np.allclose(reference.rotate(reference.rotate(x)), x)


def test_packed_signs_have_the_lowest_bit_first() -> None:
    assert reference.signs(np.array([5, -1], np.int16)).tolist() == [-1, 1, -1, *[1] * 13, *[-1] * 16]


@pytest.mark.parametrize("width", [0, 24, 144, 7])
def test_a_width_that_is_no_number_of_bits_is_refused(width: int) -> None:
    with pytest.raises(
        ValueError, match=rf"a trellis \(8, 8, {width}\) has {width} words a tile; EXL3 has 16 K"
    ):
        reference.bits_of((8, 8, width))


def test_a_known_stream_keeps_its_weights() -> None:
    """Bits of a decoded tensor, so that no change to the decoder passes unseen."""
    stream = (np.arange(4 * 48, dtype=np.int64) * 40503 % 65536).astype(np.uint16).view(np.int16)
    found = {
        book: hashlib.sha256(reference.decode(stream.reshape(2, 2, 48), book).tobytes()).hexdigest()[:16]
        for book in CODEBOOKS
    }
    assert found == {"3inst": "54c932df36529877", "mcg": "1735987d96319615", "mul1": "cba2b011ca77fcab"}
