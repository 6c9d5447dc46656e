"""Arrays in memory that is used again: each has its own numbers as long as it is in use."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from cluster.engine import Engine
from proto.codec import Tensor
from shard_loader import host_arrays
from shard_loader.carry import CarryError
from shard_loader.host_arrays import TURNS, HostArrays, write
from shard_loader.rehearsal import Rehearsal
from tests.test_engine import trip
from tests.test_overlap import prompt, row
from tests.zoo.configs import zoo_config

KIND = ("float32", (4,))


def tensor(value: float, *shape: int) -> Tensor:
    return Tensor("float32", shape, np.full(shape, value, np.float32).tobytes())


@pytest.mark.parametrize("is_kept", [False, True])
def test_each_has_its_own_numbers(*, is_kept: bool) -> None:
    host = HostArrays(is_kept=is_kept)
    arrays = [host.of(tensor(i, 2, 3)) for i in range(TURNS)]
    sums = [array.sum() for array in arrays]
    assert [total.item() for total in sums] == [6.0 * i for i in range(TURNS)]
    again = host.of(tensor(9, 2, 3))
    assert (again is arrays[0]) == is_kept
    assert mx.array_equal(again, mx.full((2, 3), 9.0))
    assert host.tokens([[5, 6], [7, 8]]).tolist() == [[5, 6], [7, 8]]
    assert host.tokens([[1, 2], [3, 4]]).dtype == mx.int32


def test_a_blank_is_written_after_something_was_built_of_it() -> None:
    host = HostArrays(is_kept=True)
    for value in (3.0, 4.0):
        [blank] = host.blanks([KIND])
        doubled = blank * 2
        assert host.of(tensor(value, 4)) is not blank
        write(blank, np.full(4, value, np.float32).tobytes())
        host.give_back([blank], [KIND])
        assert doubled.tolist() == [2 * value] * 4


def test_a_blank_is_nobody_elses_until_it_is_given_back() -> None:
    host = HostArrays(is_kept=True)
    for _ in range(3):
        blanks = host.blanks([KIND] * 5)
        for i in range(3 * TURNS):
            array = host.of(tensor(i, 4))
            assert all(array is not blank for blank in blanks)
        host.give_back(blanks, [KIND] * 5)
        assert host.nbytes == 16 * TURNS


def test_a_carry_of_many_alike_leaves_those_of_other_frames_alone() -> None:
    host = HostArrays(is_kept=True)
    for _ in range(3):
        frames = [host.carry([tensor(10 * frame + i, 4) for i in range(TURNS + 2)]) for frame in range(3)]
        seen = [[array[0].item() for array in arrays] for arrays in frames]
        assert seen == [[10 * frame + i for i in range(TURNS + 2)] for frame in range(3)]
    assert host.nbytes == 16 * TURNS


def test_bytes_that_are_too_few_are_refused() -> None:
    host = HostArrays(is_kept=True)
    for _ in range(2):
        with pytest.raises(CarryError, match="has 4 bytes, not 8"):
            host.of(Tensor("float32", (2,), bytes(4)))
        host.of(tensor(1, 2))


def test_kinds_are_forgotten_in_the_order_of_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept stays within its bytes, however many lengths of prompts come."""
    monkeypatch.setattr(host_arrays, "MAX_KEPT_BYTES", 4 * TURNS * (1 + 2 + 3 + 4 + 5))
    host = HostArrays(is_kept=True)
    first = host.of(tensor(0, 1))
    for i in range(2, 6):
        host.of(tensor(i, i))
    assert host.nbytes == host_arrays.MAX_KEPT_BYTES
    host.of(tensor(0, 1))
    host.of(tensor(5, 6))
    assert host.nbytes == 4 * TURNS * (1 + 5 + 6)
    assert any(array is first for array in host._kept.of(("float32", (1,))) or ())
    assert host._kept.of(("float32", (4,))) is None


def test_keys_that_a_cache_keeps_as_they_came_are_not_written_again() -> None:
    """Windows that later layers share repeat the calls of the stages before them: with the carry's arrays."""
    frames = [prompt(1 + i, 1 + i, [5 + i, 60 + i, 7 + i]) for i in range(2 * TURNS)]
    frames.append(row(len(frames) + 1, (1, 3, 9)))
    shards = Rehearsal(zoo_config("gemma3n")).shards([2, 4])
    plain, engines = ([Engine(shard, builds_ahead=False) for shard in shards] for _ in range(2))
    for engine in engines:
        engine._host = HostArrays(is_kept=True)
    for frame in frames:
        assert trip(engines, frame) == trip(plain, frame)
