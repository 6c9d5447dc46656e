"""The compute thread alone: it reports how loads end, gives every credit back, and says when it is busy."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest

from cluster.compute import ComputeThread
from cluster.engine import Engine
from cluster.grammar import choice_grammar
from cluster.guide_process import GuideProcess, RemoteGuide
from cluster.work import LoadWork, StepWork
from proto import control_pb2, ring_pb2
from proto.codec import Tensor
from shard_loader.sources import FetchStoppedError, HubError
from tests.tiny_models import write_checkpoint

WAIT_S = 30.0


class Watched:
    """A compute thread and what it reported."""

    def __init__(self) -> None:
        self.events: SimpleQueue[tuple[object, ...]] = SimpleQueue()
        self.thread = ComputeThread(
            lambda frame, _tensors: self.events.put(("output", frame)),
            lambda epoch: self.events.put(("loaded", epoch)),
            lambda epoch, reason: self.events.put(("failed", epoch, reason)),
            lambda loaded, total: None,
        )
        self.thread.start()

    def next(self) -> tuple[object, ...]:
        return self.events.get(timeout=WAIT_S)

    def step(self, frame: ring_pb2.Frame, *tensors: Tensor) -> None:
        self.thread.post(StepWork(frame, tensors, lambda: self.events.put(("released", frame.seq))))


@pytest.fixture
def compute() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    assert watched.thread.stop(WAIT_S)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint("llama", tmp_path / "tiny", num_layers=3)


def test_layers_are_loaded_once_for_many_epochs(compute: Watched, model: Path) -> None:
    shards = []
    for epoch, (start, stop) in enumerate([(0, 2), (0, 2), (2, 3)], 1):
        compute.thread.post(LoadWork(epoch, model, "digest", start, stop))
        assert compute.next() == ("loaded", epoch)
        assert compute.thread.engine is not None
        shards.append(compute.thread.engine.shard)
    assert shards[0] is shards[1]
    assert (shards[2].start, shards[2].stop) == (2, 3)
    compute.thread.post(LoadWork(4, model, "digest", 0, 0))
    assert compute.next() == ("loaded", 4)
    assert compute.thread.engine is None  # no layers: the weights are gone


def test_a_load_may_fetch_first_and_says_so(compute: Watched, model: Path) -> None:
    seen = []

    def fetch(on_progress: Callable[[int, int], None], stopping: threading.Event) -> Path:
        on_progress(3, 10)
        thread = compute.thread
        seen.append((thread.activity, thread.load.loaded_bytes, thread.load.total_bytes, thread.progress))
        on_progress(10, 10)
        assert thread.progress > seen[0][3], "each byte is progress"
        return model

    compute.thread.post(LoadWork(1, None, "digest@revision", 0, 2, fetch=fetch))
    assert compute.next() == ("loaded", 1)
    assert seen[0][:3] == ("fetching", 3, 10)


def test_a_new_plan_ends_a_fetch(compute: Watched, model: Path) -> None:
    begun = threading.Event()

    def fetch(on_progress: Callable[[int, int], None], stopping: threading.Event) -> Path:
        begun.set()
        assert stopping.wait(WAIT_S)
        raise FetchStoppedError("the fetch was stopped")

    compute.thread.post(LoadWork(1, None, "digest@revision", 0, 2, fetch=fetch))
    assert begun.wait(WAIT_S)
    compute.thread.post(LoadWork(2, model, "digest", 0, 1))
    assert compute.next() == ("loaded", 2)


def test_a_fetch_that_failed_is_tried_again(
    compute: Watched, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.compute.FETCH_AGAIN_S", 0.01)
    answers = iter([HubError("the hub is down"), None])

    def fetch(on_progress: Callable[[int, int], None], stopping: threading.Event) -> Path:
        if (error := next(answers)) is not None:
            raise error
        return model

    compute.thread.post(LoadWork(1, None, "digest@revision", 0, 2, fetch=fetch))
    assert compute.next() == ("failed", 1, "fetching layers 0:2 failed: the hub is down")
    assert compute.next() == ("loaded", 1)


def test_a_load_that_fails_says_why_without_a_traceback_and_may_be_repeated(
    compute: Watched, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    file = model / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"layers.1.mlp.up_proj", b"layers.1.mlp.up_prof"))
    compute.thread.post(LoadWork(1, model, "digest", 0, 2))
    reason = "the checkpoint lacks tensor 'model.layers.1.mlp.up_proj.weight'"
    assert compute.next() == ("failed", 1, f"loading layers 0:2 failed: {reason}")
    assert caplog.records == []
    file.write_bytes(whole)
    compute.thread.post(LoadWork(2, model, "digest", 0, 2))
    assert compute.next() == ("loaded", 2)


def test_every_credit_comes_back(compute: Watched, model: Path) -> None:
    compute.step(ring_pb2.Frame(epoch=1, seq=1, kind=ring_pb2.STEP))  # before there is an epoch
    assert compute.next() == ("released", 1)
    compute.thread.post(LoadWork(1, model, "digest", 2, 3))
    assert compute.next() == ("loaded", 1)
    compute.step(ring_pb2.Frame(epoch=7, seq=2, kind=ring_pb2.STEP))  # of another epoch
    assert compute.next() == ("released", 2)
    bad = ring_pb2.Frame(epoch=1, seq=3, kind=ring_pb2.STEP)
    bad.opens.add(session=9)
    bad.slots.add(session=9, tokens=[1], is_sampled=True)
    compute.step(bad)  # without the carry that this stage needs
    kind, answer = compute.next()
    assert kind == "output"
    assert isinstance(answer, ring_pb2.Frame)
    assert (answer.kind, answer.seq) == (ring_pb2.RESULT, 3)
    (slot,) = answer.slots
    wanted = "layers 2:3 failed: CarryError: a carry without structure is one array, not 0"
    assert (slot.session, slot.error) == (9, wanted)
    assert compute.next() == ("released", 3)


def test_steps_are_timed_apart_from_chunks_and_anew_for_each_epoch(compute: Watched, model: Path) -> None:
    def told() -> control_pb2.StageStats:
        stats = control_pb2.StageStats()
        compute.thread.step_times.fill(stats)
        return stats

    compute.thread.post(LoadWork(1, model, "digest", 0, 2))
    assert compute.next() == ("loaded", 1)
    position = 0
    for tokens in ([1, 2, 3], [4], [5]):
        frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=position + 1)
        if not position:
            frame.opens.add(session=7, prompt_tokens=4, max_tokens=2)
        frame.slots.add(session=7, position=position, tokens=tokens)
        position += len(tokens)
        compute.step(frame)
        assert compute.next()[0] == "output"
        assert compute.next()[0] == "released"
    compute.thread.post(StepWork(ring_pb2.Frame(epoch=99), (), lambda: compute.events.put(("stale",))))
    assert compute.next() == ("stale",)  # by now the steps before it are counted
    stats = told()
    assert (list(stats.decode_position), list(stats.chunk_tokens)) == ([3, 4], [3])
    assert min(*stats.decode_ms, *stats.chunk_ms) > 0
    compute.thread.post(LoadWork(2, model, "digest", 0, 2))
    assert compute.next() == ("loaded", 2)
    assert told() == control_pb2.StageStats()


def test_a_thread_at_work_is_not_stopped_in_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACRAME_FAULT", "load_delay_s=0.6")
    watched = Watched()
    watched.thread.post(LoadWork(1, model, "digest", 0, 3))
    assert not watched.thread.stop(0.2)
    assert watched.thread.activity == "loading"
    assert watched.thread.busy_s > 0.1
    assert watched.thread.stop(WAIT_S)
    assert (watched.thread.activity, watched.thread.busy_s) == ("idle", 0.0)


def opening(session: int, seq: int, grammar: str = "") -> ring_pb2.Frame:
    """A prompt of one token, whose answer is asked for at once."""
    frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=seq)
    frame.opens.add(session=session, prompt_tokens=1, max_tokens=9).sampling.grammar = grammar
    frame.slots.add(session=session, tokens=[65], is_sampled=True)
    return frame


@pytest.mark.long
def test_the_next_mask_of_an_answer_is_made_meanwhile(compute: Watched, model: Path) -> None:
    compute.thread.post(LoadWork(1, model, "digest", 0, 3))
    assert compute.next() == ("loaded", 1)
    compute.step(opening(1, 1, choice_grammar(["ab", "cd"])))
    _, out = compute.next()
    assert isinstance(out, ring_pb2.Frame)
    assert out.slots[0].result.id in b"ac"
    assert compute.next() == ("released", 1)
    engine = compute.thread.engine
    assert engine is not None
    sampler = engine.sessions[1].sampler
    assert sampler is not None
    guide = sampler._guide
    assert isinstance(guide, RemoteGuide)
    assert guide._told == [out.slots[0].result.id]
    mask = guide.allowed([out.slots[0].result.id])
    assert mask is not None
    assert bytes(np.flatnonzero(mask).tolist()) == (b"b" if out.slots[0].result.id == ord("a") else b"d")


def stopped_grammars(compute: Watched, model: Path, stop: int = 3) -> tuple[Engine, subprocess.Popen[bytes]]:
    """A loaded engine whose process for grammars stands still."""
    compute.thread.post(LoadWork(1, model, "digest", 0, stop))
    assert compute.next() == ("loaded", 1)
    engine = compute.thread.engine
    assert engine is not None
    assert isinstance(engine.guides, GuideProcess)
    process = engine.guides.open(choice_grammar(["x"]))._child.process
    process.send_signal(signal.SIGSTOP)
    return engine, process


def test_others_go_on_while_a_grammar_is_compiled(compute: Watched, model: Path) -> None:
    _, process = stopped_grammars(compute, model)
    compute.step(opening(1, 1, choice_grammar(["ab", "cd"])))
    again = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=4)  # a draft of the one that waits
    again.slots.add(session=1, position=1, tokens=[66], is_sampled=True)
    compute.step(again)
    for session in (2, 3):
        compute.step(opening(session, session))
        _, out = compute.next()
        assert isinstance(out, ring_pb2.Frame)
        assert (out.seq, compute.next()) == (session, ("released", session))
    process.send_signal(signal.SIGCONT)
    _, out = compute.next()
    assert isinstance(out, ring_pb2.Frame)
    assert (out.seq, out.slots[0].error) == (1, "")
    assert out.slots[0].result.id in b"ac"
    assert compute.next() == ("released", 1)
    _, out = compute.next()
    assert isinstance(out, ring_pb2.Frame)
    assert (out.seq, out.slots[0].error) == (4, "")
    assert compute.next() == ("released", 4)


@pytest.mark.long
def test_what_waits_for_a_grammar_goes_with_its_epoch(compute: Watched, model: Path) -> None:
    _, process = stopped_grammars(compute, model)
    compute.step(opening(1, 1, choice_grammar(["ab", "cd"])))
    compute.thread.post(LoadWork(2, model, "digest", 0, 3))
    assert compute.next() == ("loaded", 2)
    process.send_signal(signal.SIGCONT)
    assert compute.next() == ("released", 1)  # and no output


def test_handing_a_result_over_counts_as_work(model: Path) -> None:
    outputs: SimpleQueue[float] = SimpleQueue()

    def hand_over(_frame: ring_pb2.Frame, _tensors: list[Tensor]) -> None:
        assert thread.engine is not None
        busy_ms = thread.engine.stats.busy_ms
        began = time.perf_counter()
        while time.perf_counter() - began < 0.05:
            pass
        outputs.put(busy_ms)

    thread = ComputeThread(hand_over, lambda _: None, lambda _, reason: pytest.fail(reason), lambda *_: None)
    thread.start()
    thread.post(LoadWork(1, model, "digest", 0, 3))
    step = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=1)
    step.opens.add(session=1, prompt_tokens=2, max_tokens=3)
    step.slots.add(session=1, position=0, tokens=[5])
    released = threading.Event()
    thread.post(StepWork(step, (), released.set))
    before_ms = outputs.get(timeout=WAIT_S)
    assert released.wait(WAIT_S)
    assert thread.engine is not None
    assert thread.engine.stats.busy_ms >= before_ms + 50
    assert thread.stop(WAIT_S)


@pytest.mark.long
def test_one_that_leaves_while_its_frame_waits_harms_none_of_that_frame(
    compute: Watched, model: Path
) -> None:
    engine, process = stopped_grammars(compute, model)
    for session, grammar in ((1, choice_grammar(["ab", "cd"])), (2, "")):
        frame = opening(session, session, grammar)
        frame.slots[0].is_sampled = False
        compute.step(frame)
        compute.next()
        assert compute.next() == ("released", session)
    both = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=3, is_batched=True)
    for session in (1, 2):
        both.slots.add(session=session, position=1, tokens=[66], is_sampled=True)
    compute.step(both)
    compute.step(ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=4, closes=[1]))
    assert compute.next() == ("released", 4)
    process.send_signal(signal.SIGCONT)
    _, out = compute.next()
    assert isinstance(out, ring_pb2.Frame)
    assert (out.seq, [slot.error for slot in out.slots]) == (3, ["", ""])
    assert compute.next() == ("released", 3)
    assert set(engine.sessions) == {2}


def test_one_kept_while_its_guesses_wait_is_what_it_was_before_them(compute: Watched, tmp_path: Path) -> None:
    model = write_checkpoint("mamba2", tmp_path / "recurrent", num_layers=2)
    engine, process = stopped_grammars(compute, model, 2)
    frame = opening(1, 1, choice_grammar(["ab", "cd"]))
    frame.slots[0].is_sampled = False
    compute.step(frame)
    compute.next()
    assert compute.next() == ("released", 1)
    guesses = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=2)
    guesses.slots.add(session=1, position=1, tokens=[66, 67, 68], is_sampled=True, num_draws=3)
    compute.step(guesses)
    compute.step(ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=3, keeps=[1], keep_tokens=[1]))
    assert compute.next() == ("released", 3)
    process.send_signal(signal.SIGCONT)
    compute.next()
    assert compute.next() == ("released", 2)
    assert engine.sessions[1].position == 1
    like = opening(2, 4)
    like.opens[0].from_session, like.opens[0].from_tokens, like.slots[0].position = 1, 1, 1
    compute.step(like)
    _, out = compute.next()
    assert isinstance(out, ring_pb2.Frame)
    assert out.slots[0].error == ""
    assert compute.next() == ("released", 4)
