"""When a node that ended is started again, and when no more. Pure: the caller brings the clock."""

from __future__ import annotations

from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_USAGE

MAX_RESTARTS = 5
WINDOW_S = 600.0  # so many of them within this time, then no more
DELAYS_S = (0.5, 2.0, 5.0, 10.0, 20.0)
SAME_AGAIN = (EXIT_DOES_NOT_FIT, EXIT_USAGE)  # what it ended with, it would end with again


class Restarts:
    """Of one node."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self.total = 0

    def delay_s(self, exit_code: int | None, now: float, *, has_served: bool) -> float | None:
        """How long to wait before it is started again, which counts as done; None: leave it.

        exit_code: negative for a signal, None where nobody knows. A node that ended by itself before its
        ring ever served (a port taken, a package missing) ends again, so it is left too.
        """
        ended_by_itself = exit_code is not None and exit_code > 0
        if ended_by_itself and (exit_code in SAME_AGAIN or not has_served):
            return None
        self._times = [time for time in self._times if now - time < WINDOW_S]
        if len(self._times) >= MAX_RESTARTS:
            return None
        self._times.append(now)
        self.total += 1
        return DELAYS_S[min(len(self._times), len(DELAYS_S)) - 1]


def how_ended(exit_code: int | None) -> str:
    """In words."""
    if exit_code is None:
        return "has ended"
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
