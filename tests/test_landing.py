"""What the host reads of a step lands in memory that stays: the same bytes, one place after the other."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from cluster.engine import Engine
from proto import ring_pb2
from shard_loader import landing
from shard_loader.carry import CarryError, memory, to_wire
from shard_loader.host_arrays import TURNS
from shard_loader.landing import Landed, Landing
from shard_loader.weights import load_shard
from tests.graph_counts import primitives
from tests.tiny_models import write_checkpoint


def address(array: mx.array) -> int:
    return int(np.frombuffer(memory(array).cast("B"), np.uint8).ctypes.data)


def lands(place: Landing, x: mx.array) -> Landed:
    landed = place.of(x)
    mx.eval(landed.array)
    return landed


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.bool_])
def test_bytes_are_those_of_the_array(dtype: mx.Dtype, *, is_kept: bool) -> None:
    place = Landing(is_kept=is_kept)
    for shape in ((1, 3, 5), (4,), (), (2, 0, 3), (1, 8, 8)):
        x = mx.random.randint(0, 2, shape).astype(dtype)
        assert lands(place, x).read() == to_wire(x)
        turned = x.swapaxes(0, -1) if shape else x
        assert lands(place, turned).read() == to_wire(turned)
    assert (place.nbytes > 0) == is_kept


def test_places_are_taken_in_turns_and_written_where_they_are() -> None:
    place = Landing(is_kept=True)
    seen, views = [], []
    for i in range(3 * TURNS):
        landed = lands(place, mx.full((2, 9), float(i)) + 0)
        seen.append(address(landed.array))
        views.append(np.frombuffer(landed.read().data, np.float32))
        assert [view[0] for view in views[-TURNS:]] == [float(n) for n in range(max(0, i - TURNS + 1), i + 1)]
        del landed
        if len(views) >= TURNS:
            views.pop(0)
    assert seen[:TURNS] == seen[TURNS : 2 * TURNS] == seen[2 * TURNS :]
    assert len(set(seen)) == TURNS


def test_what_fails_leaves_nothing_behind() -> None:
    """Its array would be made of what failed."""
    place = Landing(is_kept=True)
    for _ in range(TURNS + 2):
        place.of(mx.zeros((3,)) + 1)
    assert not place.nbytes
    landed = lands(place, mx.ones((3,)))
    assert not primitives(landed.array)
    assert np.frombuffer(landed.read().data, np.float32).tolist() == [1.0] * 3


def test_large_ones_and_strange_ones_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landing, "MAX_BYTES", 64)
    place = Landing(is_kept=True)
    x = mx.arange(17, dtype=mx.float32)
    assert lands(place, x).read() == to_wire(x)
    assert not place.nbytes
    with pytest.raises(CarryError, match="cannot cross a cut"):
        place.of(mx.zeros((2,), mx.float64, stream=mx.cpu))


def test_slots_of_one_frame_do_not_land_on_each_other(tmp_path: Path) -> None:
    shard = load_shard(write_checkpoint("llama", tmp_path / "llama", num_layers=2), 0, 1)
    frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=1)
    for session in range(1, TURNS + 3):
        frame.opens.add(session=session, prompt_tokens=3, max_tokens=4)
        frame.slots.add(session=session, tokens=[session, 70])
    carries = []
    for is_kept in (False, True):
        engine = Engine(shard)
        engine._landing = Landing(is_kept=is_kept)
        output = engine.step(frame, ())
        assert output is not None
        carries.append([bytes(tensor.data) for tensor in output[1]])
    assert len(set(carries[0])) == TURNS + 2
    assert carries[1] == carries[0]
