"""While the device computes a frame the next one is built: same outputs, in the same order."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from cluster.compute import ComputeThread
from cluster.engine import Engine
from cluster.inbox import Inbox
from cluster.step import Step
from cluster.work import LoadWork, StepWork
from proto import ring_pb2
from proto.codec import Tensor
from shard_loader.weights import load_shard
from tests.graph_counts import primitives
from tests.tiny_models import write_checkpoint

WAIT_S = 20.0


def row(seq: int, *slots: tuple[int, int, int], **header: list[int]) -> ring_pb2.Frame:
    """A frame of one token each: session, position, token."""
    frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=seq, is_batched=len(slots) > 1, **header)
    for session, position, token in slots:
        frame.slots.add(session=session, position=position, tokens=[token], is_sampled=True)
    return frame


def prompt(seq: int, session: int, tokens: list[int]) -> ring_pb2.Frame:
    frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=seq)
    frame.opens.add(session=session, prompt_tokens=len(tokens) + 1, max_tokens=9)
    frame.slots.add(session=session, tokens=tokens)
    return frame


def part(seq: int, session: int, position: int, tokens: list[int]) -> ring_pb2.Frame:
    """One of a prompt's further chunks."""
    frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=seq)
    frame.slots.add(session=session, position=position, tokens=tokens)
    return frame


def script() -> list[ring_pb2.Frame]:
    return [
        prompt(1, 1, [72, 101, 108]),
        prompt(2, 2, [65, 3]),
        prompt(3, 3, [9, 79, 32, 38]),
        row(4, (1, 3, 5)),
        row(5, (2, 2, 6), (3, 4, 7)),
        row(6, (1, 4, 8)),
        row(7, (9, 0, 8)),  # nobody's: its answer comes from no device
        row(8, (2, 3, 9), (3, 5, 10)),
        row(9, (1, 5, 11), (2, 4, 12)),  # shares a session with the one before: not at once
        row(10, (3, 6, 13), closes=[2]),
        row(11, (1, 6, 14)),
        part(12, 3, 7, [4, 5, 6]),
        part(13, 3, 10, [7]),  # built upon the one before, while that is computed
        part(14, 3, 11, [8, 9]),
        row(15, (3, 13, 10)),  # reads the last token, and draws
        row(16, (3, 14, 11)),  # the token that was drawn: not before it is there
        row(17, (1, 7, 3)),
    ]


def run(
    model: Path, *, overlaps: bool, frames: Sequence[ring_pb2.Frame] | None = None
) -> list[ring_pb2.Frame]:
    """The outputs of a compute thread that had all frames waiting."""
    outputs: SimpleQueue[ring_pb2.Frame] = SimpleQueue()
    failures: list[str] = []
    released = threading.Semaphore(0)
    thread = ComputeThread(
        lambda frame, _tensors: outputs.put(frame),
        lambda epoch: None,
        lambda epoch, reason: failures.append(reason),
        lambda loaded, total: None,
        overlaps=overlaps,
    )
    frames = frames or script()
    thread.post(LoadWork(1, model, "digest", 0, 3))
    for frame in frames:
        thread.post(StepWork(frame, (), released.release))
    thread.start()
    for _ in frames:
        assert released.acquire(timeout=WAIT_S)
    assert thread.stop(WAIT_S)
    assert not failures
    return [outputs.get_nowait() for _ in frames]


@pytest.mark.parametrize("kind", ["llama", "mamba2"])
def test_frames_overlap_and_nothing_changes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_checkpoint(kind, tmp_path / kind, num_layers=3)
    engine = Engine(load_shard(model, 0, 3))
    wanted = [output[0] for frame in script() if (output := engine.step(frame, ())) is not None]
    log: list[tuple[str, int]] = []
    begin, finish = Engine.begin, Step.finish
    began: dict[int, int] = {}

    def beginning(self: Engine, frame: ring_pb2.Frame, tensors: tuple[()]) -> Step:
        log.append(("begin", frame.seq))
        step = begin(self, frame, tensors)
        began[id(step)] = frame.seq
        return step

    def ending(self: Step) -> object:
        log.append(("end", began[id(self)]))
        return finish(self)

    monkeypatch.setattr(Engine, "begin", beginning)
    monkeypatch.setattr(Step, "finish", ending)
    assert run(model, overlaps=True) == wanted
    is_early = [log.index(("begin", seq)) < log.index(("end", seq - 1)) for seq in range(5, 18)]
    assert is_early == [True] * 4 + [False, False] + [True] * 5 + [False, True]
    log.clear()
    assert run(model, overlaps=False) == wanted
    assert log == [(what, seq) for seq in range(1, 18) for what in ("begin", "end")]


