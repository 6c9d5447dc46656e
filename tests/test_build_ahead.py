"""Steps that are built while a stage waits: the same numbers, whatever comes instead."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from cluster.build_ahead import REST_STEPS, TRUST, BuildAhead
from cluster.engine import Engine
from cluster.grammar import choice_grammar
from cluster.guide_process import GuideProcess
from proto import ring_pb2
from shard_loader.ahead import Ahead, ReadsNumbersError, kind_of
from shard_loader.carry import flatten, to_wire
from shard_loader.host_arrays import TURNS, HostArrays
from shard_loader.rehearsal import Rehearsal
from shard_loader.weights import load_shard
from tests.test_engine import trip
from tests.test_overlap import WAIT_S, prompt, row
from tests.tiny_models import write_checkpoint
from tests.zoo.configs import zoo_config

LAYERS = 5
LONG = pytest.mark.long
# Plain, rotating, recurrent and latent caches; the last take twice as long, and one test each time
KINDS = ["llama", "gpt_oss", "mamba2", pytest.param("deepseek_v3", marks=LONG)]
PROMPTS = {
    1: [72, 101, 108, 108, 111, 44, 32, 119, 3, 14, 15, 92],  # longer than the windows
    2: [65, 3, 58],
    3: [9, 79, 32, 38, 46, 26],
}
SAMPLING = {
    1: ring_pb2.Sampling(logprobs=True, top_logprobs=2),
    2: ring_pb2.Sampling(temperature=0.8, seed=11, logprobs=True),
    3: ring_pb2.Sampling(frequency_penalty=1.5, logprobs=True),  # reads the history
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param), num_layers=LAYERS)


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("deepseek_v3", tmp_path_factory.mktemp("latent"), num_layers=LAYERS)


class Ring:
    """Engines in a row that build ahead after every frame, or never."""

    def __init__(
        self, model: Path, cuts: Sequence[int], *, is_ahead: bool, late_s: float | None = None
    ) -> None:
        bounds = itertools.pairwise([0, *cuts, LAYERS])
        self.engines = [
            Engine(load_shard(model, a, b), builds_ahead=is_ahead, late_s=late_s) for a, b in bounds
        ]
        self.last = {session: prompt[-1] for session, prompt in PROMPTS.items()}
        self.position = {session: len(prompt) - 1 for session, prompt in PROMPTS.items()}
        self.results: list[ring_pb2.Frame] = []
        self.seq = 0

    @property
    def num_taken(self) -> list[int]:
        return [engine.ahead.num_taken for engine in self.engines]

    @property
    def num_dropped(self) -> list[int]:
        return [engine.ahead.num_dropped for engine in self.engines]

    def send(self, *slots: ring_pb2.Slot, opens: Sequence[ring_pb2.SessionSpec] = (), **ended: int) -> None:
        self.seq += 1
        frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=self.seq, slots=slots, opens=opens)
        frame.is_batched = len(slots) > 1
        for what, session in ended.items():
            getattr(frame, what).append(session)
        frame.keep_tokens.extend(self.position[session] for session in frame.keeps)
        result = self.trip(frame)
        if result is not None:
            self.results.append(result)
        for engine in self.engines:
            while engine.prepare():
                pass

    def trip(self, frame: ring_pb2.Frame) -> ring_pb2.Frame | None:
        return trip(self.engines, frame)

    def read(self, session: int) -> None:
        prompt = PROMPTS[session]
        spec = ring_pb2.SessionSpec(
            session=session, prompt_tokens=len(prompt), max_tokens=30, sampling=SAMPLING[session]
        )
        self.send(ring_pb2.Slot(session=session, tokens=prompt[:-1]), opens=[spec])

    def read_chunk(self, session: int) -> None:
        position = self.position[session]
        self.send(ring_pb2.Slot(session=session, position=position, tokens=[self.last[session], 4, 5]))
        self.position[session], self.last[session] = position + 3, 6

    def read_copy(self, session: int, source: int) -> None:
        position = self.position[source]
        copy = ring_pb2.SessionSpec(
            session=session, prompt_tokens=99, max_tokens=9, from_session=source, from_tokens=position
        )
        self.send(ring_pb2.Slot(session=session, position=position, tokens=[8, 9]), opens=[copy])
        self.last[session], self.position[session] = 10, position + 2

    def begin_again(self, session: int) -> None:
        self.position[session], self.last[session] = len(PROMPTS[session]) - 1, PROMPTS[session][-1]

    def write(self, *sessions: int, times: int = 1, **ended: int) -> None:
        for _ in range(times):
            slots = [
                ring_pb2.Slot(session=s, position=self.position[s], tokens=[self.last[s]], is_sampled=True)
                for s in sessions
            ]
            self.send(*slots, **ended)
            for slot in self.results[-1].slots:
                assert not slot.error, slot.error
                self.last[slot.session] = slot.result.id
                self.position[slot.session] += 1


def both(model: Path, cuts: Sequence[int], script: Callable[[Ring], object]) -> Ring:
    """The ring that builds ahead, after a script that gave the same results without."""
    plain, ahead = (Ring(model, cuts, is_ahead=is_ahead) for is_ahead in (False, True))
    script(plain)
    script(ahead)
    assert ahead.results == plain.results
    assert not any(plain.num_taken)
    return ahead


@pytest.mark.parametrize("cuts", [[], pytest.param([2], marks=LONG), [1, 4]])
def test_one_answer_takes_every_step_but_the_first(model: Path, cuts: list[int]) -> None:
    def script(ring: Ring) -> None:
        ring.read(1)
        ring.write(1, times=9)

    ring = both(model, cuts, script)
    assert ring.num_taken == [8] * (len(cuts) + 1)
    assert ring.num_dropped == [0] * (len(cuts) + 1)


def three_rows(ring: Ring) -> None:
    for session in PROMPTS:
        ring.read(session)
    ring.write(1, 2, 3, times=6)


def test_rows_take_theirs(model: Path) -> None:
    assert both(model, [2], three_rows).num_taken == [5, 5]


def test_rows_with_latent_caches_take_theirs(latent_model: Path) -> None:
    assert both(latent_model, [2], three_rows).num_taken == [5, 5]


def test_frames_in_turns_take_the_one_that_waits_longest(model: Path) -> None:
    def script(ring: Ring) -> None:
        ring.read(1)
        ring.read(2)
        for _ in range(5):
            ring.write(1)
            ring.write(2)

    ring = both(model, [2], script)
    assert min(ring.num_taken) >= 7
    assert max(ring.num_dropped) <= 1


def test_whatever_comes_instead_is_the_same(model: Path) -> None:
    def script(ring: Ring) -> None:
        ring.read(1)
        ring.write(1, times=3)
        ring.read(2)  # somebody else's prompt
        ring.write(1)
        ring.write(1, 2, times=2)  # another joins
        ring.write(2)  # one of two
        ring.write(2, 1)
        ring.read(3)
        ring.write(1, 2, 3, times=2)
        ring.send(closes=2)
        ring.write(1, 3, times=2)
        ring.read_chunk(1)
        ring.write(1, times=2)
        ring.send(keeps=3)
        ring.read_copy(4, 3)
        ring.write(4, times=3)
        ring.write(4, 1, times=3)

    ring = both(model, [2], script)
    assert min(ring.num_taken) >= 6
    assert min(ring.num_dropped) >= 4


def test_a_new_epoch_drops_what_was_built(model: Path) -> None:
    def script(ring: Ring) -> None:
        ring.read(1)
        ring.write(1, times=3)
        for engine in ring.engines:
            engine.drop_sessions()
        ring.begin_again(1)
        ring.read(1)
        ring.write(1, times=3)

    ring = both(model, [2], script)
    assert ring.num_dropped == [1, 1]
    assert ring.num_taken == [4, 4]


def test_a_step_that_cannot_be_leaves_the_others_alone(model: Path) -> None:
    ring = Ring(model, [2], is_ahead=True)
    ring.read(1)
    ring.read(2)
    ring.write(1, times=3)
    ring.send(ring_pb2.Slot(session=1, position=77, tokens=[5], is_sampled=True))
    assert "is at position" in ring.results[-1].slots[0].error
    ring.write(2, times=2)
    plain = Ring(model, [2], is_ahead=False)
    plain.read(2)
    plain.write(2, times=2)
    assert [slot.result for frame in ring.results[-2:] for slot in frame.slots] == [
        slot.result for frame in plain.results[-2:] for slot in frame.slots
    ]


def test_a_row_that_failed_on_its_way_here_takes_no_step_that_was_built(model: Path) -> None:
    def script(ring: Ring) -> None:
        for session in PROMPTS:
            ring.read(session)
        ring.write(1, 2, 3, times=3)
        slots = [ring_pb2.Slot(session=s, position=ring.position[s], is_sampled=True) for s in PROMPTS]
        for slot in slots:
            slot.tokens.append(ring.last[slot.session])
        slots[1].error = "lost before"
        ring.send(*slots)
        for slot in ring.results[-1].slots:
            assert slot.error == ("lost before" if slot.session == 2 else "")
            ring.last[slot.session] = slot.result.id
            ring.position[slot.session] += slot.session != 2
        ring.write(1, 3, times=4, closes=2)

    ring = both(model, [2], script)
    assert ring.num_dropped == [1, 1]
    assert min(ring.num_taken) >= 2 + 2


def test_a_step_that_waits_while_others_go_by_writes_over_none_of_their_numbers(tmp_path: Path) -> None:
    """Its placeholders are not given out again: it is taken while the latest of the others still runs."""
    shard = load_shard(write_checkpoint("llama", tmp_path / "llama", num_layers=3), 0, 3)
    frames = [prompt(1, 1, [72] * 9), prompt(2, 2, [65] * 9), row(3, (1, 9, 5))]
    frames += [row(4 + i, (2, 9 + i, 100 + i)) for i in range(TURNS)]
    taken = row(4 + TURNS, (1, 10, 7))
    plain = Engine(shard, builds_ahead=False)
    wanted = [plain.step(frame, ()) for frame in [*frames, taken]]
    engine = Engine(shard, builds_ahead=True)
    engine._host = HostArrays(is_kept=True)
    engine.ahead = BuildAhead(shard, engine.adapters.use, engine._host, engine._landing, is_on=True)
    outputs = []
    for frame in frames[:-1]:
        outputs.append(engine.step(frame, ()))
        assert engine.prepare() == (frame is frames[2])
    steps = [engine.begin(frame, ()) for frame in (frames[-1], taken)]
    assert outputs + [step.finish() for step in steps] == wanted
    assert engine.ahead.num_taken == 1


def test_a_prompt_that_comes_token_by_token_has_all_its_scores(model: Path) -> None:
    def script(ring: Ring) -> None:
        prompt = PROMPTS[1]
        spec = ring_pb2.SessionSpec(session=1, prompt_tokens=len(prompt), max_tokens=5)
        spec.sampling.prompt_logprobs = True
        for at, token in enumerate(prompt):
            slot = ring_pb2.Slot(session=1, position=at, tokens=[token], is_sampled=at + 1 == len(prompt))
            ring.send(slot, opens=[] if at else [spec])
        assert [t.id for out in ring.results for t in out.slots[0].prompt] == prompt[1:]

    assert min(both(model, [2], script).num_taken) >= len(PROMPTS[1]) - 2


def test_it_rests_where_it_does_not_pay(tmp_path: Path) -> None:
    ring = Ring(write_checkpoint("llama", tmp_path / "llama", num_layers=LAYERS), [], is_ahead=True)
    for session in PROMPTS:
        ring.read(session)
    ring.write(1, 2)
    for _ in range(TRUST):
        ring.write(1)
        ring.write(1, 2)
    (ahead,) = (engine.ahead for engine in ring.engines)
    assert ahead._rest > REST_STEPS - 4 * TRUST
    ring.write(1, times=2)
    assert (ahead.num_taken, ahead._built) == (0, None)


def test_short_answers_do_not_make_it_rest(tmp_path: Path) -> None:
    """What was built behind an answer's last token is dropped, and the next answer's steps are built."""
    ring = Ring(write_checkpoint("llama", tmp_path / "llama", num_layers=LAYERS), [], is_ahead=True)
    for _ in range(2 * TRUST):
        ring.read(1)
        ring.write(1)
        ring.send(closes=1)
        ring.position[1] = len(PROMPTS[1]) - 1
    (ahead,) = (engine.ahead for engine in ring.engines)
    assert (ahead.num_taken, ahead.num_dropped) == (0, 2 * TRUST)
    ring.read(2)
    ring.write(2, times=5)
    assert ahead.num_taken == 4


def test_who_leaves_a_frame_that_waited_leaves_nothing_of_what_was_built_upon_it(tmp_path: Path) -> None:
    """Its step of two rows is built, then one is closed: put back later, it would have both rows again."""
    model = write_checkpoint("llama", tmp_path / "llama", num_layers=3)
    shard = load_shard(model, 0, 3)
    results = []
    for is_ahead in (False, True):
        with closing(GuideProcess(model, shard.vocab_size)) as guides:
            process = guides.open(choice_grammar(["x"]))._child.process
            process.send_signal(signal.SIGSTOP)
            engine = Engine(shard, guides=guides, builds_ahead=is_ahead)
            outputs, early = [], []
            for session, grammar in ((1, choice_grammar(["ab", "cd"])), (2, ""), (3, "")):
                frame = prompt(session, session, [72, 65, session])
                frame.opens[0].sampling.grammar = grammar
                outputs.append(engine.step(frame, ()))
            both = row(4, (1, 3, 66), (2, 3, 66))
            compiled = engine.waits_for(both)
            assert compiled is not None
            assert engine.step(ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=5, closes=[1]), ()) is None
            process.send_signal(signal.SIGCONT)
            compiled.result(WAIT_S)
            assert engine.waits_for(both) is None
            for frame in (both, row(6, (3, 3, 5), closes=[9]), row(7, (2, 4, 5))):
                step = engine.begin(frame, ())
                step.start()
                early.append(engine.build_ahead())
                outputs.append(step.finish())
        assert early[0] == is_ahead
        results.append(outputs)
    assert results[0] == results[1]


@pytest.mark.parametrize("is_kept", [False, True])
def test_numbers_written_in_place_are_seen(*, is_kept: bool) -> None:
    """Token ids on the first stage, the carry on the next."""
    host = HostArrays(is_kept=is_kept)
    rehearsal = Rehearsal(zoo_config("qwen3"))
    first, last = rehearsal.shards([2])
    tokens = rehearsal.tokens(1, 8)
    states = [first.new_state(), last.new_state()]
    plain = [first.new_state(), last.new_state()]
    for pair in (states, plain):
        carry = first.forward(tokens[:, :5], None, pair[0])
        last.forward(tokens[:, :5], carry, pair[1])
    wanted_carry = first.forward(tokens[:, 5:6], None, plain[0])
    wanted = last.forward(tokens[:, 5:6], wanted_carry, plain[1])
    arrays, structure = flatten(wanted_carry)
    mx.eval(arrays)
    wire = [to_wire(array) for array in arrays]
    builds = [
        Ahead(first, states[0], 1, (), "", host=host),
        Ahead(last, states[1], 1, kind_of(wire), structure, host=host),
    ]
    ids = [int(tokens[0, 5].item())]
    assert np.array_equal(np.array(builds[0].fill(ids, ())), np.array(wanted_carry))
    assert np.array_equal(np.array(builds[1].fill(ids, wire)), np.array(wanted))
    assert not np.array_equal(np.array(wanted_carry), np.zeros(wanted_carry.shape))


def test_a_model_whose_code_reads_numbers_is_found_out() -> None:
    """dbrx asks which experts were chosen, and builds for those."""
    (shard,) = Rehearsal(zoo_config("dbrx")).shards([])
    state = shard.new_state()
    mx.eval(shard.forward(mx.array([[1, 2, 3]]), None, state))
    with pytest.raises(ReadsNumbersError, match="reads numbers while it builds"):
        Ahead(shard, state, 1, (), "", host=HostArrays(is_kept=False))
    assert state.position == 3
