"""Trials of one form: is the kernels' answer right, and how long do they and MLX's operations take.

What is tried is a Subject's; the weights are those of its layers, so nothing is allocated but tokens. One
thread, the one that owns MLX.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np

from kernels.source import recorded

if TYPE_CHECKING:
    from kernels.verdicts import Form, Verdict

CACHE_BYTES = 512 << 20  # what is read before the same weights come again, where there are as many
MIN_GAIN = 1.02  # less is noise, and MLX's operations are kept
MAX_CALLS = 64  # in a row, as a forward pass of a model has them
NUM_ROUNDS = 5
NUM_INPUTS = 32

# x and an input to the next x, of the same shape and dtype
Run = Callable[[mx.array, Any], mx.array]


class Inputs(Protocol):
    """What a call takes, evaluated."""

    @property
    def x(self) -> mx.array: ...


@dataclass(frozen=True, slots=True)
class Path:
    """One way to compute. runs: a call of each layer; moved_bytes: that one call reads and writes."""

    runs: Sequence[Run]
    moved_bytes: Callable[[Any], int]
    min_calls: int = 4


class Used(Protocol):
    """What a layer does with the kernels once it may; any thread."""

    @property
    def num_calls(self) -> int: ...

    @property
    def failure(self) -> str:
        """Why it has given them up; empty: it has not."""
        ...


class Subject(Protocol):
    """One form of block or matrix under test, with the layers that have it, whose own tensors are tried."""

    @property
    def name(self) -> str:
        """The form in a line; different forms have different ones."""
        ...

    @property
    def form(self) -> Form | None:
        """As a planner knows it; None: it knows none that is like this one."""
        ...

    @property
    def classes(self) -> Sequence[tuple[int, int]]:
        """The first and the last number of tokens, 0 for no end: each gets a verdict."""
        ...

    @property
    def tolerance(self) -> float:
        """The largest error that is none, in units of the largest value."""
        ...

    def has_kernels(self, num_tokens: int) -> bool: ...

    def answers(self, num_tokens: int) -> Iterator[tuple[Callable[[], mx.array], mx.array]]:
        """Calls of the kernels, each with the reference's answer in float32."""
        ...

    def inputs(self, num_tokens: int, seed: int) -> Inputs:
        """Random ones."""
        ...

    def needed_bytes(self, one: Any) -> int:
        """Of weights that a call needs, each once."""
        ...

    def paths(self, num_tokens: int) -> tuple[Path, Path]:
        """The kernels' and that of MLX's operations."""
        ...

    def use(self, verdicts: Sequence[Verdict]) -> Sequence[Used]:
        """From now on they decide for the layers."""
        ...


@dataclass(frozen=True, slots=True)
class Times:
    """us of one call, the best of several rounds each, and the bytes that it needs at least.

    Building the graph in Python counts; the times without it are those of the same rounds.
    """

    ours_us: float
    mlx_us: float
    ours_eval_us: float
    mlx_eval_us: float
    needed_bytes: float

    @property
    def ratio(self) -> float:
        return self.mlx_us / self.ours_us

    @property
    def gb_s(self) -> float:
        """Of the kernels, while they are evaluated."""
        return self.needed_bytes / self.ours_eval_us / 1e3


def error_of(subject: Subject, num_tokens: int) -> tuple[float, int]:
    """The largest error of the kernels' answers beside the reference's, and the launches of the first.

    It is infinite where something is not a number. Raises whatever the kernels raise.
    """
    errors, num_launches = [], 0
    for answer, wanted in subject.answers(num_tokens):
        with recorded() as calls:
            ours = answer()
            mx.eval(ours)
        num_launches = num_launches or len(calls)
        with mx.stream(mx.cpu):
            difference = mx.abs(ours.astype(mx.float32) - wanted).max() / mx.abs(wanted).max()
            mx.eval(difference)
        error = float(difference)
        errors.append(error if np.isfinite(error) else np.inf)
    return max(errors), num_launches


def times_of(subject: Subject, num_tokens: int, on_step: Callable[[], None] = lambda: None) -> Times:
    """One call after the other, each with the answer of the one before and with other weights.

    As many as read CACHE_BYTES, if MAX_CALLS allows. Ours and MLX's in turn, round after round.
    """
    inputs = [subject.inputs(num_tokens, seed) for seed in range(NUM_INPUTS)]
    ours, mlx = ((path, _num_calls(path, inputs)) for path in subject.paths(num_tokens))
    best: dict[bool, tuple[float, float]] = {}
    for number in range(NUM_ROUNDS + 1):  # the first round compiles
        for is_ours in (True, False):
            path, num_calls = ours if is_ours else mlx
            us = _chain(path.runs, inputs, num_calls)
            if number:
                best[is_ours] = min(us, best.get(is_ours, us))
            on_step()
    (ours_us, ours_eval_us), (mlx_us, mlx_eval_us) = best[True], best[False]
    needed = float(np.mean([subject.needed_bytes(one) for one in inputs]))
    return Times(ours_us, mlx_us, ours_eval_us, mlx_eval_us, needed)


def _num_calls(path: Path, inputs: Sequence[Inputs]) -> int:
    moved = float(np.mean([path.moved_bytes(one) for one in inputs]))
    return int(min(MAX_CALLS, max(path.min_calls, -(-CACHE_BYTES // moved))))


def _chain(runs: Sequence[Run], inputs: Sequence[Inputs], num_calls: int) -> tuple[float, float]:
    """us of a call in all, and of its evaluation."""
    started = time.perf_counter()
    x = inputs[0].x
    for run, one in itertools.islice(
        zip(itertools.cycle(runs), itertools.cycle(inputs), strict=False), num_calls
    ):
        x = run(x, one)
    built = time.perf_counter()
    mx.eval(x)
    ended = time.perf_counter()
    return (ended - started) * 1e6 / num_calls, (ended - built) * 1e6 / num_calls
