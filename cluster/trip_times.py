"""How long a frame of so many tokens takes once round the ring, compared with one of a single token. Pure."""

from __future__ import annotations

from collections import deque
from statistics import median

PRIOR_SLOPE = 0.1  # of a single token's time, for each further token, until it was measured
_MIN_SAMPLES = 3
_SAMPLES = 9  # the latest ones of each length count


class TripTimes:
    """Learns from frames that had the ring to themselves."""

    def __init__(self) -> None:
        self._ms: dict[int, deque[float]] = {}

    @property
    def is_measured(self) -> bool:
        """Whether it is known how long a single token takes."""
        return len(self._ms.get(1, ())) >= _MIN_SAMPLES

    def add(self, num_tokens: int, trip_ms: float) -> None:
        """A frame of so many tokens came back after so long."""
        self._ms.setdefault(num_tokens, deque(maxlen=_SAMPLES)).append(trip_ms)

    @property
    def single_ms(self) -> float:
        """Of one token; only where `is_measured`."""
        return median(self._ms[1])

    def ratio(self, num_tokens: int) -> float:
        """The time of so many tokens, where a single token's is 1.0.

        Between two lengths that were measured it lies on the line between them; beyond, on the line from one
        token through the nearest.
        """
        known = {length: median(samples) for length, samples in self._ms.items()}
        if num_tokens == 1 or 1 not in known:
            return 1.0 + PRIOR_SLOPE * (num_tokens - 1)
        single = known.pop(1)
        if not known:
            return 1.0 + PRIOR_SLOPE * (num_tokens - 1)
        shorter = max((length for length in known if length <= num_tokens), default=1)
        longer = min((length for length in known if length >= num_tokens), default=None)
        low = 1.0 if shorter == 1 else known[shorter] / single
        if longer is None:
            return max(low, 1.0 + (low - 1.0) * (num_tokens - 1) / (shorter - 1))
        high = known[longer] / single
        if longer == shorter:
            return high
        return low + (high - low) * (num_tokens - shorter) / (longer - shorter)
