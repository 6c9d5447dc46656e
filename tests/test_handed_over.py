"""Steps that the device has before their numbers: the same results, whatever comes, and when."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Queue

import pytest

from cluster import compute
from cluster.build_ahead import NUM_WAITS, BuildAhead
from cluster.engine import Engine
from cluster.step import Output
from cluster.work import LoadWork, StepWork
from proto import ring_pb2
from proto.codec import Tensor
from shard_loader.latch import EmulatedLatch
from shard_loader.weights import load_shard
from tests.test_build_ahead import LAYERS, PROMPTS, Ring
from tests.test_overlap import WAIT_S, prompt, row
from tests.tiny_models import write_checkpoint
from tests.waiting import wait_for

# Plain and latent caches, which can forget a token; a window, while it is not full; recurrent ones, never.
KINDS = ["llama", "deepseek_v3", "gpt_oss", "mamba2"]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        request.param, tmp_path_factory.mktemp(request.param) / request.param, num_layers=LAYERS
    )


def can_forget(model: Path) -> bool:
    return model.name in KINDS[:2]


class Handing(Ring):
    """Hands steps over to an emulated device.

    late: asked for each whether its frame comes too late; builds_early: whether the next step is built before
    this one is done; begins: whether who brings a frame lets its step begin.
    """

    def __init__(
        self,
        model: Path,
        cuts: Sequence[int],
        late: Callable[[], bool] = lambda: False,
        builds_early: Callable[[], bool] = lambda: True,
        begins: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(model, cuts, is_ahead=True, late_s=60.0)
        self.late, self.builds_early, self.num_early = late, builds_early, 0
        self.begins, self.num_brought = begins, [0 for _ in self.engines]
        self.num_following = [0 for _ in self.engines]  # built upon a step that waits on the device

    def trip(self, frame: ring_pb2.Frame) -> ring_pb2.Frame | None:
        tensors: Sequence[Tensor] = ()
        for i, engine in enumerate(self.engines):
            awaited = engine.ahead.awaited(frame.epoch)
            if awaited is not None and awaited.is_in(frame, tensors) and self.begins():
                awaited.begin(frame.slots[0].tokens, tensors)
                self.num_brought[i] += engine.ahead._built.ahead.has_begun  # type: ignore[union-attr]
            step = engine.begin(frame, tensors)
            step.start()
            if engine.num_sessions == 1 and self.builds_early():
                self.num_early += engine.build_ahead()
            output = step.finish()
            if output is None:
                return None
            frame, tensors = output
        return frame

    def send(self, *slots: ring_pb2.Slot, **rest: object) -> None:
        super().send(*slots, **rest)  # type: ignore[arg-type]
        for i, engine in enumerate(self.engines):
            built = engine.ahead._built
            self.num_following[i] += engine.ahead._next is not None
            if built is not None and built.handed_over is not None and self.late():
                latch = built.ahead._latch
                assert isinstance(latch, EmulatedLatch)
                latch._until = 0.0

    def counts(self, name: str) -> list[int]:
        return [getattr(engine.ahead, name) for engine in self.engines]


def both(model: Path, ring: Handing, script: Callable[[Ring], object]) -> Handing:
    plain = Ring(model, [2], is_ahead=False)
    script(plain)
    script(ring)
    assert ring.results == plain.results
    return ring


def test_one_answer_is_handed_over_step_by_step(model: Path) -> None:
    def script(ring: Ring) -> None:
        ring.read(2)
        ring.write(2, times=9)

    ring = both(model, Handing(model, [2]), script)
    num = 8 - NUM_WAITS if can_forget(model) else 0
    if model.name != "gpt_oss":
        assert ring.counts("num_handed_over") == [num, num]
    assert ring.counts("num_late") == [0, 0]
    assert ring.counts("num_dropped") == [0, 0]
    handed_over = ring.counts("num_handed_over")
    assert ring.num_early == 2 * 9 - sum(handed_over)  # of those handed over the next one was built before
    assert ring.num_following == [num and num + 1 for num in handed_over]


def test_what_comes_too_late_is_computed_again(model: Path) -> None:
    def script(ring: Ring) -> None:
        ring.read(2)
        ring.write(2, times=9)

    turns = iter(range(1000))
    ring = both(model, Handing(model, [2], late=lambda: next(turns) % 3 != 1), script)
    assert min(ring.counts("num_late")) > 0 or not can_forget(model)
    assert all(0 <= a <= b for a, b in zip(*map(ring.counts, ("num_late", "num_handed_over")), strict=True))


def test_it_begins_as_its_frame_is_brought(model: Path) -> None:
    def script(ring: Ring) -> None:
        ring.read(2)
        ring.write(2, times=9)

    ring = both(model, Handing(model, [2], begins=lambda: True), script)
    assert ring.counts("num_begun") == ring.num_brought == ring.counts("num_handed_over")
    assert min(ring.num_brought) >= 3 or not can_forget(model)
    assert ring.counts("num_dropped") == [0, 0]


@pytest.mark.parametrize("other", ["tokens", "carry", "session"])
def test_what_has_begun_for_one_frame_is_not_taken_for_another(other: str, tmp_path: Path) -> None:
    """Whatever its step has come to by then."""
    model = write_checkpoint("llama", tmp_path / "llama", num_layers=LAYERS)

    def script(ring: Ring) -> None:
        ring.read(2)
        ring.read(1)
        ring.send(closes=1)
        ring.begin_again(1)
        ring.write(2, times=5)
        if isinstance(ring, Handing):
            for engine in ring.engines:
                awaited = engine.ahead.awaited(1)
                assert awaited is not None
                carry = [Tensor(dtype, shape, bytes(4 * math.prod(shape))) for dtype, shape in awaited.carry]
                awaited.begin([9 if other == "tokens" else 3], carry)
                assert engine.ahead.awaited(1) is None  # the device waits no more
        if other == "session":
            ring.read(1)
        ring.write(2, times=5)

    ring = both(model, Handing(model, [2]), script)
    assert min(ring.counts("num_dropped")) >= 1
    assert ring.counts("num_begun") == [0, 0]


def test_only_the_latest_frame_says_that_a_stage_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BuildAhead, "hand_over", lambda _: False)
    ring = Handing(write_checkpoint("llama", tmp_path / "llama", num_layers=LAYERS), [2])
    ring.read(2)
    ring.write(2, times=5)
    assert [engine.ahead.is_due(0.0) for engine in ring.engines] == [True, True]
    ring.read_chunk(2)
    assert [engine.ahead.is_due(0.0) for engine in ring.engines] == [False, False]


def test_whoever_comes_first_is_not_held_up(model: Path) -> None:
    def script(ring: Ring) -> None:
        ring.read(2)
        ring.write(2, times=5)
        ring.read(1)  # somebody else's prompt
        ring.write(2)
        ring.write(1, 2, times=2)
        ring.write(2)
        ring.send(closes=1)
        ring.write(2, times=5)
        ring.read_chunk(2)
        ring.write(2, times=5)
        ring.send(keeps=2)
        ring.read_copy(4, 2)
        ring.write(4, times=5)

    ring = both(model, Handing(model, [2]), script)
    assert min(ring.counts("num_handed_over")) >= 1 or not can_forget(model)
    assert min(ring.counts("num_dropped")) >= 2


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_and_when_the_results_are_the_same(model: Path, seed: int) -> None:
    def script(ring: Ring) -> None:
        chance = random.Random(seed)
        open_: list[int] = []
        for _ in range(40):
            closed = [session for session in PROMPTS if session not in open_]
            what = chance.random()
            if not open_ or (what < 0.1 and closed):
                session = chance.choice(closed)
                ring.begin_again(session)
                ring.read(session)
                open_.append(session)
            elif what < 0.2:
                session = chance.choice(open_)
                ring.send(closes=session)
                open_.remove(session)
            else:
                rows = chance.sample(open_, chance.randint(1, len(open_)))
                ring.write(*rows, times=chance.randint(1, 5))

    chance = random.Random(100 + seed)
    late, early = (lambda: chance.random() < 0.3), (lambda: chance.random() < 0.6)
    both(model, Handing(model, [2], late, early, begins=lambda: chance.random() < 0.5), script)


def test_a_new_epoch_abandons_what_was_handed_over(model: Path) -> None:
    def script(ring: Ring) -> None:
        for _ in range(2):
            ring.read(2)
            ring.write(2, times=4)
            for engine in ring.engines:
                engine.drop_sessions()
            ring.begin_again(2)

    ring = both(model, Handing(model, [2]), script)
    assert ring.counts("num_dropped") == [2, 2]


@pytest.mark.parametrize("what", ["hand_over", "abandon"])
def test_what_the_device_refuses_leaves_the_state_as_it_was(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step's own frame comes by the plain path, and another's is not the one that fails."""
    model = write_checkpoint("llama", tmp_path / "llama", num_layers=LAYERS)

    def refuse(*_: object) -> None:
        raise RuntimeError("out of memory")

    def script(ring: Ring) -> None:
        ring.read(2)
        ring.write(2, times=5)
        ring.read(1)
        ring.write(2, times=3)
        ring.write(1)

    monkeypatch.setattr(EmulatedLatch, what, refuse)
    ring = both(model, Handing(model, [2], builds_early=lambda: False), script)
    assert [engine.ahead._latches.is_on for engine in ring.engines] == [False, False]
    assert ring.counts("num_handed_over") == [0, 0] if what == "hand_over" else [2, 2]


