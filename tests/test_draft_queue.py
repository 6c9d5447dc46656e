"""The draft model in the compute thread: in what order it works, what it answers, how it comes and goes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from cluster.compute import ComputeThread
from cluster.draft_load import DraftLoad
from cluster.draft_queue import DraftEnd, DraftWork
from cluster.drafter import DraftCall, Guessing
from cluster.work import LoadWork, StepWork
from planner.draft_bytes import READ_CHUNK_TOKENS, draft_part
from planner.model_profile import read_model_profile
from planner.node_profile import make_node
from proto import ring_pb2
from shard_loader.sources import HubError
from tests.reference import greedy
from tests.tiny_models import VOCAB_SIZE, write_checkpoint
from tests.waiting import wait_for

WAIT_S = 20.0
LAYERS, CONTEXT = 3, 2048
PROMPT = [(7 * i) % 250 for i in range(30)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("big"), num_layers=LAYERS, seed=1)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen3", tmp_path_factory.mktemp("small"), num_layers=1)


def load_of(
    folder: Path, fetch: Callable[[Callable[[int, int], None], threading.Event], Path] | None = None
) -> DraftLoad:
    profile = read_model_profile(folder)
    node = make_node(0, "n0", "h", memory_bytes=16 * 10**9)
    return DraftLoad(profile, draft_part(profile, node, CONTEXT, 4), folder, VOCAB_SIZE, fetch)


class Watched:
    """A compute thread and what it reported, in order."""

    def __init__(self) -> None:
        self.events: SimpleQueue[tuple[object, ...]] = SimpleQueue()
        self.progress: list[tuple[int, int]] = []
        self.thread = ComputeThread(
            lambda frame, _tensors: self.events.put(("output", frame.seq)),
            lambda epoch: self.events.put(("loaded", epoch)),
            lambda epoch, reason: self.events.put(("failed", epoch, reason)),
            lambda loaded, total: self.progress.append((loaded, total)),
        )
        self.thread.start()

    def next(self) -> tuple[object, ...]:
        return self.events.get(timeout=WAIT_S)

    def load(self, epoch: int, target: Path, wanted: DraftLoad | None, stop: int = LAYERS) -> None:
        self.thread.post(LoadWork(epoch, target, "digest", 0, stop, drafter=wanted))
        assert self.next() == ("loaded", epoch)

    def ask(self, session: int, tokens: list[int], num_drafts: int = 4, *, epoch: int = 1) -> None:
        call = DraftCall(session, tokens, num_drafts, ring_pb2.Sampling(), len(tokens))
        self.thread.post(
            DraftWork(epoch, call, lambda told: self.events.put((session, told.position, told.ids)))
        )

    def step(self, session: int, seq: int, *, opens: bool) -> None:
        frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=seq)
        if opens:
            frame.opens.add(session=session, prompt_tokens=1, max_tokens=99)
        frame.slots.add(session=session, position=0, tokens=[65], is_sampled=True)
        self.thread.post(StepWork(frame, (), lambda: None))


@pytest.fixture
def compute() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    assert watched.thread.stop(WAIT_S)
    assert watched.thread.drafts is None


class Gate:
    """Each piece of the draft model's work says that it begins, and waits for a release."""

    def __init__(self) -> None:
        self.begun, self.held = threading.Semaphore(0), threading.Semaphore(0)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made, step = Gate(), Guessing.step

    def waiting(self: Guessing) -> bool:
        made.begun.release()
        assert made.held.acquire(timeout=WAIT_S)
        return step(self)

    monkeypatch.setattr(Guessing, "step", waiting)
    yield made
    made.held.release(1000)


@pytest.mark.parametrize("stop", [LAYERS, 0])
def test_guesses_are_told_with_the_position_that_they_follow(
    stop: int, compute: Watched, target: Path, draft: Path
) -> None:
    """With layers beside it, and on a head that owns none."""
    compute.load(1, target, load_of(draft), stop)
    compute.ask(7, PROMPT)
    session, position, ids = compute.next()
    assert (session, position) == (7, len(PROMPT))
    assert isinstance(ids, list)
    assert greedy(draft, PROMPT, 4)[0][: len(ids)] == ids


