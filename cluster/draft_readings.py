"""What a draft model has read, session by session, in the bytes that the plan gives it. Compute thread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlx_lm.models.cache import trim_prompt_cache

from cluster.kept import MIN_COMMON, common
from cluster.sampler import Sampler
from shard_loader.shard import Shard
from shard_loader.state import ShardState
from shard_loader.trim import clear_cache


@dataclass(slots=True, eq=False)
class Reading:
    """One session: its caches, and the tokens that they hold."""

    state: ShardState
    tokens: list[int] = field(default_factory=list)
    sampler: Sampler | None = None
    is_closed: bool = False


class Readings:
    """All sessions, those used longest ago first and closed ones before them.

    kv_bytes(n): of one session's caches that hold n tokens. max_kv_bytes: of all of them together.
    trim_window: as `Shard.trim_window`.
    """

    def __init__(
        self, shard: Shard, trim_window: int, kv_bytes: Callable[[int], int], max_kv_bytes: int
    ) -> None:
        self._shard, self._trim_window = shard, trim_window
        self._kv_bytes, self.max_kv_bytes = kv_bytes, max_kv_bytes
        self._readings: OrderedDict[int, Reading] = OrderedDict()

    def __contains__(self, session: int) -> bool:
        return session in self._readings

    @property
    def num_open(self) -> int:
        """Sessions that are not closed."""
        return sum(not reading.is_closed for reading in self._readings.values())

    @property
    def nbytes(self) -> int:
        """What all caches hold."""
        return sum(reading.state.nbytes for reading in self._readings.values())

    def can_go_back(self, num_tokens: int) -> bool:
        """Whether caches that hold so many tokens can forget the last of them."""
        return num_tokens < self._trim_window

    def open(self, session: int, tokens: Sequence[int], num_tokens: int) -> Reading | None:
        """The session's caches, with as many of `tokens` as they can hold without reading, but not the last.

        num_tokens: what they are to hold in the end; for that others are forgotten. None: too many, ever.
        """
        if self._kv_bytes(num_tokens) > self.max_kv_bytes:
            self.drop(session)
            return None
        reading = self._readings.get(session)
        if reading is None:
            reading = self._readings[session] = self._taken_over(tokens) or Reading(self._shard.new_state())
        self._readings.move_to_end(session)
        self._go_back(reading, common(reading.tokens, tokens, len(tokens) - 1))
        self._make_room(session, num_tokens)
        return reading

    def close(self, session: int) -> None:
        """Its caches stay while there is room, for a session that begins like it."""
        reading = self._readings.get(session)
        if reading is not None:
            reading.is_closed, reading.sampler = True, None
            self._readings.move_to_end(session, last=False)

    def drop(self, session: int) -> None:
        """Forget its caches."""
        self._readings.pop(session, None)

    def drop_all(self) -> None:
        """Forget them all."""
        if self._readings:
            self._readings.clear()
            clear_cache()

    def _make_room(self, session: int, num_tokens: int) -> None:
        others = {s: self._kv_bytes(len(r.tokens)) for s, r in self._readings.items() if s != session}
        over_bytes = self._kv_bytes(num_tokens) + sum(others.values()) - self.max_kv_bytes
        for other, nbytes in others.items():
            if over_bytes <= 0:
                break
            over_bytes -= nbytes
            del self._readings[other]

    def _taken_over(self, tokens: Sequence[int]) -> Reading | None:
        """Caches of a closed session that begin like `tokens`: they are nobody else's."""
        best, length = None, MIN_COMMON - 1
        for session, reading in self._readings.items():
            if not reading.is_closed:
                continue
            num_common = common(reading.tokens, tokens, len(tokens) - 1)
            is_whole = num_common == len(reading.tokens)
            if num_common > length and (is_whole or self.can_go_back(len(reading.tokens))):
                best, length = session, num_common
        if best is None:
            return None
        reading = self._readings.pop(best)
        reading.is_closed = False
        return reading

    def _go_back(self, reading: Reading, num_tokens: int) -> None:
        num_dropped = len(reading.tokens) - num_tokens
        if not num_dropped:
            return
        if not num_tokens or not self.can_go_back(len(reading.tokens)):
            reading.state, reading.tokens = self._shard.new_state(), []  # it is read again
            return
        trim_prompt_cache(list(reading.state.own.values()), num_dropped)
        reading.state.position = num_tokens
        del reading.tokens[num_tokens:]