@pytest.mark.parametrize("last", [8, 9999])  # one is no token: what comes after the copy fails
def test_a_copy_is_kept_of_a_prompts_part_before_the_next_one_is_built(last: int, tmp_path: Path) -> None:
    model = write_checkpoint("mamba2", tmp_path / "mamba2", num_layers=3)
    frames = [prompt(1, 1, [72, 101, 108]), part(2, 1, 3, [4, 5, 6]), part(3, 1, 6, [7, last])]
    frames[1].forks.add(session=50, from_session=1)
    frames.append(ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=4))
    frames[-1].opens.add(session=2, prompt_tokens=8, max_tokens=9, from_session=50, from_tokens=6)
    frames[-1].slots.add(session=2, position=6, tokens=[1])
    frames.append(row(5, (2, 7, 3)))
    engine = Engine(load_shard(model, 0, 3))
    wanted = [output[0] for frame in frames if (output := engine.step(frame, ())) is not None]
    assert [bool(frame.slots[0].error) for frame in wanted] == [False, False, last == 9999, False, False]
    assert run(model, overlaps=True, frames=frames) == wanted


@pytest.mark.parametrize("is_started", [False, True])
def test_a_prompts_part_is_waited_for_while_the_next_is_built_upon_it(
    is_started: bool, tmp_path: Path
) -> None:
    """mlx-lm's caches give the next part's keys the first one's arrays; to wait does not evaluate those."""
    engine = Engine(load_shard(write_checkpoint("llama", tmp_path / "llama", num_layers=3), 0, 3))
    assert engine.step(prompt(1, 1, [72] * 9), ()) is not None
    state = engine.sessions[1].state
    assert state is not None
    first = engine.begin(part(2, 1, 9, [5, 6]), ())
    first.start()
    second = engine.begin(part(3, 1, 11, [7]), ())
    assert primitives(state.own[0].keys)
    if is_started:
        second.start()
    assert first.wait() is None
    assert bool(primitives(state.own[0].keys)) is not is_started
    if not is_started:
        second.start()
    for step in (first, second):
        output = step.finish()
        assert output is not None
        assert not output[0].slots[0].error
    assert not primitives(state.own[0].keys)