def test_a_frame_goes_before_the_rest_of_a_window(
    compute: Watched, target: Path, draft: Path, gate: Gate
) -> None:
    compute.load(1, target, load_of(draft))
    long = [(3 * i) % 250 for i in range(3 * READ_CHUNK_TOKENS)]
    compute.ask(7, long)
    assert gate.begun.acquire(timeout=WAIT_S)
    compute.step(1, 11, opens=True)
    gate.held.release()
    assert compute.next() == (7, len(long), [])
    assert compute.next() == ("output", 11), "two pieces are still to be read"
    assert gate.begun.acquire(timeout=WAIT_S)
    assert compute.thread.activity == "drafting"


def test_those_that_only_read_on_let_others_go_before(compute: Watched, target: Path, draft: Path) -> None:
    compute.load(1, target, load_of(draft))
    long = [(3 * i) % 250 for i in range(8 * READ_CHUNK_TOKENS)]
    compute.ask(7, long)
    assert compute.next() == (7, len(long), [])
    compute.ask(8, PROMPT)
    session, position, _ = compute.next()
    assert (session, position) == (8, len(PROMPT))
    compute.ask(9, PROMPT, 0)  # nothing but to read
    assert compute.next() == (9, len(PROMPT), [])


def test_reading_is_told_of_when_all_but_the_last_token_is_read(
    compute: Watched, target: Path, draft: Path
) -> None:
    compute.load(1, target, load_of(draft))
    drafts = compute.thread.drafts
    assert drafts is not None
    compute.ask(7, [1] * (3 * READ_CHUNK_TOKENS), 0)
    assert compute.next() == (7, 3 * READ_CHUNK_TOKENS, [])
    assert drafts.drafter.num_passes == 3
    compute.ask(7, [1] * (3 * READ_CHUNK_TOKENS), 2)
    assert compute.next()[:2] == (7, 3 * READ_CHUNK_TOKENS)
    assert drafts.drafter.num_passes in (4, 5), "one for each guess; the first may be too unlikely"


def test_a_session_that_rests_has_no_pass_and_goes_on_where_it_was(
    compute: Watched, target: Path, draft: Path, gate: Gate
) -> None:
    compute.load(1, target, load_of(draft))
    drafts = compute.thread.drafts
    assert drafts is not None
    long = [1] * (8 * READ_CHUNK_TOKENS)
    compute.ask(7, long, 0)
    assert gate.begun.acquire(timeout=WAIT_S)
    compute.thread.post(DraftEnd(7, is_over=False))
    gate.held.release()
    compute.ask(8, [2, 3, 4], 1)
    gate.held.release(100)
    assert compute.next()[:2] == (8, 3), "nothing more of session 7"
    assert drafts.drafter.num_passes == 2
    assert drafts.is_in_use
    compute.thread.post(DraftEnd(8, is_over=False))
    wait_for(lambda: not drafts.is_in_use, WAIT_S, "all sessions rest")
    assert drafts.drafter.num_sessions == 2, "its caches stay"
    compute.ask(7, long, 0)
    assert compute.next() == (7, len(long), [])
    assert drafts.drafter.num_passes == 2 + 7
    compute.thread.post(DraftEnd(7))
    compute.ask(8, [2, 3, 4, 5], 1)
    assert compute.next()[0] == 8
    assert drafts.drafter.num_sessions == 1


def test_a_window_takes_the_place_of_an_earlier_one_and_an_end_of_any(
    compute: Watched, target: Path, draft: Path, gate: Gate
) -> None:
    compute.load(1, target, load_of(draft))
    compute.ask(7, PROMPT)
    compute.ask(7, [*PROMPT, 5])
    compute.ask(8, PROMPT)
    compute.thread.post(DraftEnd(8))
    compute.ask(9, PROMPT)
    gate.held.release(100)
    assert [compute.next()[:2], compute.next()[:2]] == [(7, len(PROMPT) + 1), (9, len(PROMPT))]
    assert compute.events.empty()


