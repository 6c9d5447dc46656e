"""One stage's work on one frame: open, close, compute. Owned by the compute thread, which owns all of MLX."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace

import mlx.core as mx

from cluster.build_ahead import BuildAhead
from cluster.fault import Fault, injected, overlaps_steps
from cluster.guide import Guides
from cluster.guide_process import GuideProcess
from cluster.last_stage import Answers
from cluster.open_sessions import OpenSessions, about
from cluster.session import Session
from cluster.slots import add_failed, add_read, advance, answer_to, passed_on, take_back
from cluster.step import Output, Step, Steps, Wanted
from cluster.step_memory import StepMemory
from cluster.step_stats import StepStats
from cluster.trace_layers import forward
from cluster.trace_recorder import Kind, recorder
from kernels import backend
from proto import ring_pb2
from proto.codec import Tensor
from shard_loader.adapters import Adapters
from shard_loader.batch_state import BatchState
from shard_loader.carry import flatten, unflatten
from shard_loader.expert_kernels import distrust_kernels
from shard_loader.host_arrays import HostArrays
from shard_loader.landing import Landing
from shard_loader.reach import Reach
from shard_loader.shard import Shard
from shard_loader.state import ShardState
from shard_loader.trim import clear_cache

logger = logging.getLogger(__name__)

MAX_ERROR_CHARS = 4000  # of a failure's text in a frame
KV_MEASURE_STEPS = 32  # decode steps between two sums over all caches


_Compiled = Future[tuple[bytes, bytes]]  # a grammar's first mask


class Engine:
    """Runs frames on a shard. `step` turns an incoming STEP into the frame for the next hop."""

    def __init__(
        self,
        shard: Shard,
        adapters: Adapters | None = None,
        guides: Guides | GuideProcess | None = None,
        *,
        builds_ahead: bool | None = None,  # None: where the device is not the processor that builds
        late_s: float | None = None,  # for tests: steps are handed over ahead, and too late after so long
    ) -> None:
        self.shard = shard
        self.adapters = adapters or Adapters()
        self.guides = guides  # None: answers cannot be held to a grammar
        self._open = OpenSessions(shard, self.adapters, guides)
        self.sessions = self._open.by_number
        # By seq, of frames that wait: which opens failed, and the sessions, which are closed afterwards.
        self._begun: dict[int, tuple[dict[int, str], frozenset[int]]] = {}
        self._waiting: dict[int, tuple[int, _Compiled]] = {}  # by session: the first such frame, and for what
        self.trim_window, self.reach = shard.trim_window, shard.reach  # any thread may read
        self.stats = StepStats()
        is_gpu = mx.default_device().type == mx.gpu
        if builds_ahead is None:
            is_lazy = backend.current() != "emulated"  # what is built computes nothing
            builds_ahead = is_lazy and overlaps_steps(is_gpu)
        has_own_memory = is_gpu and mx.cuda.is_available()
        self._host, self._landing = HostArrays(is_kept=has_own_memory), Landing(is_kept=has_own_memory)
        self.ahead = BuildAhead(
            shard, self.adapters.use, self._host, self._landing, is_on=builds_ahead, late_s=late_s
        )
        self._error_at = int(injected(Fault.STEP_ERROR_AT))
        num_layers = shard.stop - shard.start
        self._delay_s = injected(Fault.LAYER_DELAY_MS) / 1e3 * num_layers
        self._token_delay_s = injected(Fault.TOKEN_DELAY_US) / 1e6 * num_layers
        self._ended = 0.0  # when the last step ended
        self._is_gpu = is_gpu
        self.has_spare = False  # MLX keeps freed buffers, as many as `MemoryLimits` lets it
        self.memory = StepMemory()

    @property
    def num_sessions(self) -> int:
        """Requests that run; any thread."""
        return self._open.num_running

    def drop_sessions(self) -> None:
        """A new epoch: every session of the old one ends, and its memory is given back."""
        if self.sessions:
            self.ahead.forget(self.sessions)
            self._open.clear()
            self._begun.clear()
            self._waiting.clear()
            self.memory.measure(0)
            clear_cache()

    def step(self, frame: ring_pb2.Frame, tensors: Sequence[Tensor]) -> Output:
        """The frame for the next hop with its tensors, or None if nothing has to go there.

        A slot that fails carries its error onward instead of a carry: its request ends with it,
        and no other request of the frame notices.
        """
        return self.begin(frame, tensors).finish()

    def begin(self, frame: ring_pb2.Frame, tensors: Sequence[Tensor]) -> Step:
        """The same, built but not evaluated. Steps end in the order in which they began."""
        return Step(self._run(frame, tensors), frame.seq)

    def _run(self, frame: ring_pb2.Frame, tensors: Sequence[Tensor]) -> Steps[Output]:
        started = time.perf_counter()
        shard = self.shard
        self.ahead.clear_way(frame)
        failed, _ = self._begun.pop(frame.seq, None) or (self._begin(frame), None)
        if self._waiting:
            self._waiting = {s: first for s, first in self._waiting.items() if first[0] != frame.seq}
        if shard.is_last and not frame.slots:
            return None
        out = answer_to(frame) if shard.is_last else passed_on(frame)
        if frame.is_batched:
            out_tensors = yield from self._rows(frame, tensors, failed, out)
        else:
            out_tensors = yield from self._slots(frame, tensors, failed, out)
        failures = {slot.session for slot in out.slots if slot.error}
        # Its next step may be built by now: what is copied, kept or closed here is as this frame left it.
        if late := [*(fork.from_session for fork in frame.forks), *self._open.late]:
            self.ahead.forget(late)
        for fork in frame.forks:
            if fork.from_session not in failures:
                self._open.fork(fork)
        self._open.close_late(self._begun_sessions)
        if frame.slots:
            if self._delay_s or self._token_delay_s:
                num_tokens = sum(len(slot.tokens) for slot in frame.slots)
                time.sleep(max(self._delay_s, num_tokens * self._token_delay_s))
            self._count(frame, min(started, self.ahead.began))
        return out, out_tensors

    def waits_for(self, frame: ring_pb2.Frame) -> _Compiled | None:
        """What must be done before a token of this frame can be drawn: a grammar is being compiled.

        The frame's sessions are opened and closed now. `step` can be called when that is done; until then
        frames of others come first, but none of the same sessions.
        """
        if not isinstance(self.guides, GuideProcess):
            return None
        if frame.seq not in self._begun:
            self.ahead.clear_way(frame)
            self._begun[frame.seq] = self._begin(frame), frozenset(slot.session for slot in frame.slots)
        for slot in frame.slots:
            first, compiled = self._waiting.get(slot.session, (frame.seq, None))
            session = self.sessions.get(slot.session)
            if first == frame.seq:
                sampler = None if session is None or not slot.is_sampled else session.sampler
                compiled = None if sampler is None else sampler.compiling
            if compiled is not None:
                for waiting in frame.slots:
                    self._waiting.setdefault(waiting.session, (frame.seq, compiled))
                return compiled
        return None

    @property
    def _begun_sessions(self) -> frozenset[int]:
        """Those of frames that wait."""
        return frozenset().union(*(sessions for _, sessions in self._begun.values()))

    def _begin(self, frame: ring_pb2.Frame) -> dict[int, str]:
        """Opens and closes sessions; why some could not be opened."""
        failed = self._open.begin(frame, self._begun_sessions)
        if frame.closes:
            self._give_back()
        if (frame.closes or frame.keeps) and not frame.slots:
            self._measure_kv()
        return failed

    def _slots(
        self,
        frame: ring_pb2.Frame,
        tensors: Sequence[Tensor],
        failed: Mapping[int, str],
        out: ring_pb2.Frame,
    ) -> Steps[list[Tensor]]:
        """One forward pass for each slot."""
        out_tensors: list[Tensor] = []
        taken = 0
        for slot in frame.slots:
            carry = tensors[taken : taken + slot.num_tensors]
            taken += slot.num_tensors
            error = slot.error or failed.get(slot.session, "")
            if not error:
                try:
                    own = yield from self._compute([slot], [self._session(slot)], carry, out)
                    is_only = len(frame.slots) == 1  # else the next ones may land where these did
                    out_tensors += own if is_only else [replace(t, data=bytes(t.data)) for t in own]
                    continue
                except Exception as failure:  # border: a request's error travels to its client
                    error = self._failed(slot, failure)
            add_failed(out, slot, error)
        return out_tensors

    def _rows(
        self,
        frame: ring_pb2.Frame,
        tensors: Sequence[Tensor],
        failed: Mapping[int, str],
        out: ring_pb2.Frame,
    ) -> Steps[list[Tensor]]:
        """One forward pass for all slots, a row each; what fails in it fails for all of them.

        Who cannot take part fails alone: an empty row that nobody reads keeps its place in the carry.
        """
        out.is_batched = True
        errors = [slot.error or failed.get(slot.session, "") for slot in frame.slots]
        sessions = []
        for i, slot in enumerate(frame.slots):
            try:
                session = None if errors[i] else self._session(slot)
            except Exception as failure:  # border: a request's error travels to its client
                session, errors[i] = None, self._failed(slot, failure)
            sessions.append(session or Session.empty(slot, self.shard))
        if not all(errors):
            try:
                return (yield from self._compute(frame.slots, sessions, tensors, out, errors))
            except Exception as failure:  # border: the requests' error travels to their clients
                pairs = zip(frame.slots, errors, strict=True)
                errors = [error or self._failed(slot, failure) for slot, error in pairs]
                del out.slots[:]
        for slot, error in zip(frame.slots, errors, strict=True):
            add_failed(out, slot, error)
        return []

    def _compute(
        self,
        slots: Sequence[ring_pb2.Slot],
        sessions: Sequence[Session],
        carry: Sequence[Tensor],
        out: ring_pb2.Frame,
        errors: Sequence[str] = (),
    ) -> Steps[list[Tensor]]:
        """One forward pass of all these slots, a row each; adds them to `out`, whose tensors it returns.

        errors: for each slot, why its row is an empty one; "" where it is not.
        """
        shard = self.shard
        errors = errors or [""] * len(slots)
        whole = [i for i, error in enumerate(errors) if not error]
        if recorder.layers_per_span:
            self.ahead.drop()  # it would be evaluated as a whole
        self.ahead.forget(slot.session for slot, error in zip(slots, errors, strict=True) if error)
        is_pooled = sessions[whole[0]].is_pooled
        is_ahead = len(whole) == len(slots) and not is_pooled
        taken = self.ahead.take(slots, sessions, carry) if is_ahead else None
        handed_over = None if taken is None else taken.handed_over
        if handed_over is not None:
            advance(sessions, slots)  # the next one is built meanwhile
            yield Wanted(handed_over.read, [])
            if not self.ahead.was_in_time(handed_over):
                taken = handed_over = None
                take_back(sessions, slots)
        if taken is not None:
            state, outgoing, draws = taken.state, taken.out, taken.draws
        else:
            state, draws = self._open.state(sessions), None
            if slots[0].num_draws > 1 and self.reach == Reach.MARK:
                assert isinstance(state, ShardState)
                state.mark()
            rows = zip(slots, errors, strict=True)
            tokens = self._host.tokens(  # (B, T)
                [[0] * len(slot.tokens) if error else list(slot.tokens) for slot, error in rows]
            )
            is_held = bool(slots[0].structure) and len(slots[0].tokens) > 1  # keys, values: by caches
            incoming = None
            if not shard.is_first:
                incoming = unflatten(self._host.carry(carry, is_held=is_held), slots[0].structure)
            self.adapters.use(sessions[whole[0]].spec.adapter)
            with shard.before_head() if is_pooled and shard.is_last else nullcontext():
                outgoing = forward(shard, tokens, incoming, state, out.seq)
            self._open.leave([session for session, error in zip(sessions, errors, strict=True) if error])
        kept = None if handed_over is not None else state  # else it was evaluated, and may be built upon
        if handed_over is None:
            advance(sessions, slots)
        if shard.is_last:
            assert isinstance(outgoing, mx.array)
            read = outgoing if len(whole) == len(slots) else outgoing[mx.array(whole)]
            parts = [slots[i] for i in whole], [sessions[i] for i in whole]
            answers = Answers(*parts, out, self._landing, lambda: self._caches(kept), self._failed)
            yield from answers.of(read if draws is None else draws)
            for slot, error in zip(slots, errors, strict=True):
                if error:
                    add_failed(out, slot, error)
            return []
        arrays, structure = flatten(outgoing)
        landed = [self._landing.of(x) for x in arrays] if handed_over is None else handed_over.landed
        yield Wanted([one.array for one in landed], self._caches(kept))
        for i, (slot, error) in enumerate(zip(slots, errors, strict=True)):
            added = add_read(out, slot, error)
            if i == 0:  # the carry of all of them
                added.structure, added.num_tensors = structure, len(arrays)
        began = time.perf_counter() if recorder.on else 0.0
        copied = [one.read() for one in landed]
        if began:
            recorder.add(Kind.COPIED_OUT, out.seq, began, time.perf_counter())
        return copied

    def _caches(self, state: ShardState | BatchState | None) -> list[mx.array]:
        """What a frame is evaluated for beside its result: nothing may stay a graph."""
        return [*(() if state is None else state.arrays()), *self._open.groups.take_pending()]

    def _failed(self, slot: ring_pb2.Slot, failure: Exception) -> str:
        """The session of `slot` ends here; why, for its client."""
        distrust_kernels(self.shard, failure)
        session = self.sessions.pop(slot.session, None)
        logger.exception(
            "session %d failed at position %d",
            *(slot.session, slot.position),
            extra=about(session),
            exc_info=failure,
        )
        if session is not None:
            self.ahead.forget([slot.session])
            self._open.groups.drop(session)
        start, stop = self.shard.start, self.shard.stop
        return f"layers {start}:{stop} failed: {type(failure).__name__}: {failure}"[:MAX_ERROR_CHARS]

    def prepare(self, *, is_free: bool = True) -> bool:
        """Do a piece of what the next frames will need, while there is none; False: nothing was left.

        is_free: nothing but frames needs the device.
        """
        return (
            self.build_ahead(is_free=is_free)
            or (is_free and self.num_sessions == 1 and self.ahead.hand_over())
            or (self.guides is not None and self.guides.prepare())
        )

    def build_ahead(self, *, is_free: bool = True) -> bool:
        """Of that what a device does not notice which computes meanwhile."""
        is_alone = is_free and self.num_sessions == 1
        return not recorder.layers_per_span and self.ahead.prepare(is_alone=is_alone)

    def _session(self, slot: ring_pb2.Slot) -> Session:
        """The session of a slot that can be computed."""
        session = self.sessions.get(slot.session)
        if session is None:
            raise LookupError(f"session {slot.session} is not open on this stage")
        if session.position > slot.position >= session.spec.prompt_tokens - 1:  # the last were wrong guesses
            session.rewind(self._open.groups.alone(session), slot.position)
        if session.position != slot.position:
            raise LookupError(
                f"session {slot.session} is at position {session.position}, not at {slot.position}"
            )
        if max(slot.tokens, default=0) >= self.shard.vocab_size:
            raise ValueError(f"a token id is not below {self.shard.vocab_size}")  # no log has tokens
        if self._error_at and slot.position >= self._error_at:
            raise RuntimeError(f"injected at position {slot.position}")
        return session

    def _count(self, frame: ring_pb2.Frame, started: float) -> None:
        """Times that two steps had in common count for the earlier one."""
        now = time.perf_counter()
        step_ms, self._ended = (now - max(started, self._ended)) * 1e3, now
        num_tokens = sum(len(slot.tokens) for slot in frame.slots)
        self.stats.num_steps += 1
        self.stats.num_tokens += num_tokens
        self.stats.busy_ms += step_ms
        self.stats.recent_step_ms.append(step_ms)
        if not frame.slots[0].is_sampled:
            self._give_back()  # a prefill chunk's temporaries are larger than any decode step's
            self._measure_kv()
        elif self.stats.num_steps % KV_MEASURE_STEPS == 0 or frame.closes or recorder.has_memory:
            self._measure_kv()

    def count_sending(self, frame: ring_pb2.Frame) -> None:
        """What the latest frame came to has been sent: that is its step's time, too."""
        if not frame.slots:
            return
        now = time.perf_counter()
        self.stats.busy_ms += (now - self._ended) * 1e3
        self._ended = now

    def _give_back(self) -> None:
        """What MLX keeps of freed buffers: at once, or where that would stop a device, when it rests."""
        self.has_spare = self._is_gpu
        if not self._is_gpu:
            clear_cache()

    def rest(self) -> None:
        """Nobody has asked for anything for a while."""
        self.has_spare = False
        clear_cache()

    def _measure_kv(self) -> None:
        self.memory.measure(self._open.nbytes)
