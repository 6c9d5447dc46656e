"""Latches: a step begins with the numbers that the host wrote, or says that it began without."""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np
import pytest

from shard_loader.host_arrays import HostArrays, Kind, write
from shard_loader.latch import BOUND_S, MAX_NUMBERS, MAX_STRIKES, EmulatedLatch, Latches

KINDS: list[Kind] = [("int32", (1, 1)), ("bfloat16", (1, 1, 2048)), ("uint8", (3, 7))]
needs_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="no NVIDIA GPU is here")
devices = pytest.mark.parametrize("is_emulated", [True, pytest.param(False, marks=needs_cuda)])


def latches_of(host: HostArrays, *, is_emulated: bool) -> Latches:
    return Latches(host, emulated_s=60.0 if is_emulated else None)


def numbers(seed: int) -> list[bytes]:
    random = np.random.default_rng(seed)
    return [random.bytes(4), random.bytes(4096), random.bytes(21)]


def read(arrays: list[mx.array]) -> list[bytes]:
    return [np.array(array.view(mx.uint8)).tobytes() for array in arrays]


@devices
def test_a_step_has_the_numbers_that_are_written_after_it_was_handed_over(*, is_emulated: bool) -> None:
    host = HostArrays(is_kept=not is_emulated)
    latches = latches_of(host, is_emulated=is_emulated)
    for seed in range(20):
        blanks = host.blanks(KINDS)
        latch = latches.of(KINDS)
        assert latch is not None
        given = [mx.contiguous(array) for array in latch.behind(blanks)]
        latch.hand_over(given)
        wanted = numbers(seed)
        latch.open(lambda a=blanks, w=wanted: [write(*pair) for pair in zip(a, w, strict=True)])  # type: ignore[misc]
        assert read(given) == wanted
        assert latch.was_open()
        host.give_back(blanks, KINDS)


@devices
def test_a_step_that_nobody_wants_ends(*, is_emulated: bool) -> None:
    host = HostArrays(is_kept=not is_emulated)
    latches = latches_of(host, is_emulated=is_emulated)
    for _ in range(3):
        blanks = host.blanks(KINDS[:1])
        latch = latches.of(KINDS[:1])
        assert latch is not None
        out = latch.behind(blanks)[0] + 1
        latch.hand_over([out])
        latch.abandon()
        assert out.shape == (1, 1)
        host.give_back(blanks, KINDS[:1])


@needs_cuda
def test_a_step_that_waits_for_too_long_says_so() -> None:
    host = HostArrays(is_kept=True)
    blanks = host.blanks(KINDS[1:2])
    latch = Latches(host).of(KINDS[1:2])
    assert latch is not None
    given = latch.behind(blanks)
    latch.hand_over(given)
    mx.eval(given)  # nobody opens it
    latch.open(functools.partial(write, blanks[0], bytes(4096)))
    assert not latch.was_open()


def test_an_emulated_one_that_is_late_says_so() -> None:
    host = HostArrays(is_kept=False)
    (blank,) = host.blanks(KINDS[:1])
    latch = EmulatedLatch(host, 0.0)
    out = latch.behind([blank])[0] + 1
    latch.hand_over([out])
    latch.open(functools.partial(write, blank, np.array([7], np.int32).tobytes()))
    assert out.item() == 1
    assert not latch.was_open()


def test_not_for_arrays_without_dimensions_nor_for_large_ones() -> None:
    latches = Latches(HostArrays(is_kept=False), emulated_s=60.0)
    assert latches.of([("int32", (1, 1))]) is not None
    assert latches.of([("int32", (1, 1)), ("float32", ())]) is None
    assert latches.of([("float32", (1, MAX_NUMBERS + 1))]) is None


def test_where_handing_over_takes_too_long_it_stops() -> None:
    latches = Latches(HostArrays(is_kept=False), emulated_s=BOUND_S)
    for _ in range(MAX_STRIKES - 1):
        latches.note(BOUND_S, was_open=False)
    latches.note(0.001, was_open=True)
    for _ in range(MAX_STRIKES - 1):
        latches.note(BOUND_S, was_open=False)
        latches.note(0.001, was_open=False)  # not for that
    assert latches.is_on
    latches.note(BOUND_S, was_open=False)
    assert latches.of(KINDS) is None


@pytest.mark.skipif(mx.cuda.is_available(), reason="an NVIDIA GPU is here")
def test_nobody_has_one_without_an_nvidia_gpu() -> None:
    assert Latches(HostArrays(is_kept=False)).of(KINDS) is None
