"""Several sequences' state on one stage, merged so that they share a forward pass. Compute thread only.

Rows join and leave between passes: `BatchState` merges the caches of single states row by row (left-padded to
the longest), by the batched forms that mlx-lm's own cache classes have. A pass is of as many tokens of each
row as of the others, prompts included: padding on the right is wrong for several architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from shard_loader.growing import let_go, make_room
from shard_loader.kv_rows import KVRows
from shard_loader.merging import extend, extracted, keep, merged, taken
from shard_loader.state import ShardState, cache_arrays

# The own caches and the number of rows -> what the model is given, and the shadows in it.
MakeView = Callable[[dict[int, Any], int], tuple[list[Any], list[Any]]]


class BatchState:
    """The caches of several sequences on one stage, one row for each.

    positions: how many tokens each row has seen. A state whose forward pass raised is spoilt: drop it.
    """

    __slots__ = ("_kv", "_make_view", "_shadows", "own", "positions", "view")

    def __init__(
        self,
        own: dict[int, Any],
        kv: KVRows,
        positions: list[int],
        make_view: MakeView,
    ) -> None:
        self.own, self._kv, self.positions, self._make_view = own, kv, positions, make_view
        self._renew()

    @classmethod
    def of(cls, states: Sequence[ShardState], make_view: MakeView) -> BatchState:
        """One row for each state, in their order; the states are used up. Evaluates nothing."""
        kv = KVRows()
        own = {i: merged([state.own[i] for state in states], kv) for i in states[0].own}
        return cls(own, kv, [state.position for state in states], make_view)

    @property
    def num_rows(self) -> int:
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        """Bytes the caches hold, padding included."""
        return sum(array.nbytes for array in cache_arrays(self.own))

    def arrays(self) -> list[mx.array]:
        """Every array of the caches, for mx.eval."""
        return list(cache_arrays(self.own))

    def begin(self, num_tokens: int) -> None:
        """A forward pass of so many tokens of each row is about to be built."""
        make_room(self.own.values(), num_tokens)
        if self._shadows:
            offset = mx.array(self.positions)
            for part in self._shadows:
                part.offset = offset

    def advance(self, num_tokens: int) -> None:
        """The forward pass of `num_tokens` more tokens of each row is built."""
        self.positions = [position + num_tokens for position in self.positions]
        if num_tokens > 1:
            let_go(self.own.values())
        self._kv.share_offsets()

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows, in this order; at least one."""
        for cache in self.own.values():
            keep(cache, rows, self._kv)
        self.positions = [self.positions[row] for row in rows]
        self._renew()

    def taken(self, rows: Sequence[int]) -> BatchState:
        """A state of these rows, in this order; they stay here too. Evaluates nothing."""
        kv = KVRows()
        own = {i: taken(cache, rows, kv, self._kv) for i, cache in self.own.items()}
        return BatchState(own, kv, [self.positions[row] for row in rows], self._make_view)

    def extend(self, other: BatchState) -> None:
        """The other's rows come behind the own ones; the other is used up."""
        num_rows = self.num_rows, other.num_rows
        for i, cache in self.own.items():
            extend(cache, other.own[i], self._kv, other._kv, num_rows)
        self.positions += other.positions
        self._renew()

    def extract(self, row: int, into: ShardState) -> ShardState:
        """Fills `into`, a fresh state, with one row; the row stays here too."""
        for i, cache in self.own.items():
            alone = extracted(cache, row, self._kv)
            into.view = [alone if entry is into.own[i] else entry for entry in into.view]
            into.own[i] = alone
        into.position = self.positions[row]
        return into

    def _renew(self) -> None:
        self._kv.changed()
        self.view, self._shadows = self._make_view(self.own, len(self.positions))