@pytest.mark.parametrize("kind", ["llama", "mamba2"])
def test_a_copy_has_nothing_of_a_step_that_is_built_before_it_is_made(kind: str, tmp_path: Path) -> None:
    shard = load_shard(write_checkpoint(kind, tmp_path / kind, num_layers=3), 0, 3)
    frames = [prompt(1, 1, [72] * 9), row(2, (1, 9, 5)), row(3, (1, 10, 6))]
    frames[1].forks.add(session=50, from_session=1)
    frames.append(ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=4))
    frames[-1].opens.add(session=2, prompt_tokens=12, max_tokens=9, from_session=50, from_tokens=10)
    frames[-1].slots.add(session=2, position=10, tokens=[7])
    frames += [row(5, (2, 11, 3)), row(6, (1, 11, 4))]
    plain, engine = (Engine(shard, builds_ahead=is_ahead) for is_ahead in (False, True))
    num_early = 0
    for frame in frames:
        step = engine.begin(frame, ())
        step.start()
        num_early += engine.build_ahead()
        assert step.finish() == plain.step(frame, ())
    assert num_early >= 2


def kept(output: Output) -> tuple[ring_pb2.Frame, list[Tensor]]:
    """Its bytes are used again for later ones."""
    assert output is not None
    return output[0], [replace(tensor, data=bytes(tensor.data)) for tensor in output[1]]


