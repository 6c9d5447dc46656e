"""A ring without models: its stages keep tokens as caches of a given reach do; its language is a function.

Frames go round in order, as they do in a real ring; whoever drives it says when one comes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.instructions import Emit, Fail, Instruction, Send
from cluster.scheduler import Scheduler
from proto import ring_pb2
from shard_loader.reach import Reach

Language = Callable[[Sequence[int]], int]  # all tokens so far -> the next one


@dataclass
class Cache:
    """What every stage holds of a session, and its last pass."""

    tokens: list[int] = field(default_factory=list)
    pass_start: int = 0
    is_marked: bool = False


class SimulatedRing:
    """Takes what the scheduler says, and fails a test that asks of a cache what it cannot do."""

    def __init__(self, scheduler: Scheduler, language: Language, reach: Reach, trim_window: int) -> None:
        self.scheduler, self.language = scheduler, language
        self.reach, self.trim_window = reach, trim_window
        self.frames: deque[ring_pb2.Frame] = deque()
        self.caches: dict[int, Cache] = {}
        self.answers: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.num_trips = 0
        self.most_in_flight = 0
        self.token_ms = 0.1  # of a frame's time, for each token beyond the first, where the first takes 1

    def take(self, instructions: Sequence[Instruction]) -> None:
        """Carry them out; frames join those that are under way."""
        for one in instructions:
            if isinstance(one, Send):
                self.frames.append(one.frame)
                self.most_in_flight = max(self.most_in_flight, len(self.frames))
            elif isinstance(one, Emit):
                self.answers.setdefault(one.request_id, []).append(one.token.id)
                if one.finish_reason:
                    self.finished[one.request_id] = one.finish_reason
            elif isinstance(one, Fail):
                raise AssertionError(one.message)

    def step(self) -> None:
        """The frame that was sent first comes back."""
        frame = self.frames.popleft()
        self._open(frame)
        slots = [self._slot(slot) for slot in frame.slots]
        for fork in frame.forks:
            self.caches[fork.session] = Cache(list(self.caches[fork.from_session].tokens))
        if slots:
            self.num_trips += 1
            most = max(len(slot.tokens) for slot in frame.slots)
            trip_ms = 1.0 + self.token_ms * (most - 1)
            self.take(self.scheduler.on_result(frame.epoch, frame.seq, slots, trip_ms))

    def run(self) -> None:
        """Until nothing is under way."""
        while self.frames:
            self.step()

    def _open(self, frame: ring_pb2.Frame) -> None:
        for number, num_tokens in zip(frame.keeps, frame.keep_tokens, strict=True):
            self._rewind(self.caches[number], num_tokens)
            assert len(self.caches[number].tokens) == num_tokens
        for spec in frame.opens:
            cache = Cache()
            if spec.from_session:
                source = self.caches[spec.from_session].tokens
                assert spec.from_tokens == len(source) or len(source) < self.trim_window
                cache.tokens = source[: spec.from_tokens]
            self.caches[spec.session] = cache
        for number in frame.closes:
            self.caches.pop(number, None)

    def _rewind(self, cache: Cache, position: int) -> None:
        if position >= len(cache.tokens):
            return
        if self.reach == Reach.MARK:
            assert cache.is_marked
            assert position == cache.pass_start
        elif self.reach == Reach.PASS and len(cache.tokens) >= self.trim_window:
            assert position > cache.pass_start
        else:
            assert self.reach > Reach.NONE
        del cache.tokens[position:]
        cache.is_marked = False

    def _slot(self, slot: ring_pb2.Slot) -> ring_pb2.Slot:
        cache = self.caches[slot.session]
        self._rewind(cache, slot.position)
        assert slot.position == len(cache.tokens)
        cache.pass_start, cache.is_marked = slot.position, slot.num_draws > 1
        cache.tokens += slot.tokens
        result = ring_pb2.Slot(session=slot.session, position=slot.position, is_sampled=slot.is_sampled)
        if not slot.is_sampled:
            return result
        num_draws = max(slot.num_draws, 1)
        drawn: list[int] = []
        for end in range(len(cache.tokens) - num_draws + 1, len(cache.tokens) + 1):
            drawn.append(self.language(cache.tokens[:end]))
            if end < len(cache.tokens) and drawn[-1] != cache.tokens[end]:
                break
        result.result.id = drawn[0]
        result.more.extend(ring_pb2.SampledToken(id=token) for token in drawn[1:])
        return result
