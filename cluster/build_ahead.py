"""Which step a stage builds while it waits: the next token of those whose turn it is. Compute thread only.

Where another frame comes first, what was built is dropped and the plain path is taken: it is the same step.
Who is alone and waits for short times only is even handed over to the device, where that can wait for numbers
(`shard_loader/latch.py`), and the step after it is built, too: so no stage's frame waits for Python.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from cluster.awaited import Awaited
from cluster.built_steps import Built, Taken, Team
from cluster.handed_over import HandedOver
from cluster.row_draws import RowDraws
from cluster.sampler import draw_rows
from cluster.session import Session
from proto import ring_pb2
from proto.codec import Tensor
from shard_loader.ahead import Ahead, can_save, kind_of, kinds_of
from shard_loader.batch_state import BatchState
from shard_loader.growing import grows_at
from shard_loader.host_arrays import HostArrays
from shard_loader.landing import Landing
from shard_loader.latch import Latch, Latches
from shard_loader.reach import can_forget
from shard_loader.rehearsal import UNSUITABLE
from shard_loader.shard import Shard
from shard_loader.state import ShardState

logger = logging.getLogger(__name__)

MAX_TEAMS = 64
TRUST = 4  # so many more steps must be dropped than taken before it rests
REST_STEPS = 256
NUM_WAITS = 2  # for the latest frames: all short, or no step is handed over


class BuildAhead:
    """One step at most is built, or two of who is alone.

    use: makes the model be that of an adapter. late_s: emulates latches.
    """

    def __init__(
        self,
        shard: Shard,
        use: Callable[[str], object],
        host: HostArrays,
        landing: Landing,
        *,
        is_on: bool,
        late_s: float | None = None,
    ) -> None:
        self._shard, self._use, self._host, self.is_on = shard, use, host, is_on
        self._landing, self._latches = landing, Latches(host, emulated_s=late_s)
        self._reach, self._trim_window = shard.reach, shard.trim_window or 0
        self._teams: dict[tuple[int, ...], Team] = {}  # the one that waits longest is first
        self._built: Built | None = None
        self._next: Built | None = None  # upon that one, while the device waits for its numbers
        self._trust, self._rest = TRUST, 0
        self._waits_s: deque[float] = deque(maxlen=NUM_WAITS)  # from a step's being ready to its frame
        self._build_s = 0.0  # that the latest one took
        self._is_short = True  # the device computes a step in less
        self.began = math.inf  # perf_counter(): the latest frame's step, where who brought it let it begin
        self._is_behind = False  # the latest one could have waited on the device for its frame, and did not
        self.num_taken = self.num_dropped = 0
        self.num_handed_over = self.num_late = 0  # of those that were taken
        self.num_begun = 0  # of those handed over: who brought the frame let them begin

    def prepare(self, *, is_alone: bool = False) -> bool:
        """Build a step, if there is one to expect; False: there is nothing to do.

        is_alone: the device has nothing else to do until its frame comes, so that `hand_over` may follow.
        """
        if not self.is_on or self._rest or not self._teams:
            return False
        first = self._built
        if first is None:
            team = next(iter(self._teams.values()))
        elif is_alone and self._is_short and first.handed_over is not None and self._next is None:
            team = first.team
        else:
            return False
        state = team.state()
        if state is None or not can_save(state):
            self._teams.pop(team.numbers, None)
            return False
        self._use(team.sessions[0].spec.adapter)
        began = time.perf_counter()
        latch = self._latch(team, state) if is_alone else None
        rows = len(team.sessions)
        try:
            ahead = Ahead(self._shard, state, rows, team.carry, team.structure, host=self._host, latch=latch)
        except UNSUITABLE as error:  # ReadsNumbersError is one of them
            logger.info("steps are not built ahead: %s", error)
            self.is_on = False
            return False
        draws = self._draws(team.sessions, ahead.out, num_before=int(first is not None))
        since = time.perf_counter()
        built = Built(team, state, ahead, draws, None, since - began, since)
        self._built, self._next = (built, None) if first is None else (first, built)
        self._build_s = built.took_s
        return True

    def hand_over(self) -> bool:
        """Let the device have what is built, where it can wait for the numbers. It has done all else."""
        built = self._built
        if built is None or built.handed_over is not None or not built.ahead.can_wait:
            return False
        assert isinstance(built.state, ShardState)
        parts = built.ahead, built.state, built.draws, self._landing
        try:
            handed_over = HandedOver.of(*parts, is_last=self._shard.is_last)
        except (RuntimeError, ValueError) as error:  # the device's: its request will tell its client
            self._latches.give_up(error)
            self._built = None
            self._teams.pop(built.team.numbers, None)
            self._undo(built)
            return False
        self._built = replace(built, handed_over=handed_over, since=time.perf_counter())
        return True

    def is_due(self, sure_s: float) -> bool:
        """Whether to build the next step while the device computes one, which takes so long for sure.

        Where that is too short, the waiting for its frame is the time; unless that was too short, too.
        """
        self._is_short = sure_s <= self._build_s
        return self._is_behind or not self._is_short

    def awaited(self, epoch: int) -> Awaited | None:
        """The frame that the device waits for, if it does."""
        built = self._built
        if built is None or built.handed_over is None or built.ahead.has_begun:
            return None
        team, session, begin = built.team, built.team.sessions[0], built.ahead.begin
        what = session.spec.session, session.position, team.carry, team.structure
        return Awaited(epoch, *what, self._shard.vocab_size, begin)

    def _latch(self, team: Team, state: ShardState | BatchState) -> Latch | None:
        """Where this step may be handed over: its frame comes soon, and its caches can forget its token."""
        if not isinstance(state, ShardState) or self._shard.is_whole or not team.is_sampled:
            return None  # a stage by itself never waits; others may build upon a part of a prompt
        if len(self._waits_s) < NUM_WAITS or max(self._waits_s) > self._latches.bound_s / 2:
            return None
        if grows_at(state.position):
            return None  # that may be more than the device's queue takes
        if not can_forget(self._reach, self._trim_window, state.position + 1):
            return None
        return self._latches.of(kinds_of(1, team.carry))

    def clear_way(self, frame: ring_pb2.Frame) -> None:
        """A frame comes: what was built is dropped where its sessions do anything else but this step."""
        self.began, self._is_behind = math.inf, False
        touched = {*frame.closes, *frame.keeps, *(spec.from_session for spec in frame.opens)}
        touched.update(fork.from_session for fork in frame.forks)
        slots = tuple(slot.session for slot in frame.slots)
        for numbers in list(self._teams):
            if not touched.isdisjoint(numbers) or (numbers != slots and not set(slots).isdisjoint(numbers)):
                del self._teams[numbers]
        if self._rest:
            self._rest -= 1
        built = self._built
        if built is not None:
            numbers = built.team.numbers
            is_other = numbers != slots and not set(slots).isdisjoint(numbers)
            is_aside = numbers == slots and not built.team.goes_on_with(frame.slots)
            is_over = not touched.isdisjoint(numbers)
            is_held_up = built.handed_over is not None and numbers != slots  # it would wait behind the latch
            if is_over or is_other or is_aside or is_held_up:
                self.drop(is_over=is_over)

    def take(
        self, slots: Sequence[ring_pb2.Slot], sessions: Sequence[Session], carry: Sequence[Tensor]
    ) -> Taken | None:
        """The step of these slots where it is the one that was built, with its numbers."""
        is_step = all(len(slot.tokens) == 1 for slot in slots)
        structure = slots[0].structure
        built = self._built
        taken = None
        if built is not None and built.team.numbers == tuple(slot.session for slot in slots):
            is_it = is_step and built.team.carry == kind_of(carry) and built.team.structure == structure
            is_it = is_it and (built.handed_over is None or slots[0].is_sampled)  # else others build upon it
            is_it = is_it and built.ahead.suits(tokens := [slot.tokens[0] for slot in slots], carry)
            if is_it and all(a is b for a, b in zip(built.team.sessions, sessions, strict=True)):
                self._built, self._next = self._next, None
                self.began = built.ahead.began
                self.num_begun += built.ahead.has_begun
                self._is_behind = built.ahead.can_wait and not built.ahead.has_begun
                self.num_taken += 1
                self._trust = min(self._trust + 1, TRUST)
                self._waits_s.append(time.perf_counter() - built.since)
                out = built.ahead.fill(tokens, carry)
                # Behind a part of a prompt nothing is drawn, and its tokens may be scored by what is there.
                draws = built.draws if slots[0].is_sampled else None
                taken = Taken(built.state, out, draws, built.handed_over)
            else:
                self.drop()
        if self.is_on and is_step:
            team = Team(tuple(sessions), kind_of(carry), structure, slots[0].is_sampled)
            self._teams.pop(team.numbers, None)
            self._teams[team.numbers] = team
            if len(self._teams) > MAX_TEAMS:
                del self._teams[next(iter(self._teams))]
        return taken

    def was_in_time(self, handed_over: HandedOver) -> bool:
        """It was taken, and is computed: whether with its numbers. If not, the state is as before."""
        self.num_handed_over += 1
        was_in_time = handed_over.ahead.was_open()
        following_s = 0.0 if self._built is None else self._built.took_s  # which may have waited for this one
        self._latches.note(max(handed_over.took_s, following_s), was_open=was_in_time)
        if not was_in_time:
            self.drop()  # it was built upon this one
            handed_over.ahead.forget()
            handed_over.give_back()
            self.num_late += 1
        return was_in_time

    def drop(self, *, is_over: bool = False) -> None:
        """What was built is undone. is_over: an answer has ended, which says nothing about the next ones."""
        built, following, self._built, self._next = self._built, self._next, None, None
        if built is None:
            return
        if following is not None:
            self._undo(following)
        self._undo(built)
        self.num_dropped += 1
        self._trust -= not is_over
        if self._trust <= 0:  # it does not pay here and now
            self._trust, self._rest = TRUST, REST_STEPS

    def _undo(self, built: Built) -> None:
        try:
            built.ahead.undo()
        except RuntimeError as error:  # the device's, and not the frame's that comes now
            self._latches.give_up(error)
            return
        if built.handed_over is not None:
            built.handed_over.give_back()

    def forget(self, sessions: Iterable[int]) -> None:
        """These sessions are no more, with all that was built for them."""
        gone = set(sessions)
        if self._built is not None and not gone.isdisjoint(self._built.team.numbers):
            self.drop(is_over=True)
        for numbers in list(self._teams):
            if not gone.isdisjoint(numbers):
                del self._teams[numbers]

    def _draws(self, sessions: Sequence[Session], out: Any, num_before: int) -> RowDraws | None:
        if not self._shard.is_last:
            return None
        rows = []
        for session in sessions:
            if session.sampler is None or session.sampler.reads_history:
                return None
            position = session.position + num_before + 1
            rows.append((session.sampler, position, session.history, session.spec.prompt_tokens))
        assert isinstance(out, mx.array)
        return draw_rows(rows, out[:, -1])
