"""Every copy of a weight byte and of a hidden state, counted (docs/copies.md)."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from cluster.engine import Engine
from proto import ring_pb2
from proto.codec import PART_BYTES, FrameAssembler, Tensor, encode
from shard_loader.carry import from_wire, to_wire
from shard_loader.weights import load_shard
from tests.frames import step as step_frame
from tests.load_probe import FORMS, probe, write_form
from tests.tiny_models import write_checkpoint

HEADER_BYTES = 4096  # more than the header of any frame here
SLACK_BYTES = 32 << 10  # Python's own small objects


def hidden(num_tokens: int, width: int = 4096) -> mx.array:
    x = mx.random.normal((1, num_tokens, width)).astype(mx.bfloat16)  # (B, T, hidden_size)
    mx.eval(x)
    return x


def memory_of(x: Any) -> np.ndarray[Any, Any]:
    return np.asarray(memoryview(x).cast("B"))


def allocated(work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` gives, and the most that Python's and numpy's allocators held for it at once."""
    gc.collect()
    tracemalloc.start()
    try:
        out = work()
        return out, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- out: device to message ----------------------------------------------------------------------------------
def test_a_carry_leaves_as_a_view_of_mlxs_own_memory() -> None:
    x = hidden(16)
    tensor = to_wire(x)
    assert np.shares_memory(np.asarray(tensor.data), memory_of(x))
    raw, expected = bytes(tensor.data), bytes(memoryview(x))
    assert raw == expected
    del x  # the view keeps the array alive, and nothing may be written over it meanwhile
    gc.collect()
    others = [hidden(16) for _ in range(8)]
    assert bytes(tensor.data) == raw
    assert len(others) == 8


@pytest.mark.parametrize("num_tokens", [1, 100, 512])  # 8 KiB, 800 KiB, and 4 MiB in parts
def test_a_carry_is_copied_once_on_its_way_out(num_tokens: int) -> None:
    x = hidden(num_tokens)
    frame = step_frame(1)
    messages, peak_bytes = allocated(lambda: encode(frame, [to_wire(x)]))
    assert len(messages) == -(-x.nbytes // PART_BYTES)
    assert sum(map(len, messages)) >= x.nbytes
    assert peak_bytes <= x.nbytes + len(messages) * HEADER_BYTES + SLACK_BYTES


def test_several_tensors_above_a_part_are_copied_once_too() -> None:
    arrays = [hidden(100), hidden(200), hidden(30)]
    frame = step_frame(1)
    frame.slots[0].num_tensors = len(arrays)
    total = sum(x.nbytes for x in arrays)
    messages, peak_bytes = allocated(lambda: encode(frame, [to_wire(x) for x in arrays]))
    assert peak_bytes <= total + len(messages) * HEADER_BYTES + SLACK_BYTES
    assembler = FrameAssembler()
    whole = [assembler.feed(message) for message in messages][-1]
    assert whole is not None
    for x, tensor in zip(arrays, whole[1], strict=True):
        assert bytes(tensor.data) == bytes(memoryview(x))


def test_only_scattered_rows_cost_one_more() -> None:
    x = hidden(8).transpose(0, 2, 1)
    mx.eval(x)
    tensor = to_wire(x)
    assert not np.shares_memory(np.asarray(tensor.data), np.asarray(memoryview(hidden(8)).cast("B")))
    assert mx.array_equal(from_wire(tensor), x).item()


# -- in: message to device -----------------------------------------------------------------------------------
def receive(x: mx.array) -> tuple[list[bytes], list[Tensor], int]:
    messages = encode(step_frame(1), [to_wire(x)])
    assembler = FrameAssembler()

    def feed() -> list[Tensor]:
        whole = [assembler.feed(message) for message in messages][-1]
        assert whole is not None
        return whole[1]

    tensors, peak_bytes = allocated(feed)
    return messages, tensors, peak_bytes


def test_a_message_is_not_copied_when_it_is_decoded() -> None:
    x = hidden(100)
    messages, (tensor,), peak_bytes = receive(x)
    assert np.shares_memory(np.asarray(tensor.data), np.frombuffer(messages[0], np.uint8))
    assert peak_bytes <= HEADER_BYTES + SLACK_BYTES


def test_parts_are_joined_once() -> None:
    x = hidden(512)
    messages, (tensor,), peak_bytes = receive(x)
    assert len(messages) > 1
    assert x.nbytes <= peak_bytes <= x.nbytes + len(messages) * HEADER_BYTES + SLACK_BYTES
    assert bytes(tensor.data) == bytes(memoryview(x))


def test_a_carry_is_copied_once_into_mlxs_memory() -> None:
    x = hidden(100)
    tensor = receive(x)[1][0]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    y, peak_bytes = allocated(lambda: from_wire(tensor))
    mx.eval(y)
    assert peak_bytes <= SLACK_BYTES  # none in Python
    assert mx.get_peak_memory() - before <= x.nbytes + 4096
    assert mx.array_equal(x.view(mx.uint16), y.view(mx.uint16)).item()


def test_a_stage_makes_no_copy_of_its_own(tmp_path: Path) -> None:
    """From a frame to the next one through the middle of a model: no Python memory of the carry's size."""
    overrides = {"hidden_size": 1024, "intermediate_size": 64}
    folder = write_checkpoint("llama", tmp_path / "wide", num_layers=3, overrides=overrides)
    engine = Engine(load_shard(folder, 1, 2))
    x = mx.random.normal((1, 200, 1024))
    spec = ring_pb2.SessionSpec(session=1, prompt_tokens=400, max_tokens=2, sampling=ring_pb2.Sampling())
    slot = ring_pb2.Slot(session=1, position=0, tokens=[7] * 200, num_tensors=1)
    frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=1, opens=[spec], slots=[slot])
    mx.eval(x)
    output, peak_bytes = allocated(lambda: engine.step(frame, [to_wire(x)]))
    assert output is not None
    assert not output[0].slots[0].error
    assert len(output[1][0].data) == x.nbytes == 819_200
    assert peak_bytes <= 4 * SLACK_BYTES


# -- weights: disk to device ---------------------------------------------------------------------------------
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/io")
@pytest.mark.parametrize("form", FORMS)
def test_a_weight_is_read_once_into_its_place(form: str, tmp_path: Path) -> None:
    found = probe(write_form(form, tmp_path / "big"), 2, 5)
    own = found["own"]
    assert own > 30e6
    # Headers are read by the planner's reader and by MLX's; what remains is configuration.
    assert own <= found["read"] <= own + 3 * found["headers"] + 200_000, found
    assert found["mlx_peak"] <= 1.01 * own + 500_000, found
    assert found["peak"] <= 1.1 * own + 8_000_000, found
    assert own <= found["mlx_kept"] <= 1.005 * own + 500_000, found
    assert found["cached"] == 0, found  # what loading freed is given back
    assert found["open"] == [], found
    assert found["mlx_left"] <= 0.005 * own, found
    assert found["freed"] >= 0.9 * own, found


def test_bytes_of_all_dtypes_cross_as_views() -> None:
    for dtype in (mx.bfloat16, mx.float32, mx.bool_, mx.complex64, mx.int64, mx.uint8):
        x = mx.zeros((2, 3), dtype)
        mx.eval(x)
        tensor = to_wire(x)
        assert len(tensor.data) == x.nbytes
        assert np.shares_memory(np.asarray(tensor.data), memory_of(x))
    empty = to_wire(mx.zeros((0, 3), mx.bfloat16))
    assert empty == Tensor("bfloat16", (0, 3), b"")
    assert from_wire(empty).shape == (0, 3)
