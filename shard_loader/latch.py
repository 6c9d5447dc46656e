"""A step that the device has before its numbers are there: it waits for them itself. Compute thread only, but
for `open` where `may_open` says so.

MLX needs about as long to hand a step of one row to a fast GPU as that needs to compute it
(docs/benchmarks.md, "Two and four GPUs"). A stage that waits for a frame has that time: the step is handed
over with a latch at its head, and begins as soon as the host has written the numbers. Whatever else comes
first abandons it: it runs with the numbers that are there, and its caches go back by a token, as after a
wrong guess.

A latch waits for BOUND_S at most, so that nothing waits for ever: a step that began too early says so, and is
computed again.
"""

from __future__ import annotations

import functools
import logging
import platform
import time
from collections.abc import Callable, Sequence
from math import prod

import mlx.core as mx
import numpy as np

from kernels import backend
from kernels.latch import ABANDONED, FLAG_SHAPE, OPEN, waiting
from shard_loader.carry import memory
from shard_loader.host_arrays import HostArrays, Kind, write
from shard_loader.sole_user import gpu_of_this_process

logger = logging.getLogger(__name__)

BOUND_S = 0.02
MAX_NUMBERS = 1 << 17  # which one block of threads copies
MAX_STRIKES = 3
ORDERED = "x86_64"  # whose writes are seen in their order: the numbers, then the flag
STEPS_ALONE = 64  # between two looks whether another node uses the GPU, whom a step that waits would stop
FLAG: Kind = ("uint32", FLAG_SHAPE)


class Latch:
    """Of one step: `behind`, `hand_over`, then `open` or `abandon`; at last `was_open`."""

    def __init__(self, host: HostArrays) -> None:
        self._host = host
        (self._flag,) = host.blanks([FLAG])
        write(self._flag, bytes(self._flag.nbytes))
        self._said = memory(self._flag)  # by host and device
        self._handed: list[mx.array] = []

    def behind(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Arrays of `HostArrays.blanks`, as the step must be built on them."""
        return waiting(self._flag, arrays, BOUND_S)

    def hand_over(self, arrays: list[mx.array]) -> None:
        """The device has the step now. Returns late where it takes no more before it has begun."""
        self._handed = arrays
        mx.async_eval(arrays)

    def may_open(self) -> bool:
        """Any thread: whether it may call `open`, in the place of the compute thread."""
        return True

    def open(self, fill: Callable[[], None]) -> None:
        """fill: writes the numbers. The step begins."""
        fill()
        self._tell(OPEN)

    def abandon(self) -> None:
        """Nobody wants the step. Returns when the device has done with it."""
        self._tell(ABANDONED)
        mx.eval(self._handed)
        self.give_back()

    def was_open(self) -> bool:
        """The step is evaluated: whether it had its numbers. Ask once."""
        seen = self._said[1]
        self.give_back()
        return bool(seen == OPEN)

    def give_back(self) -> None:
        """It was opened, and nobody will ask whether in time."""
        self._host.give_back([self._flag], [FLAG])

    def _tell(self, what: int) -> None:
        self._said[0] = what


class EmulatedLatch(Latch):
    """On a processor, for tests: a step is evaluated when its numbers are there, or with zeros where late."""

    def __init__(self, host: HostArrays, bound_s: float) -> None:
        super().__init__(host)
        self._bound_s, self._until, self._is_in_time = bound_s, 0.0, True

    def behind(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """As they are."""
        return list(arrays)

    def hand_over(self, arrays: list[mx.array]) -> None:
        """From now on it waits."""
        self._handed, self._until = arrays, time.perf_counter() + self._bound_s

    def may_open(self) -> bool:
        """What is late is evaluated first, and that by the compute thread."""
        return time.perf_counter() < self._until

    def open(self, fill: Callable[[], None]) -> None:
        """The same."""
        self._is_in_time = time.perf_counter() < self._until
        if not self._is_in_time:
            mx.eval(self._handed)
        fill()

    def was_open(self) -> bool:
        """The same."""
        super().was_open()
        return self._is_in_time


class Latches:
    """Gives out a latch where one can be had and pays. emulated_s: the bound of emulated ones."""

    def __init__(self, host: HostArrays, *, emulated_s: float | None = None) -> None:
        self._host, self._emulated_s = host, emulated_s
        self.bound_s = BOUND_S if emulated_s is None else emulated_s
        self.is_on = emulated_s is not None or (backend.current() == "cuda" and platform.machine() == ORDERED)
        self._is_tried = emulated_s is not None
        self._strikes = self._num_given = 0
        self._is_alone = False
        if self.is_on and emulated_s is None:
            gpu_of_this_process()  # others learn of us

    def of(self, kinds: Sequence[Kind]) -> Latch | None:
        """For a step whose placeholders are of these kinds."""
        if not self.is_on or any(not shape for _, shape in kinds):
            return None
        if sum(prod(shape) for _, shape in kinds) > MAX_NUMBERS:
            return None
        if self._emulated_s is not None:
            return EmulatedLatch(self._host, self._emulated_s)
        if not self._is_tried:
            self._is_tried, self.is_on = True, self._works()
        if self._num_given % STEPS_ALONE == 0:
            self._is_alone = gpu_of_this_process().is_alone()
        self._num_given += 1
        return Latch(self._host) if self.is_on and self._is_alone else None

    def note(self, handed_s: float, *, was_open: bool) -> None:
        """How a step went that was handed over in so many seconds. Where that is always too long, it ends."""
        if was_open:
            self._strikes = 0
            return
        self._strikes += handed_s > self.bound_s / 2
        if self._strikes >= MAX_STRIKES:
            self.give_up("the device's queue is shorter than a step")

    def give_up(self, why: object) -> None:
        """None from now on."""
        self.is_on = False
        logger.info("steps are not handed over before their numbers are there: %s", why)

    def _works(self) -> bool:
        """Whether a kernel that runs sees what the host writes: tried once, in at most a bound."""
        kind: Kind = ("uint32", (4, 5))
        numbers = np.arange(20, dtype=np.uint32).reshape(4, 5)
        try:
            for is_timed in (False, True):  # the first one may wait for its compiler
                arrays = self._host.blanks([kind])
                latch = Latch(self._host)
                (out,) = latch.behind(arrays)
                latch.hand_over([out])
                latch.open(functools.partial(write, arrays[0], numbers.tobytes()))
                is_right = bool((np.array(out) == numbers).all())
                was_open = latch.was_open()
                self._host.give_back(arrays, [kind])
                if is_timed and not (is_right and was_open):
                    self.give_up("a kernel does not see what the host writes")
                    return False
        except (RuntimeError, ValueError) as error:
            self.give_up(error)
            return False
        return True
