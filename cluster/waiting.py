"""Requests that wait until there is room for them. Pure; guarded by the lock that guards the scheduler.

They stand in the order of their priority, and those of one priority in that of their arrival. Two rules keep
that order from being the last word:

- One that does not fit yet is passed by smaller ones behind it, MAX_PASSED times at most; then they wait too.
- Whoever waits longest is taken next once MAX_OVERTAKEN others in a row were taken: so nobody waits for ever.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cluster.request import Request

MAX_PASSED = 8
MAX_OVERTAKEN = 16


@dataclass(slots=True)
class Waiting:
    """The queue. Iterated over in its order."""

    _requests: list[Request] = field(default_factory=list)
    _num_overtaken: int = 0  # taken in a row while another had waited longer
    _full_at: int = -1  # with so many running nobody could go, and nothing has changed here since

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        """At its place."""
        insort(self._requests, request, key=_place)
        self._full_at = -1

    def remove(self, request: Request) -> None:
        """It waits no longer."""
        self._requests.remove(request)
        self._full_at = -1

    def clear(self) -> None:
        """Nobody waits."""
        self._requests.clear()
        self._num_overtaken, self._full_at = 0, -1

    def take(self, fits: Callable[[int], bool], num_running: int) -> Request | None:
        """Who is next, and waits no longer; None: nobody may go now.

        fits(tokens): whether a request that may come to so many has room beside those `num_running` that run.
        Between two calls requests only end: where no fewer run than at the last one, none fits that did not.
        """
        if not self._requests or num_running == self._full_at:
            return None
        oldest = min(self._requests, key=_arrival)
        in_order = [oldest] if self._num_overtaken >= MAX_OVERTAKEN else self._requests
        for i, request in enumerate(in_order):
            if fits(request.num_reserved):
                for passed in in_order[:i]:
                    passed.num_passed += 1
                self._num_overtaken = 0 if request is oldest else self._num_overtaken + 1
                self.remove(request)
                return request
            if request.num_passed >= MAX_PASSED:
                break
        self._full_at = num_running
        return None

    def since(self, then_s: float) -> list[Request]:
        """Those that have waited since `then_s` or before, in the order of their arrival."""
        return sorted((r for r in self._requests if r.queued_at_s <= then_s), key=_arrival)


def _place(request: Request) -> tuple[int, int]:
    return request.priority, request.session


def _arrival(request: Request) -> int:
    return request.session
