"""A step that the device has before its numbers, with all that is read of it. Compute thread only."""

from __future__ import annotations

import time
from dataclasses import dataclass

import mlx.core as mx

from cluster.row_draws import RowDraws
from shard_loader.ahead import Ahead
from shard_loader.carry import flatten
from shard_loader.landing import Landed, Landing
from shard_loader.state import ShardState


@dataclass(frozen=True, slots=True)
class HandedOver:
    """read: what is there when it is computed; landed: of these the carry for the next stage."""

    ahead: Ahead
    read: list[mx.array]
    landed: list[Landed]
    draws: RowDraws | None
    took_s: float  # handing it over

    @classmethod
    def of(
        cls, ahead: Ahead, state: ShardState, draws: RowDraws | None, landing: Landing, *, is_last: bool
    ) -> HandedOver:
        """Hands over a step with a latch. draws: of the last stage, where it was known how to draw."""
        landed: list[Landed] = []
        if draws is not None:
            draws.land(landing)
            read = draws.arrays()
        elif is_last:
            read = [ahead.out]
        else:
            landed = [landing.of(x) for x in flatten(ahead.out)[0]]
            read = [one.array for one in landed]
        began = time.perf_counter()
        ahead.hand_over([*read, *state.arrays()])
        return cls(ahead, read, landed, draws, time.perf_counter() - began)

    def give_back(self) -> None:
        """It is computed, and nobody reads it."""
        for one in self.landed:
            one.give_back()
        if self.draws is not None:
            self.draws.give_back()
