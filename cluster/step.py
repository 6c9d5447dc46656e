"""One frame under way on a stage: what is evaluated for it, now or while the next one is built.

The engine's code for a frame is a generator: where it needs numbers it yields what has to be evaluated, and
goes on when that is there. Compute thread only.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx

from cluster.trace_recorder import Kind, recorder
from proto import ring_pb2
from proto.codec import Tensor

Output = tuple[ring_pb2.Frame, list[Tensor]] | None  # for the next hop; None: nothing has to go there


@dataclass(frozen=True, slots=True)
class Wanted:
    """Arrays to evaluate: those whose numbers are read next, and others that must not stay a graph."""

    read: list[mx.array]
    others: list[mx.array]


T = TypeVar("T")
Steps = Generator[Wanted, None, T]


class Step:
    """Built up to its first evaluation. `start` lets that begin, `finish` waits for it and does the rest."""

    def __init__(self, code: Steps[Output], seq: int = 0) -> None:
        self._code, self._seq = code, seq
        self._wanted: Wanted | None = None
        self._is_started = self._is_waited_for = False
        self._ready: list[mx.array] = []  # of the evaluation that was started: there as soon as it is done
        self._failure: Exception | None = None  # of the evaluation that was waited for
        self._output: Output = None
        self._go_on(None)

    def start(self) -> None:
        """Evaluation goes on in the background; returns when the device has its work."""
        wanted = self._wanted
        if wanted is None:
            return
        # The others are, once written to, arrays of a step that is built upon this one.
        ready = wanted.read or (mx.depends([mx.array(0)], wanted.others) if wanted.others else [])
        try:
            mx.async_eval(ready, wanted.others)
        except Exception as error:  # border: the code that wanted it knows whose fault it is
            self._go_on(error)
        else:
            self._is_started, self._ready = True, ready

    def wait(self) -> Exception | None:
        """The device has done what it was given; why it could not. What is left is for `finish`.

        Another step may have been built upon this one, and started.
        """
        if self._wanted is not None and not self._is_waited_for:
            self._failure, self._is_waited_for = self._evaluate(self._wanted), True
        return self._failure

    def fail(self, error: Exception) -> None:
        """What it was built on has failed, and so does it."""
        if self._wanted is not None:
            self._go_on(error)

    def finish(self) -> Output:
        """What the frame comes to."""
        while self._wanted is not None:
            failure = self._failure if self._is_waited_for else self._evaluate(self._wanted)
            self._is_started = self._is_waited_for = False
            self._ready, self._failure = [], None
            self._go_on(failure)
        return self._output

    def _evaluate(self, wanted: Wanted) -> Exception | None:
        began = time.perf_counter() if recorder.on else 0.0
        failure = None
        try:
            if self._is_started:
                mx.eval(self._ready)
            else:
                mx.eval(wanted.read, wanted.others)
        except Exception as error:  # border, as above
            failure = error
        if began:
            recorder.add(Kind.COMPUTED, self._seq, began, time.perf_counter())
        return failure

    def _go_on(self, failure: Exception | None) -> None:
        """Run the code to the next place where it needs numbers, or to its end."""
        try:
            self._wanted = next(self._code) if failure is None else self._code.throw(failure)
        except StopIteration as end:
            self._wanted, self._output = None, end.value