def test_a_compute_thread_hands_steps_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its frames come one by one, as of one user; then two users', and one's again."""
    model = write_checkpoint("llama", tmp_path / "llama", num_layers=3)
    frames = [prompt(1, 1, [72] * 9), *(row(seq, (1, 7 + seq, 40 + seq)) for seq in range(2, 12))]
    frames += [prompt(12, 2, [65] * 5), row(13, (1, 19, 5)), row(14, (2, 5, 5)), row(15, (1, 20, 6))]
    frames += [
        row(16, (1, 21, 7), (2, 6, 8)),
        ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=17, closes=[2]),
    ]
    frames += [row(seq, (1, 4 + seq, 40 + seq)) for seq in range(18, 28)]
    plain = Engine(load_shard(model, 0, 2), builds_ahead=False)
    wanted = [kept(plain.step(frame, ())) for frame in frames]
    monkeypatch.setattr(compute, "Engine", functools.partial(Engine, builds_ahead=True, late_s=60.0))
    outputs: Queue[tuple[ring_pb2.Frame, list[Tensor]]] = Queue()
    failures: list[str] = []
    thread = compute.ComputeThread(
        lambda *output: outputs.put(kept(output)),
        lambda epoch: None,
        lambda epoch, reason: failures.append(reason),
        lambda loaded, total: None,
        overlaps=True,
    )
    thread.start()
    thread.post(LoadWork(1, model, "digest", 0, 2))
    for frame, output in zip(frames, wanted, strict=True):
        wait_for(lambda: thread.activity == "idle", WAIT_S)
        thread.post(StepWork(frame, (), lambda: None))
        assert outputs.get(timeout=WAIT_S) == output
    engine = thread.engine
    assert engine is not None
    assert thread.stop(WAIT_S)
    assert not failures
    assert engine.ahead.num_handed_over >= (10 - 2 - NUM_WAITS) + (10 - 2)
    assert engine.ahead.num_begun == engine.ahead.num_handed_over
    assert engine.ahead.num_late == 0