def test_without_a_draft_model_and_of_another_epoch_there_is_nothing(
    compute: Watched, target: Path, draft: Path
) -> None:
    compute.load(1, target, None)
    compute.ask(7, PROMPT)
    compute.thread.post(DraftEnd(7))
    assert compute.next() == (7, len(PROMPT), [])
    compute.load(2, target, load_of(draft))
    compute.ask(7, PROMPT, epoch=1)
    assert compute.next() == (7, len(PROMPT), [])


def test_it_is_loaded_once_for_many_epochs_and_its_sessions_end_with_theirs(
    compute: Watched, target: Path, draft: Path
) -> None:
    compute.load(1, target, load_of(draft))
    drafts, progress = compute.thread.drafts, list(compute.progress)
    assert drafts is not None
    total = drafts.drafter.shard.footprint.total_bytes
    assert progress[-1] == (total, total)
    compute.ask(7, PROMPT)
    assert compute.next()[0] == 7
    assert drafts.drafter.kv_bytes > 0
    compute.load(2, target, load_of(draft))
    assert compute.thread.drafts is drafts
    assert drafts.drafter.kv_bytes == 0
    assert compute.progress == progress
    compute.load(3, target, None)
    assert compute.thread.drafts is None


def test_what_the_draft_model_takes_is_no_scratch_of_the_layers(
    compute: Watched, target: Path, draft: Path
) -> None:
    compute.load(1, target, load_of(draft))
    compute.ask(7, [1] * 700, 0)
    assert compute.next()[0] == 7
    compute.step(1, 11, opens=True)
    assert compute.next() == ("output", 11)
    engine, drafts = compute.thread.engine, compute.thread.drafts
    assert engine is not None
    assert drafts is not None
    assert engine.memory.activation_bytes < drafts.drafter.shard.footprint.total_bytes


def test_a_guess_that_fails_is_none(
    compute: Watched, target: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute.load(1, target, load_of(draft))
    step = Guessing.step

    def failing(self: Guessing) -> bool:
        if self.call.session == 7:
            raise RuntimeError("planted")
        return step(self)

    monkeypatch.setattr(Guessing, "step", failing)
    compute.ask(7, PROMPT)
    compute.ask(8, PROMPT)
    assert compute.next() == (7, len(PROMPT), [])
    assert compute.next()[:2] == (8, len(PROMPT))
    drafts = compute.thread.drafts
    assert drafts is not None
    assert 7 not in drafts.drafter.readings


def test_it_is_fetched_first_and_said_so(compute: Watched, target: Path, draft: Path) -> None:
    seen = []

    def fetch(on_progress: Callable[[int, int], None], stopping: threading.Event) -> Path:
        on_progress(3, 10)
        seen.append((compute.thread.activity, compute.thread.load.total_bytes))
        return draft

    compute.load(1, target, load_of(draft, fetch))
    assert seen == [("fetching", 10)]


def test_a_load_that_fails_names_the_draft_model(
    compute: Watched, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = write_checkpoint("llama", tmp_path / "broken", num_layers=1)
    wanted = load_of(broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"layers.0.mlp.up_proj", b"layers.0.mlp.up_prof"))
    compute.thread.post(LoadWork(1, target, "digest", 0, LAYERS, drafter=wanted))
    reason = "the checkpoint lacks tensor 'model.layers.0.mlp.up_proj.weight'"
    assert compute.next() == ("failed", 1, f"loading the draft model broken failed: {reason}")

    def fetch(on_progress: Callable[[int, int], None], stopping: threading.Event) -> Path:
        raise HubError("the hub is down")

    compute.thread.post(LoadWork(2, target, "digest", 0, LAYERS, drafter=load_of(tmp_path / "broken", fetch)))
    assert compute.next() == ("failed", 2, "fetching the draft model broken failed: the hub is down")
