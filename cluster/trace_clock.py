"""The clocks of several nodes on one line, and how sure that is. Pure.

An exchange bounds what a node's clock is ahead of ours: it read its clock after we asked and before we had
the answer (as NTP does, RFC 5905 section 8, and Cristian, Probabilistic clock synchronization, 1989). Several
exchanges in a row bound it by their closest pair. Frames bound it further: none arrives before it was sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DRIFT = 1e-4  # of the time since the last exchange: what two crystals may differ by
_ROUNDS = 50


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question, in s: sent and answered by our clock, received and replied by the node's."""

    sent: float
    received: float
    replied: float
    answered: float

    @property
    def low(self) -> float:
        """The node's clock is ahead of ours by so much at least."""
        return self.replied - self.answered

    @property
    def high(self) -> float:
        """And by so much at most."""
        return self.received - self.sent


@dataclass(frozen=True, slots=True)
class Moment:
    """What the node's clock was ahead by, `at` a time of that clock, and how far that may be off."""

    at: float
    ahead: float
    uncertainty: float

    @classmethod
    def of(cls, exchanges: Sequence[Exchange]) -> Moment:
        """Of one or more in a row."""
        low, high = max(e.low for e in exchanges), min(e.high for e in exchanges)
        if low > high:  # a clock was set or ran strangely: the shortest way there and back is believed
            best = min(exchanges, key=lambda e: e.high - e.low)
            low, high = best.low, best.high
        at = sum(e.replied for e in exchanges) / len(exchanges)
        return cls(at, (low + high) / 2, (high - low) / 2)


@dataclass(frozen=True, slots=True)
class Clock:
    """A node's clock between two moments; `correction` is what the frames said besides."""

    first: Moment
    last: Moment | None = None  # None: it was asked but once
    correction: float = 0.0
    uncertainty: float = 0.0  # of every time, once `aligned` was over it

    def ours(self, at: float) -> float:
        """A time of the node's clock by ours."""
        first, last = self.first, self.last
        ahead = first.ahead
        if last is not None and last.at > first.at:
            ahead += (last.ahead - first.ahead) * (at - first.at) / (last.at - first.at)
        return at - ahead + self.correction

    def measured_uncertainty(self, until: float) -> float:
        """By the exchanges alone, for times up to `until` of the node's clock."""
        first, last = self.first, self.last
        if last is None:
            return first.uncertainty + max(0.0, until - first.at) * DRIFT
        return max(first.uncertainty, last.uncertainty) + max(0.0, until - last.at) * DRIFT

    @property
    def drift(self) -> float | None:
        """How much faster it runs than ours; None: unknown."""
        first, last = self.first, self.last
        if last is None or last.at <= first.at:
            return None
        return (last.ahead - first.ahead) / (last.at - first.at)


def aligned(
    clocks: Mapping[int, Clock], until: Mapping[int, float], ways: Mapping[tuple[int, int], float]
) -> dict[int, Clock]:
    """The clocks by rank, moved within their uncertainty until no frame arrives before it was sent.

    until: the last time of each that matters. ways: by (from rank, to rank), the least time from sending to
    arrival by the clocks as they are. Where the bounds contradict each other the clocks stay as they are.
    """
    measured = {rank: clock.measured_uncertainty(until.get(rank, 0.0)) for rank, clock in clocks.items()}
    low = {rank: -uncertainty for rank, uncertainty in measured.items()}
    high = dict(measured)
    known = {pair: least for pair, least in ways.items() if pair[0] in clocks and pair[1] in clocks}
    for _ in clocks:
        for (sender, receiver), least in known.items():
            low[receiver] = max(low[receiver], low[sender] - least)
            high[sender] = min(high[sender], high[receiver] + least)
    if any(low[rank] > high[rank] for rank in clocks):
        return {rank: _with(clock, 0.0, measured[rank]) for rank, clock in clocks.items()}
    moved = {rank: (low[rank] + high[rank]) / 2 for rank in clocks}
    for _ in range(_ROUNDS):
        for (sender, receiver), least in known.items():
            missing = moved[sender] - least - moved[receiver]
            if missing > 0:
                moved[receiver] = min(high[receiver], moved[receiver] + missing / 2)
                moved[sender] = max(low[sender], moved[receiver] + least)
    half = {rank: (high[rank] - low[rank]) / 2 for rank in clocks}
    return {rank: _with(clock, moved[rank], half[rank]) for rank, clock in clocks.items()}


def _with(clock: Clock, correction: float, uncertainty: float) -> Clock:
    return Clock(clock.first, clock.last, correction, uncertainty)