def test_no_time_counts_twice(tmp_path: Path) -> None:
    """Nor the sending of one frame while the device has the next one."""
    model = write_checkpoint("llama", tmp_path / "llama", num_layers=3)
    loaded, released = threading.Event(), threading.Semaphore(0)

    def send(_frame: ring_pb2.Frame, _tensors: list[Tensor]) -> None:
        began = time.perf_counter()
        while time.perf_counter() - began < 0.02:
            pass

    thread = ComputeThread(
        send, lambda _: loaded.set(), lambda _, reason: pytest.fail(reason), lambda *_: None, overlaps=True
    )
    thread.post(LoadWork(1, model, "digest", 0, 3))
    thread.start()
    assert loaded.wait(WAIT_S)
    frames = [prompt(1, 1, [72] * 9), prompt(2, 2, [65] * 9)]
    frames += [row(3 + i, (1 + i % 2, 9 + i // 2, 5)) for i in range(20)]
    began = time.perf_counter()
    for frame in frames:
        thread.post(StepWork(frame, (), released.release))
    for _ in frames:
        assert released.acquire(timeout=WAIT_S)
    wall_ms = (time.perf_counter() - began) * 1e3
    assert thread.engine is not None
    assert 20 * len(frames) <= thread.engine.stats.busy_ms <= wall_ms
    assert thread.num_overlapped > 0
    assert thread.stop(WAIT_S)


class LateInbox(Inbox):
    """What comes as soon as somebody waits for it while a device is busy."""

    def __init__(self, thread: ComputeThread) -> None:
        super().__init__()
        self._compute = thread
        self.later: list[StepWork] = []

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if timeout and self.later and self.empty() and self._compute._running is not None:
            self.put(self.later.pop(0))
        return super().get(block, timeout)


def test_what_comes_while_the_device_is_busy_is_built_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is known how long it will be busy; until then the thread waits for the device."""
    monkeypatch.setenv("MACRAME_FAULT", "step_delay_ms=50")  # stands for what the device does
    model = write_checkpoint("llama", tmp_path / "llama", num_layers=3)
    outputs: SimpleQueue[int] = SimpleQueue()
    thread = ComputeThread(
        lambda frame, _tensors: outputs.put(frame.seq),
        lambda epoch: None,
        lambda epoch, reason: None,
        lambda loaded, total: None,
        overlaps=True,
    )
    inbox = thread._inbox = LateInbox(thread)
    thread.post(LoadWork(1, model, "digest", 0, 3))
    thread.start()
    first = prompt(1, 1, [72] * 9), prompt(2, 2, [65] * 8), part(21, 2, 8, [65]), row(3, (1, 9, 5))
    for frame in first:
        thread.post(StepWork(frame, (), lambda: None))
        assert outputs.get(timeout=WAIT_S) == frame.seq
    assert thread.num_overlapped == 0
    inbox.later = [StepWork(row(5, (2, 9, 6)), (), lambda: None)]
    thread.post(StepWork(row(4, (1, 10, 5)), (), lambda: None))
    assert [outputs.get(timeout=WAIT_S) for _ in range(2)] == [4, 5]
    assert thread.num_overlapped == 1
    thread.post(StepWork(row(6, (1, 11, 7), closes=[2]), (), lambda: None))
    assert outputs.get(timeout=WAIT_S) == 6
    inbox.later = [StepWork(row(8, (1, 13, 8)), (), lambda: None)]
    thread.post(StepWork(row(7, (1, 12, 7)), (), lambda: None))
    assert outputs.get(timeout=WAIT_S) == 7
    assert inbox.later, "who is alone is not kept waiting for others"
    assert thread.stop(WAIT_S)


def test_what_fails_on_the_device_fails_its_own_frame(tmp_path: Path) -> None:
    model = write_checkpoint("llama", tmp_path / "llama", num_layers=3)
    engine = Engine(load_shard(model, 0, 3))
    assert engine.step(prompt(1, 1, [72]), ()) is not None
    step = engine.begin(row(2, (1, 1, 5)), ())
    assert step._wanted is not None
    step._go_on(RuntimeError("the device is gone"))
    output = step.finish()
    assert output is not None
    assert output[0].slots[0].error == "layers 0:3 failed: RuntimeError: the device is gone"
    assert not engine.sessions


def test_freed_buffers_go_back_when_a_device_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after each part of a prompt: for that the device would have to stop."""
    model = write_checkpoint("llama", tmp_path / "llama", num_layers=3)
    rested, begun = threading.Event(), threading.Event()
    make, rest = Engine.__init__, Engine.rest

    def making(self: Engine, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self._is_gpu = True

    def resting(self: Engine) -> None:
        assert begun.is_set()
        rest(self)
        rested.set()

    monkeypatch.setattr("cluster.compute.REST_S", 0.05)
    monkeypatch.setattr(Engine, "__init__", making)
    monkeypatch.setattr(Engine, "rest", resting)
    thread = ComputeThread(
        lambda frame, _tensors: begun.set(),
        lambda epoch: None,
        lambda epoch, reason: None,
        lambda loaded, total: None,
        overlaps=True,
    )
    thread.post(LoadWork(1, model, "digest", 0, 3))
    thread.post(StepWork(prompt(1, 1, [72] * 9), (), lambda: None))
    thread.start()
    assert rested.wait(WAIT_S)
    assert thread.stop(WAIT_S)
    assert thread.engine is None


def test_a_prompts_part_fails_with_the_one_that_it_is_built_upon(tmp_path: Path) -> None:
    engine = Engine(load_shard(write_checkpoint("llama", tmp_path / "llama", num_layers=3), 0, 3))
    assert engine.step(prompt(1, 1, [72] * 9), ()) is not None
    first = engine.begin(part(2, 1, 9, [5, 6]), ())
    second = engine.begin(part(3, 1, 11, [7]), ())
    assert first.wait() is None
    first._failure = failure = RuntimeError("the device is gone")
    assert first.wait() is failure
    second.fail(failure)
    for step in (first, second):
        output = step.finish()
        assert output is not None
        assert output[0].slots[0].error == "layers 0:3 failed: RuntimeError: the device is gone"
    assert not engine.sessions
