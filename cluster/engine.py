"""One stage's work on one frame: open, close, compute. Owned by the compute thread, which owns all of MLX."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import mlx.core as mx

from cluster.fault import Fault, injected
from cluster.groups import Groups
from cluster.guide import Guides
from cluster.guide_process import GuideProcess
from cluster.sampler import draw_rows
from cluster.session import Session
from cluster.step_memory import StepMemory
from proto import ring_pb2
from proto.codec import Tensor
from shard_loader.adapters import Adapters
from shard_loader.batch_state import BatchState
from shard_loader.carry import flatten, from_wire, to_wire, unflatten
from shard_loader.shard import Shard
from shard_loader.state import ShardState

logger = logging.getLogger(__name__)

RECENT_STEPS = 64
MAX_ERROR_CHARS = 4000  # of a failure's text in a frame
KV_MEASURE_STEPS = 32  # decode steps between two sums over all caches


_Compiled = Future[tuple[bytes, bytes]]  # a grammar's first mask


@dataclass(slots=True)
class StepStats:
    """What the stage did since it became ready. Times in ms."""

    num_steps: int = 0
    num_tokens: int = 0
    busy_ms: float = 0.0
    recent_step_ms: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))


class Engine:
    """Runs frames on a shard. `step` turns an incoming STEP into the frame for the next hop."""

    def __init__(
        self,
        shard: Shard,
        adapters: Adapters | None = None,
        guides: Guides | GuideProcess | None = None,
    ) -> None:
        self.shard = shard
        self.adapters = adapters or Adapters()
        self.guides = guides  # None: answers cannot be held to a grammar
        self.sessions: dict[int, Session] = {}
        self._kept: set[int] = set()  # of these, those that write no more
        self._groups = Groups(shard)
        # By seq, of frames that wait: which opens failed, and the sessions, which are closed afterwards.
        self._begun: dict[int, tuple[dict[int, str], frozenset[int]]] = {}
        self._late_closes: list[int] = []
        self._waiting: dict[int, tuple[int, _Compiled]] = {}  # by session: the first such frame, and for what
        self.trim_window = shard.trim_window  # any thread may read
        self.stats = StepStats()
        self._error_at = int(injected(Fault.STEP_ERROR_AT))
        self._delay_s = injected(Fault.LAYER_DELAY_MS) / 1e3 * (shard.stop - shard.start)
        self.memory = StepMemory()

    @property
    def num_sessions(self) -> int:
        """Requests that run; any thread."""
        return len(self.sessions) - len(self._kept)

    def drop_sessions(self) -> None:
        """A new epoch: every session of the old one ends, and its memory is given back."""
        if self.sessions:
            for session in self.sessions.values():
                logger.info("session %d ends with its epoch", session.spec.session, extra=_about(session))
            self.sessions.clear()
            self._kept.clear()
            self._groups = Groups(self.shard)
            self._begun.clear()
            self._late_closes.clear()
            self._waiting.clear()
            self.memory.measure(0)
            mx.clear_cache()

    def step(
        self, frame: ring_pb2.Frame, tensors: Sequence[Tensor]
    ) -> tuple[ring_pb2.Frame, list[Tensor]] | None:
        """The frame for the next hop with its tensors, or None if nothing has to go there.

        A slot that fails carries its error onward instead of a carry: its request ends with it,
        and no other request of the frame notices.
        """
        started = time.perf_counter()
        shard = self.shard
        failed, _ = self._begun.pop(frame.seq, None) or (self._begin(frame), None)
        if self._waiting:
            self._waiting = {s: first for s, first in self._waiting.items() if first[0] != frame.seq}
        if shard.is_last:
            if not frame.slots:
                return None
            out = ring_pb2.Frame(kind=ring_pb2.RESULT, epoch=frame.epoch, seq=frame.seq)
        else:
            out = ring_pb2.Frame(
                kind=ring_pb2.STEP,
                epoch=frame.epoch,
                seq=frame.seq,
                opens=frame.opens,
                closes=frame.closes,
                keeps=frame.keeps,
                forks=frame.forks,
            )
        if frame.is_batched:
            out_tensors = self._rows(frame, tensors, out)
        else:
            out_tensors = self._slots(frame, tensors, failed, out)
        failures = {slot.session for slot in out.slots if slot.error}
        for fork in frame.forks:
            if fork.from_session not in failures:
                self._fork(fork)
        if self._late_closes:
            late, self._late_closes = self._late_closes, []
            self._close_all(late)
        if frame.slots:
            if self._delay_s:
                time.sleep(self._delay_s)
            self._count(frame, (time.perf_counter() - started) * 1e3)
        return out, out_tensors

    def waits_for(self, frame: ring_pb2.Frame) -> _Compiled | None:
        """What must be done before a token of this frame can be drawn: a grammar is being compiled.

        The frame's sessions are opened and closed now. `step` can be called when that is done; until then
        frames of others come first, but none of the same sessions.
        """
        if not isinstance(self.guides, GuideProcess):
            return None
        if frame.seq not in self._begun:
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

    def _begin(self, frame: ring_pb2.Frame) -> dict[int, str]:
        """Opens and closes sessions; why some could not be opened."""
        failed = self._open_all(frame.opens)  # before the closes: it may begin as a copy of what is closed
        self._close_all(frame.closes)
        for number in frame.keeps:
            self._keep(number)
        if frame.closes:
            mx.clear_cache()
        if (frame.closes or frame.keeps) and not frame.slots:
            self._measure_kv()
        return failed

    def _slots(
        self,
        frame: ring_pb2.Frame,
        tensors: Sequence[Tensor],
        failed: Mapping[int, str],
        out: ring_pb2.Frame,
    ) -> list[Tensor]:
        """One forward pass for each slot."""
        out_tensors: list[Tensor] = []
        taken = 0
        for slot in frame.slots:
            carry = tensors[taken : taken + slot.num_tensors]
            taken += slot.num_tensors
            error = slot.error or failed.get(slot.session, "")
            if not error:
                try:
                    out_tensors += self._compute([slot], carry, out)
                    continue
                except Exception as failure:  # border: a request's error travels to its client
                    error = self._failed(slot, failure)
            _add_failed(out, slot, error)
        return out_tensors

    def _rows(self, frame: ring_pb2.Frame, tensors: Sequence[Tensor], out: ring_pb2.Frame) -> list[Tensor]:
        """One forward pass for all slots, a row each; what fails in it fails for all of them."""
        out.is_batched = True
        errors = [slot.error for slot in frame.slots]
        if not any(errors):
            try:
                return self._compute(frame.slots, tensors, out)
            except Exception as failure:  # border: the requests' error travels to their clients
                errors = [self._failed(slot, failure) for slot in frame.slots]
                del out.slots[:]
        for slot, error in zip(frame.slots, errors, strict=True):
            _add_failed(out, slot, error)
        return []

    def _compute(
        self, slots: Sequence[ring_pb2.Slot], carry: Sequence[Tensor], out: ring_pb2.Frame
    ) -> list[Tensor]:
        """One forward pass of all these slots, a row each; adds them to `out`, whose tensors it returns."""
        shard = self.shard
        sessions = [self._session(slot) for slot in slots]
        state: ShardState | BatchState = (
            self._groups.alone(sessions[0]) if len(sessions) == 1 else self._groups.together(sessions).state
        )
        tokens = mx.array([list(slot.tokens) for slot in slots])  # (B, T)
        incoming = None if shard.is_first else unflatten([from_wire(t) for t in carry], slots[0].structure)
        self.adapters.use(sessions[0].spec.adapter)
        outgoing = shard.forward(tokens, incoming, state)
        for session, slot in zip(sessions, slots, strict=True):
            session.position += len(slot.tokens)
        if shard.is_last:
            assert isinstance(outgoing, mx.array)
            self._draw(slots, sessions, outgoing, state, out)
            return []
        arrays, structure = flatten(outgoing)
        mx.eval(arrays, state.arrays(), self._groups.take_pending())
        for i, slot in enumerate(slots):
            added = out.slots.add(
                session=slot.session, position=slot.position, tokens=slot.tokens, is_sampled=slot.is_sampled
            )
            if i == 0:  # the carry of all of them
                added.structure, added.num_tensors = structure, len(arrays)
        return [to_wire(x) for x in arrays]

    def _draw(
        self,
        slots: Sequence[ring_pb2.Slot],
        sessions: Sequence[Session],
        logits: mx.array,
        state: ShardState | BatchState,
        out: ring_pb2.Frame,
    ) -> None:
        rows = []
        for session, slot in zip(sessions, slots, strict=True):
            assert session.sampler is not None
            session.history.extend(slot.tokens)
            rows.append((session.sampler, session.position, session.history, session.spec.prompt_tokens))
        if not slots[0].is_sampled:  # a chunk, by itself: its logits are never computed
            mx.eval(state.arrays(), self._groups.take_pending())
            out.slots.add(session=slots[0].session, position=slots[0].position)
            return
        draws = draw_rows(rows, logits[:, -1])
        mx.eval(draws.arrays(), state.arrays(), self._groups.take_pending())
        for slot, token in zip(slots, draws.finish(), strict=True):
            drawn = out.slots.add(session=slot.session, position=slot.position, is_sampled=True)
            if isinstance(token, Exception):  # of this row alone
                drawn.error = self._failed(slot, token)
            else:
                drawn.result.CopyFrom(token)

    def _failed(self, slot: ring_pb2.Slot, failure: Exception) -> str:
        """The session of `slot` ends here; why, for its client."""
        session = self.sessions.pop(slot.session, None)
        logger.exception(
            "session %d failed at position %d",
            *(slot.session, slot.position),
            extra=_about(session),
            exc_info=failure,
        )
        if session is not None:
            self._groups.drop(session)
        start, stop = self.shard.start, self.shard.stop
        return f"layers {start}:{stop} failed: {type(failure).__name__}: {failure}"[:MAX_ERROR_CHARS]

    def prepare(self) -> bool:
        """Do a piece of what the next frames will need, while there is none; False: nothing was left."""
        return self.guides is not None and self.guides.prepare()

    def _open_all(self, specs: Sequence[ring_pb2.SessionSpec]) -> dict[int, str]:
        failed: dict[int, str] = {}
        for spec in specs:
            try:
                self.adapters.check(spec.adapter)
                session = Session.open(spec, self.shard, self.guides)
                if spec.from_session:
                    self._begin_like(session, spec.from_session, spec.from_tokens)
                self.sessions[spec.session] = session
                logger.info(
                    "session %d opened: %d tokens of prompt%s, %d of answer at most",
                    *(spec.session, spec.prompt_tokens, _known(spec), spec.max_tokens),
                    extra=_about(session),
                )
            except (ValueError, LookupError) as error:
                failed[spec.session] = str(error)
        return failed

    def _begin_like(self, session: Session, number: int, num_tokens: int) -> None:
        source = self.sessions.get(number)
        if source is None:
            raise LookupError(f"session {number} is not open on this stage, and has no copy")
        self._groups.copy(source, session, num_tokens)

    def _keep(self, number: int) -> None:
        """The session writes no more: its caches leave the group, whose padding they need not have."""
        session = self.sessions.get(number)
        if session is not None:
            self._kept.add(number)
            self._groups.alone(session)
            mx.eval(self._groups.take_pending())
            logger.info("session %d kept at position %d", number, session.position, extra=_about(session))

    def _fork(self, fork: ring_pb2.Fork) -> None:
        """What the session has come to is kept as another one, which shares its memory until it goes on."""
        source = self.sessions[fork.from_session]
        spec = ring_pb2.SessionSpec(session=fork.session, request_id=source.spec.request_id)
        copy = Session(spec, None)
        self._groups.copy(source, copy, source.position)
        self.sessions[fork.session] = copy
        self._kept.add(fork.session)
        logger.info(
            "session %d kept: a copy of %d at position %d",
            *(fork.session, fork.from_session, source.position),
            extra=_about(source),
        )

    def _close_all(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if any(number in sessions for _, sessions in self._begun.values()):
                self._late_closes.append(number)  # others share the frame that waits with it
            else:
                self._close(number)

    def _close(self, number: int) -> None:
        session = self.sessions.pop(number, None)
        self._kept.discard(number)
        if session is not None:
            logger.info("session %d closed at position %d", number, session.position, extra=_about(session))
            self._groups.drop(session)

    def _session(self, slot: ring_pb2.Slot) -> Session:
        """The session of a slot that can be computed."""
        session = self.sessions.get(slot.session)
        if session is None:
            raise LookupError(f"session {slot.session} is not open on this stage")
        if session.position != slot.position:
            raise LookupError(
                f"session {slot.session} is at position {session.position}, not at {slot.position}"
            )
        if max(slot.tokens, default=0) >= self.shard.vocab_size:
            raise ValueError(f"a token id is not below {self.shard.vocab_size}")  # no log has tokens
        if self._error_at and slot.position >= self._error_at:
            raise RuntimeError(f"injected at position {slot.position}")
        return session

    def _count(self, frame: ring_pb2.Frame, step_ms: float) -> None:
        num_tokens = sum(len(slot.tokens) for slot in frame.slots)
        self.stats.num_steps += 1
        self.stats.num_tokens += num_tokens
        self.stats.busy_ms += step_ms
        self.stats.recent_step_ms.append(step_ms)
        if num_tokens > len(frame.slots):
            mx.clear_cache()  # a prefill chunk's temporaries are larger than any decode step's
            self._measure_kv()
        elif self.stats.num_steps % KV_MEASURE_STEPS == 0 or frame.closes:
            self._measure_kv()

    def _measure_kv(self) -> None:
        self.memory.measure(Groups.nbytes(self.sessions.values()))


def _about(session: Session | None) -> dict[str, object]:
    """As `extra`: whose request the line is about."""
    return {} if session is None else {"request_id": session.spec.request_id}


def _add_failed(out: ring_pb2.Frame, slot: ring_pb2.Slot, error: str) -> None:
    out.slots.add(session=slot.session, position=slot.position, is_sampled=slot.is_sampled, error=error)


def _known(spec: ring_pb2.SessionSpec) -> str:
    return f" ({spec.from_tokens} of session {spec.from_session}'s)" if spec.from_session else ""
